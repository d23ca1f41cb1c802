"""Evaluate a visual tokenizer: ``python eval.py --help``."""

from vistok.cli.eval import main

if __name__ == "__main__":
    main()
