"""``python -m vistok.cli``."""

from vistok.cli import main

if __name__ == "__main__":
    main()
