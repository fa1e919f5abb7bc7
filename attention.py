"""Look at every layer's attention: ``python attention.py ckpt=DiT-XL-2``."""

from sag_dit.cli.attention import main

if __name__ == "__main__":
    main()
