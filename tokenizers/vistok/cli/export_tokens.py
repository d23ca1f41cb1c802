"""``vistok export-tokens``: a data set to tokens."""

from omegaconf import DictConfig

from vistok.cli.hydra_app import run


def main() -> None:
    """Run the command line."""
    run("export_tokens", task)


def task(config: DictConfig) -> None:
    """Export what one composed config says."""
    from vistok.tokens.export import export_from_config

    export_from_config(config)


if __name__ == "__main__":
    main()
