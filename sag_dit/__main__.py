"""``python -m sag_dit``: all commands."""

from sag_dit.cli.main import main

if __name__ == "__main__":
    main()
