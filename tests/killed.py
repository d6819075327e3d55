"""A command that is killed twice while it writes its log, line by line."""

import subprocess
import sys

# In forked children, so that what the command needs is imported once.
_PROGRAM = """
import importlib, os, signal, sys, time
from pathlib import Path
from hawk_trt.apps.cli.main import main
module, log, more, *argv = sys.argv[1:]
importlib.import_module(module)

def lines():
    return Path(log).read_bytes().count(b"\\n") if Path(log).exists() else 0

for _ in range(2):
    enough, child = lines() + int(more), os.fork()
    if child == 0:
        os._exit(main(argv))
    while os.waitpid(child, os.WNOHANG) == (0, 0) and lines() < enough:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


def kill_twice(module, log, more, argv):
    """Run a command of that module; kill it when so many more lines are in its log, twice: what is in the log then."""
    subprocess.run(
        [sys.executable, "-c", _PROGRAM, module, log, str(more), *argv], stderr=subprocess.DEVNULL, check=True
    )
    return log.read_bytes()
