"""``python -m megamoe`` is ``megamoe``."""

from megamoe.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
