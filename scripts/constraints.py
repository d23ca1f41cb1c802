"""Write ``constraints.txt`` for pip from the tested versions in ``pyproject.toml``."""

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# The versions vistok is tested with, from pyproject.toml: python scripts/constraints.py\n"


def constraints() -> str:
    """Text of ``constraints.txt``: one requirement per line."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return HEADER + "".join(f"{line}\n" for line in pyproject["tool"]["uv"]["constraint-dependencies"])


if __name__ == "__main__":
    (ROOT / "constraints.txt").write_text(constraints())
