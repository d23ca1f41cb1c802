"""``vistok list``: published tokenizers that vistok loads."""

import argparse
import sys


def main() -> None:
    """Print a table: what `vistok.load` is given, the number of parameters, licence, and where the file is."""
    parser = argparse.ArgumentParser(prog="vistok list", description="Published tokenizers that vistok.load knows.")
    parser.add_argument("family", nargs="?", help="only those of this family")
    family = parser.parse_args().family
    from vistok.hub.importers import FAMILIES, list_pretrained

    if family is not None and family not in FAMILIES:
        parser.error(f"no family {family!r}: choose one of {', '.join(FAMILIES)}")
    rows = [("NAME", "MILLIONS", "LICENCE", "SOURCE", "FILE")]
    rows += [
        (each.name, f"{each.parameters:.1f}" if each.parameters else "-", each.licence, each.source, each.file or "-")
        for each in list_pretrained()
        if family in (None, each.name.partition(":")[0])
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")


if __name__ == "__main__":
    main()
