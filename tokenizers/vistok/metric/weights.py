"""Where the pretrained networks of losses and metrics lie: one local folder, which ``vistok weights`` fills."""

import os
from pathlib import Path

WEIGHTS_VARIABLE = "VISTOK_WEIGHTS"


class WeightsNotFoundError(FileNotFoundError):
    """A file of pretrained weights is not where it was looked for."""


def find_weights(name: str, folder: str | Path | None = None) -> Path:
    """Path of a weights file.

    Args:
        name: File name, for example ``lpips_vgg_lin.safetensors``.
        folder: Folder that holds it. Default: the environment variable ``VISTOK_WEIGHTS``.

    Raises:
        WeightsNotFoundError: If no folder is known or the folder does not hold the file.
    """
    folder = folder if folder is not None else os.environ.get(WEIGHTS_VARIABLE)
    advice = (
        "name a folder that has it by weights= (of a training loss: loss.lpips_weights=) or, for all, by the "
        f"environment variable {WEIGHTS_VARIABLE}; `vistok weights FOLDER` fetches the usual files"
    )
    if not folder:
        raise WeightsNotFoundError(f"no folder was given for {name}: {advice}")
    path = Path(folder) / name
    if not path.is_file():
        raise WeightsNotFoundError(f"there is no file {path}: {advice}")
    return path
