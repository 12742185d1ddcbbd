"""``python -m srfx``: the command line."""

from srfx.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
