"""The console script ``vistok``: one module per subcommand, with the same Hydra overrides as the root scripts."""

import importlib
import importlib.util
import sys

SUBCOMMANDS = {
    "train": "train a tokenizer",
    "eval": "evaluate tokenizers and write reports",
    "probe": "tell classes from the features or codes of a tokenizer",
    "convert": "make a bundle of a published checkpoint",
    "list": "list the published tokenizers that vistok loads",
    "weights": "fetch the networks of losses and metrics into a folder",
    "compare": "show saved evaluations side by side",
    "shards": "write pictures into tar shards for data=webdataset",
    "export-tokens": "encode a data set, for a generator to train on",
    "sample": "images of a trained generator",
}


def main() -> None:
    """Dispatch ``vistok SUBCOMMAND [overrides]``."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in SUBCOMMANDS:
        module = f"vistok.cli.{arguments[0].replace('-', '_')}"
        sys.argv = [sys.argv[0], *arguments[1:]]
        # Lightning starts the other processes of a run as `python -m <name of __main__>` with the same arguments.
        sys.modules["__main__"].__spec__ = importlib.util.find_spec(module)
        importlib.import_module(module).main()
        return
    if arguments == ["--version"]:
        from vistok import __version__

        sys.stdout.write(f"vistok {__version__}\n")
        return
    lines = ["usage: vistok SUBCOMMAND [Hydra overrides or options]", ""]
    lines += [f"  {name:<15}{what}" for name, what in SUBCOMMANDS.items()]
    lines += ["", "vistok SUBCOMMAND --help explains groups and settings; vistok --version"]
    asked_for_help = not arguments or arguments[0] in ("-h", "--help")
    if not asked_for_help:
        lines.insert(0, f"vistok has no subcommand {arguments[0]!r}")
    (sys.stdout if asked_for_help else sys.stderr).write("\n".join(lines) + "\n")
    sys.exit(0 if asked_for_help else 2)
