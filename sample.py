"""Draw images: ``python sample.py ckpt=DiT-XL-2 sag_scale=1.0``."""

from sag_dit.cli.sample import main

if __name__ == "__main__":
    main()
