"""``vistok convert``: make a bundle of a published checkpoint."""

import argparse
import json
import sys


def main() -> None:
    """Read a checkpoint, write a bundle."""
    parser = argparse.ArgumentParser(
        prog="vistok convert",
        description="Make a bundle of a checkpoint of another program. Nothing that the checkpoint brings is executed.",
    )
    parser.add_argument("source", help="file, or folder with a file and perhaps config.json")
    parser.add_argument("destination", help="new folder of the bundle")
    parser.add_argument("--family", help="family or family:name (see vistok list); default: as the tensors are called")
    parser.add_argument("--weights", choices=["raw", "ema"], help="trained weights or their moving averages")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="e.g. --option size=512")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the destination")
    arguments = parser.parse_args()
    options = dict(each.partition("=")[::2] for each in arguments.option)
    from vistok.hub import save
    from vistok.hub.importers import import_checkpoint, origin_of

    try:
        values = {name: json.loads(value) for name, value in options.items()}
    except json.JSONDecodeError:
        parser.error(f"--option takes NAME=VALUE with a number, true, false or a quoted string, got {options}")
    try:
        tokenizer = import_checkpoint(arguments.source, arguments.family, weights=arguments.weights, **values)
        origin = origin_of(arguments.source, arguments.family)
        folder = save(tokenizer, arguments.destination, origin=origin, overwrite=arguments.overwrite)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    sys.stdout.write(f"{folder}: {tokenizer.quantizer}\n")


if __name__ == "__main__":
    main()
