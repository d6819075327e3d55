"""The command line in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(*args, code="", **settings):
    program = [sys.executable, "-c", code] if code else [sys.executable, "-m", "hawk_trt"]
    environment = os.environ | {"HAWK_DEBUG": "0"} | settings.pop("env", {})
    return subprocess.run(
        [*program, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment, **settings
    )
