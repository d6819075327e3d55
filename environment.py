"""The virtual environment of a checkout, made or mended: python3 environment.py FOLDER STAMP EXTRAS (make setup, demo).

Any Python 3 can run this file, so that one that is too old can say so. A half-made environment is made anew. pip's
words go to pip.log in the folder; one line tells how far it is.
"""

import importlib.util
import os
import subprocess
import sys
import time

OLDEST = (3, 10)
# On which the README's times and the tests were had.
USUAL = "python3.11"
USABLE = "import sys, pip; sys.exit(sys.version_info[:2] < %r)" % (OLDEST,)


def main(folder, stamp, extras):
    """Make what is missing; returns the exit status, one line having said why where it is not 0."""
    if sys.version_info[:2] < OLDEST:
        found = "%d.%d" % sys.version_info[:2]
        oldest = "%d.%d" % OLDEST
        return failed(
            "Python %s is too old: hawk_trt needs %s or newer. Try: make setup PYTHON=%s" % (found, oldest, USUAL)
        )
    python = os.path.join(folder, "bin", "python")
    if not usable(python):
        if os.path.isdir(folder):
            say("%s is half made or too old: making it anew" % folder)
        if importlib.util.find_spec("ensurepip") is None:  # a part of Python that Debian leaves out
            return failed("Python's venv is not whole here. Try: apt install python%d.%d-venv" % sys.version_info[:2])
        subprocess.check_call([sys.executable, "-m", "venv", "--clear", folder])
    return install(python, folder, stamp, extras)


def usable(python):
    """Whether there is a Python with pip."""
    try:
        return subprocess.call([python, "-c", USABLE], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def install(python, folder, stamp, extras):
    """Install this project with its extras by pip, in one line of progress."""
    begun, packages = time.time(), 0
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += ["-c", "constraints.txt", "-e", ".[%s]" % extras]
    say("installing hawk_trt with %s into %s" % (extras.replace(",", ", "), folder))
    log = os.path.join(folder, "pip.log")
    errors = []
    with open(log, "w") as lines:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        for line in running.stdout:
            lines.write(line)
            packages += line.startswith("Collecting ")
            errors += [line.strip()] if line.startswith("ERROR: ") else []
            if sys.stderr.isatty():
                told = "%3.0f s, %d packages: %s" % (time.time() - begun, packages, line.strip())
                sys.stderr.write("\r\x1b[K" + told[: os.get_terminal_size(2).columns - 1])
                sys.stderr.flush()
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    if running.wait():
        why = errors[0] if errors else "pip failed"
        return failed(
            "%s. All it said: %s. Without a network, give pip one: PIP_INDEX_URL, PIP_FIND_LINKS" % (why, log)
        )
    with open(stamp, "w"):
        say("%s is ready, after %.0f s" % (folder, time.time() - begun))
    return 0


def say(text):
    """Tell a line."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def failed(text):
    """Tell what is wrong."""
    say("error: " + text)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        say("\ninterrupted; the same command goes on")
        sys.exit(130)
