"""python -m softmaxlib."""

import sys

from softmaxlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
