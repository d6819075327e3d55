"""A few of the cases of `make check-files`, whose 2,000 take minutes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_damaged_files_are_one_clear_error_or_work():
    command = [sys.executable, "-m", "tests.fuzz_files", "--cases", "60", "--seed", "3"]
    env = os.environ | {"PYTHONPATH": "tests"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 wrong" in done.stdout
    assert " 0 refused" not in done.stdout
