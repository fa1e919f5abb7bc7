"""Export a model: ``python export.py ckpt=outputs/train/RUN format=diffusers out=my_model``."""

from sag_dit.cli.export import main

if __name__ == "__main__":
    main()
