"""Measure images: ``python evaluate.py ckpt=digits`` or ``python evaluate.py samples=FOLDER``."""

from sag_dit.cli.evaluate import main

if __name__ == "__main__":
    main()
