"""``vistok sample``: images of a trained generator."""

from omegaconf import DictConfig

from vistok.cli.hydra_app import run


def main() -> None:
    """Run the command line."""
    run("sample", task)


def task(config: DictConfig) -> None:
    """Sample what one composed config says."""
    from vistok.prior.sample import sample_from_config

    sample_from_config(config)


if __name__ == "__main__":
    main()
