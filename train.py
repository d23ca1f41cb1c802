"""Train a visual tokenizer: ``python train.py --help``."""

from vistok.cli.train import main

if __name__ == "__main__":
    main()
