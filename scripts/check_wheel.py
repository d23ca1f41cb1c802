"""Check a wheel: it holds the package and its configs, and nothing that belongs to somebody else.

python scripts/check_wheel.py dist/vistok-*.whl
"""

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def problems(wheel: Path) -> list[str]:
    """What is wrong with the contents of a wheel."""
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {"vistok", f"{wheel.name.rsplit('-py3', 1)[0]}.dist-info"}
    foreign = sorted({name.split("/")[0] for name in names} - ours)
    expected = {f"vistok/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    expected |= {str(path.relative_to(ROOT / "tokenizers")) for path in (ROOT / "tokenizers").rglob("*.py")}
    expected |= {"vistok/py.typed"}
    found = [f"holds {name}, which is not ours" for name in foreign]
    return found + [f"lacks {name}" for name in sorted(expected - names)]


if __name__ == "__main__":
    found = [problem for wheel in sys.argv[1:] for problem in problems(Path(wheel))]
    sys.stdout.write("\n".join(found) + "\n" if found else "the wheel is complete\n")
    sys.exit(bool(found) or len(sys.argv) < 2)
