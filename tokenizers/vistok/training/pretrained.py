"""Training that starts from a tokenizer: fine-tuning, a new decoder or quantizer on what another run has learned."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn

import vistok
from vistok.config import config_of
from vistok.decoder import TiTokDecoder
from vistok.hub.importers import origin_of
from vistok.loss import AdversarialLoss
from vistok.tokenizer import Projection, Tokenizer
from vistok.training.checkpoint import read_checkpoint

log = logging.getLogger(__name__)

PARTS = ("encoder", "quantizer", "decoder")
# A projection belongs to both of its sides.
SIDES = {"to_codes": ("encoder", "quantizer"), "from_codes": ("quantizer", "decoder")}


class Start(NamedTuple):
    """What a training starts from.

    Attributes:
        tokenizer: The source.
        children: Names of the modules of the new tokenizer that get its weights.
    """

    tokenizer: Tokenizer
    children: tuple[str, ...]

    def fill(self, tokenizer: Tokenizer) -> None:
        """Copy the weights into a tokenizer that was built from the config which `take_over` has changed.

        Raises:
            ValueError: If a setting changes the shape of a tensor.
        """
        for name in self.children:
            ours, theirs = getattr(tokenizer, name), getattr(self.tokenizer, name)
            if isinstance(theirs, nn.Identity) and isinstance(ours, Projection):
                _set_identity(ours)
                continue
            state, expected = theirs.state_dict(), ours.state_dict()
            wrong = state.keys() ^ expected.keys()
            wrong |= {key for key in state.keys() & expected.keys() if state[key].shape != expected[key].shape}
            if wrong:
                key = min(wrong)
                raise ValueError(
                    f"pretrained: {name}.{key} is {_shape(state.get(key))} there and {_shape(expected.get(key))} here: "
                    f"leave pretrained.settings.{name} as it was, or take {name} out of pretrained.parts"
                )
            ours.load_state_dict(state)


def take_over(config: DictConfig) -> Start | None:
    """Put the architecture of ``pretrained.load`` into a config, in the place of its groups.

    Args:
        config: Composed from ``configs/train.yaml``; changed in place.

    Returns:
        Where the weights come from; None if there is nothing to start from.

    Raises:
        ValueError: If `pretrained` names what is not there, or the command line sets what has no effect beside it.
    """
    settings = config.pretrained
    if settings.load is None:
        if settings.path is not None or settings.options or settings.settings or list(settings.parts) != list(PARTS):
            raise ValueError("settings of pretrained have no effect without pretrained.load: set it, or leave them out")
        return None
    parts = list(settings.parts)
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"pretrained.parts are some of {', '.join(PARTS)}; got {parts}")
    source = vistok.load(settings.load, path=settings.path, **(settings.options or {}))
    plain = {key: value for key, value in config_of(source).items() if key != "preprocessing"}
    _change(plain, settings.settings or {}, parts)
    whole = set(parts) == set(PARTS)
    _refuse_vain_overrides([*parts, "tokenizer"] if whole else parts)
    with open_dict(config):
        if whole:
            children = tuple(name for name, _ in source.named_children())
            config.tokenizer = plain
        else:
            if any(name != "vistok.Tokenizer" for name in (plain["_target_"], config.tokenizer["_target_"])):
                raise ValueError("parts of a hierarchical tokenizer cannot be taken alone: leave out pretrained.parts")
            children = (*parts, *(name for name, sides in SIDES.items() if set(sides) <= set(parts)))
            if len(children) > len(parts) and plain["projection"] != "none":
                config.tokenizer.projection = plain["projection"]
        for part in parts:
            config[part] = config.tokenizer[part] = plain[part]
        if whole or "to_codes" in children:
            # Whitening would write over it.
            config.module.whiten = False
    log.info("starting from %s of %s", ", ".join(children), settings.load)
    return Start(source, children)


def fill_discriminator(adversarial: AdversarialLoss | None, checkpoint: str | Path) -> None:
    """Copy the discriminator, and what the adversarial loss averages, from a checkpoint of another run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If this run has no discriminator, or the checkpoint none or another.
    """
    where = f"pretrained.discriminator={checkpoint}"
    if adversarial is None:
        raise ValueError(f"{where} has no effect without a discriminator: set discriminator=patchgan, or leave it out")
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{where} is no file: give a checkpoint of a run, runs/.../checkpoints/last.ckpt")
    content = read_checkpoint(path, "pretrained.discriminator")
    theirs = json.loads(content.get("vistok_discriminator", "null"))
    ours = json.loads(json.dumps(config_of(adversarial.discriminator)))
    if theirs != ours:
        raise ValueError(
            f"{where} has {theirs or 'no discriminator'}, this run has {ours}: give the discriminator of its run"
        )
    prefix = "adversarial."
    state = content["state_dict"].items()
    adversarial.load_state_dict({key.removeprefix(prefix): each for key, each in state if key.startswith(prefix)})


@torch.no_grad()
def second_stage(tokenizer: Tokenizer, teacher: Tokenizer) -> Tokenizer:
    """What the second stage of TiTok begins with: a tokenizer that predicts a teacher's tokens, and that one's decoder.

    Q. Yu et al.: An Image is Worth 32 Tokens, https://arxiv.org/abs/2406.07550, section 3.3. The paper then freezes
    encoder and quantizer.

    Args:
        tokenizer: Trained with `vistok.loss.TokenPrediction`; its parts become those of the new one.
        teacher: That of this training; its decoder becomes a part of the new one.

    Raises:
        ValueError: If the tokenizer does not predict tokens of such a teacher.
    """
    first, codebook = tokenizer.decoder, teacher.quantizer.codebook
    predicted = getattr(first, "teacher_codebook_size", None)
    if (
        not isinstance(first, TiTokDecoder)
        or first.pixel_decoder is not None
        or codebook is None
        or predicted != len(codebook)
    ):
        raise ValueError(
            f"the first stage predicts tokens of its teacher: got a {type(first).__name__} of {predicted} tokens and a "
            f"teacher with {None if codebook is None else len(codebook)} codes"
        )
    if not isinstance(teacher.from_codes, nn.Identity | Projection):
        raise ValueError(
            "the expected code of a teacher with convolutions around its quantizer is not one of its codes"
        )
    decoder = TiTokDecoder(**{**first._arguments, "pixel_decoder": teacher.decoder})
    decoder.load_state_dict({**decoder.state_dict(), **first.state_dict()})
    # An affine map of an expectation is the expectation of the mapped codes.
    decoder.teacher_codebook.copy_(teacher.from_codes(codebook.T[None])[0].T)
    result = Tokenizer(**{**tokenizer._arguments, "decoder": decoder})
    for name in SIDES:
        getattr(result, name).load_state_dict(getattr(tokenizer, name).state_dict())
    return result.eval()


def origin(config: DictConfig) -> dict[str, Any]:
    """What the model card of a run says about the weights that it started from."""
    load, path = config.pretrained.load, config.pretrained.path
    if load is None:
        return {}
    return {"fine-tuned from": str(load)} | (origin_of(path, load) if path is not None else {})


def _change(plain: dict[str, Any], changes: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Set arguments of parts to other values."""
    for part, values in changes.items():
        if part not in parts:
            raise ValueError(f"pretrained.settings.{part}: parts that are taken are {', '.join(parts)}")
        for key, value in values.items():
            if key not in plain[part]:
                known = ", ".join(name for name in plain[part] if name != "_target_")
                raise ValueError(f"pretrained.settings.{part}.{key}: this {part} has {known}")
            plain[part][key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _refuse_vain_overrides(groups: Sequence[str]) -> None:
    """Raise a ValueError if the command line sets something of a part that is taken as it is."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        group, _, setting = key.partition(".")
        if group in groups:
            instead = f"write pretrained.settings.{key}=, or " if setting and group != "tokenizer" else ""
            raise ValueError(
                f"{key} has no effect beside pretrained.load, which brings its {group}: {instead}leave it out"
                + ("" if group == "tokenizer" else f", or leave {group} out of pretrained.parts")
            )


@torch.no_grad()
def _set_identity(projection: Projection) -> None:
    """Make a projection give what it gets, as one that is absent does."""
    nn.init.eye_(projection.weight)
    nn.init.zeros_(projection.bias)


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))
