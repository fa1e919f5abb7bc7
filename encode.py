"""Encode images to latents: ``python encode.py data.root=photos/ out=latents/``."""

from sag_dit.cli.encode import main

if __name__ == "__main__":
    main()
