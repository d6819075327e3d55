"""`python -m hawk_trt` is `hawk-trt`."""

import sys

from hawk_trt.apps.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
