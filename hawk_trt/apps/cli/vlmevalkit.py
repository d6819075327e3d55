"""VLMEvalKit's benchmarks on a bundle or on engines, from the command line.

    python -m hawk_trt.apps.cli.vlmevalkit BUNDLE --vlmevalkit DIR --keep-ratio 0.2 -- --data MME TextVQA_VAL

DIR is a clone of VLMEvalKit. What stands behind -- goes to its run.py.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hawk_trt.apps.cli import options
from hawk_trt.apps.harness.answering import Answering
from hawk_trt.apps.harness.vlmevalkit import model_class, run
from hawk_trt.errors import HawkError


def main(arguments: Sequence[str] | None = None) -> int:
    """Load the bundle, and run VLMEvalKit's run.py on it; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = given.index("--") if "--" in given else len(given)
    args = _parser().parse_args(given[:own])
    try:
        made = model_class(args.vlmevalkit)
        with options.open_pipeline(args) as pipe:
            pruning = options.selected_pruning(args, args.keep_ratio)
            answering = Answering(pipe, pruning, args.min_pixels, args.max_pixels)
            model = made(answering, args.max_new_tokens, args.system, args.fps, args.max_frames)
            run(args.vlmevalkit, args.name, model, given[own + 1 :])
            print(answering.summary(), file=sys.stderr)
    except HawkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hawk_trt.apps.cli.vlmevalkit",
        usage="%(prog)s BUNDLE --vlmevalkit DIR [options] -- --data MME [options of VLMEvalKit's run.py]",
        description="Run VLMEvalKit's benchmarks on a bundle or on engines.",
        allow_abbrev=False,
    )
    options.add_pipeline_options(parser)
    parser.add_argument("--vlmevalkit", type=Path, required=True, metavar="DIR", help="a clone of VLMEvalKit")
    parser.add_argument("--name", default="hawk-trt", help="of the model in its results (default: %(default)s)")
    group = parser.add_argument_group("pruning")
    group.add_argument("--keep-ratio", type=float, default=0.2, help="share of visual tokens (default: %(default)s)")
    options.add_pruning_options(group)
    options.add_selector_options(group)
    group = parser.add_argument_group("prompt")
    group.add_argument("--system", help="a system message where the data set brings none")
    group.add_argument("--min-pixels", type=int, help="enlarge smaller images to this area (default: the checkpoint's)")
    group.add_argument("--max-pixels", type=int, help="shrink larger images to this area (default: the checkpoint's)")
    group.add_argument("--fps", type=float, help="frames a second of videos (default: the family's)")
    group.add_argument("--max-frames", type=int, metavar="N", help="most frames of a video (default: 768)")
    group.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
