"""``python -m aligndet``."""

import sys

from aligndet.cli import main

if __name__ == "__main__":
    sys.exit(main())
