"""``python -m vistok.cli``."""

from vistok.cli import main

main()
