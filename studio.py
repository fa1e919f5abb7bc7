"""Open a page on which sliders draw: ``python studio.py``."""

from sag_dit.cli.studio import main

if __name__ == "__main__":
    main()
