"""Train a denoiser: ``python train.py experiment=digits``."""

from sag_dit.cli.train import main

if __name__ == "__main__":
    main()
