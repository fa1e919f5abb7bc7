"""Find the guidance that serves a model best: ``python tune.py ckpt=digits budget=10min``."""

from sag_dit.cli.tune import main

if __name__ == "__main__":
    main()
