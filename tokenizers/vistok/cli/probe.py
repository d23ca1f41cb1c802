"""``vistok probe``: how well classes are told from the features or codes of a tokenizer."""

from pathlib import Path

from omegaconf import DictConfig

from vistok.cli.hydra_app import command_line, run


def main() -> None:
    """Run the command line."""
    run("probe", task)


def task(config: DictConfig) -> dict[str, float]:
    """Probe what one composed config says; Hydra's folder of the job receives the numbers."""
    from hydra.core.hydra_config import HydraConfig

    from vistok.evaluation.probe import probe_bundle

    return probe_bundle(config, Path(HydraConfig.get().runtime.output_dir), command_line())


if __name__ == "__main__":
    main()
