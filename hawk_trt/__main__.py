"""`python -m hawk_trt` is `hawk-trt`."""

import sys

from hawk_trt.cli import main

if __name__ == "__main__":
    sys.exit(main())
