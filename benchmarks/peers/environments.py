"""The virtual environments of the peers, below artifacts/peers: `make peers`.

In: benchmarks/peers/*.txt, requirements with the versions that were measured. Out: one environment each; what is
already there is brought up to them. Standard library only.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

PLACE = Path("artifacts/peers")
NAMES = ("hawk_trt", "transformers", "openvino", "onnxruntime-genai")
# Installed after the rest and without what it asks for: torchvision, which is not used here.
_ALONE = {"openvino": "optimum-intel==2.2.0"}


def main() -> int:
    """Make them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PLACE, help="(default: %(default)s)")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(NAMES)} (default: all)")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(NAMES)):
        parser.error(f"got {unknown[0]!r}, expected some of {', '.join(NAMES)}")
    for name in args.names or NAMES:
        environment = args.out / name
        print(f"{environment}", file=sys.stderr)
        if not (environment / "bin" / "python").is_file():
            venv.create(environment, with_pip=True)
        install = [environment / "bin" / "python", "-m", "pip", "install", "-q"]
        commands = [[*install, "-r", str(Path(__file__).with_name(f"{name}.txt"))]]
        if name in _ALONE:
            commands.append([*install, "--no-deps", _ALONE[name]])
        for command in commands:
            if subprocess.run(command, cwd=Path(__file__).parent.parent.parent).returncode != 0:
                print(f"{name}: not installed, see above; its rows will say so", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
