"""VLMEvalKit's benchmarks on a bundle or on engines, from the command line.

    python -m hawk_trt.apps.cli.vlmevalkit BUNDLE --keep-ratio 0.2 -- --data MME TextVQA_VAL

VLMEvalKit is the installed package, or a clone that is the current folder. What stands behind -- goes to its run.py.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hawk_trt.apps.cli.main import make_app, run_app
from hawk_trt.apps.cli.options import OUTPUT, PROMPT, MaxNewTokens, Model, Pixels, Pruning, Where
from hawk_trt.apps.cli.output import note
from hawk_trt.apps.harness.answering import Answering, device_of_rank
from hawk_trt.apps.harness.vlmevalkit import model_class
from hawk_trt.apps.harness.vlmevalkit import run as run_harness


def main(arguments: Sequence[str] | None = None) -> int:
    """Load the bundle, and run VLMEvalKit's run.py on it; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = given.index("--") if "--" in given else len(given)

    def run(
        model: Model,
        where: Where = Where(),
        pruning: Pruning = Pruning(),
        pixels: Pixels = Pixels(),
        *,
        name: str = "hawk-trt",
        keep_ratio: Annotated[float, Parameter(alias="--keep-ratios")] = 0.2,
        system: Annotated[str | None, Parameter(group=PROMPT)] = None,
        fps: Annotated[float | None, Parameter(group=PROMPT)] = None,
        max_frames: Annotated[int | None, Parameter(group=PROMPT)] = None,
        total_pixels: Annotated[int | None, Parameter(group=PROMPT)] = None,
        max_new_tokens: Annotated[MaxNewTokens, Parameter(group=PROMPT)] = 2048,
        trace: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    ) -> int:
        """Run VLMEvalKit's benchmarks on a bundle or on engines; what stands behind -- goes to its run.py.

        Args:
            name: of the model in its results
            keep_ratio: share of visual tokens kept
            system: a system message where the data set brings none
            fps: frames a second of videos, where the data set names neither them nor a number of frames (default: 2)
            max_frames: most frames of a video that is sampled by fps (default: 768)
            total_pixels: shrink the frames of a video until all together have this area
            max_new_tokens: longest answer
            trace: JSONL file, a line for each question: its hash, visual tokens and those kept, the answer
        """
        made = model_class()
        with replace(where, device=device_of_rank(where.device, model)).open(model) as pipe:
            sizes = (pixels.min_pixels, pixels.max_pixels)
            answering = Answering(pipe, pruning.config(keep_ratio), *sizes, trace, system)
            of_videos = {"max_frames": max_frames, "total_pixels": total_pixels, **asdict(pixels)}
            harness = made(answering, max_new_tokens, fps=fps, **of_videos)
            run_harness(name, harness, given[own + 1 :])
            note(answering.summary())
        return 0

    return run_app(make_app("python -m hawk_trt.apps.cli.vlmevalkit", command=run), given[:own])


if __name__ == "__main__":
    sys.exit(main())
