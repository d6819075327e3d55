"""The command python -m benchmarks.gpu_report: everything that only a GPU can tell, phase by phase, into one JSON.

In: a Python with PyTorch for CUDA and the packages of hawk_trt and its export; onnxruntime-gpu for the phases of ONNX
Runtime, nvcc and cmake where `make plugin` was not run, tensorrt for the last phase. Out: a JSON file, rewritten whole
after each phase, and a Markdown table of it. Each phase is a process of its own with its own time limit: one that
fails, crashes or hangs says why, and the next runs. Running again adds to the same file.

--rehearse runs every phase without a GPU: the kernel as fibers of a CPU thread, the driver and TensorRT as stand-ins,
ONNX Runtime's CUDA provider over stub libraries. So a first run on a GPU tests the GPU and not this script.
--pack and --unpack carry wheels to a machine without a network.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks.gpu_report import wheels
from benchmarks.gpu_report.phases import PHASES, SHAPES, SIDE


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 nothing failed, 1 something did, 2 wrong usage."""
    args = _parser().parse_args(arguments)
    if args.pack is not None:
        return wheels.pack(args.pack, args.requirements or wheels.REQUIREMENTS, args.python, args.part_mb)
    if args.unpack is not None:
        return wheels.unpack(args.unpack, args.site)
    # behind --unpack, which brings packages that these need
    from benchmarks.gpu_report.record import FAILED, Setting
    from benchmarks.gpu_report.runner import run_all, run_phase
    from benchmarks.gpu_report.table import markdown

    if args.table is not None:
        print(markdown(json.loads(args.table.read_text(encoding="utf-8"))))
        return 0
    setting = Setting(args.work.resolve(), args.seconds, args.rehearse, args.shape, args.side)
    if args.phase is not None:
        failed = run_phase(args.phase, setting)["status"] == FAILED
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(failed))  # the stub CUDA libraries do not survive ONNX Runtime's own clean-up
    return run_all(args.phases, setting, args.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report",
        description="Check and measure on this GPU, phase by phase, into one JSON file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--phases", nargs="+", choices=PHASES, default=[*PHASES], metavar="PHASE", help=f"of {', '.join(PHASES)}"
    )
    parser.add_argument("--seconds", type=float, default=5400, help="for all phases together")
    parser.add_argument("--out", type=Path, default=Path("artifacts/gpu-report/report.json"), help="the JSON file")
    parser.add_argument("--work", type=Path, default=Path("artifacts/gpu-report"), help="folder for bundles and logs")
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[0], help="of the random weights")
    parser.add_argument("--side", type=int, default=SIDE, help="pixels of their image, a multiple of 28")
    parser.add_argument(
        "--rehearse",
        nargs="?",
        const="stubs",
        choices=("stubs", "cpu"),
        help="without a GPU; cpu: also without the onnxruntime-gpu wheel, and small",
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the report in FILE as Markdown")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="fetch wheels and pack them into parts in DIR")
    parser.add_argument("--requirements", nargs="+", metavar="NAME==VERSION", help="to pack, without their own needs")
    parser.add_argument("--python", default="3.12", help="version of the Python to pack for")
    parser.add_argument("--part-mb", type=int, default=48, help="most megabytes of a part")
    parser.add_argument("--unpack", type=Path, metavar="DIR", help="install what --pack wrote and is missing here")
    parser.add_argument("--site", type=Path, default=Path("/tmp/site"), help="folder to install into, for PYTHONPATH")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)  # the process of one phase
    return parser


if __name__ == "__main__":
    sys.exit(main())
