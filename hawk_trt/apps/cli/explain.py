"""`hawk-trt explain`: one prompt answered at several keep ratios, drawn as a PNG and told as a table or JSON."""

import argparse
from pathlib import Path

from hawk_trt.apps.cli import options
from hawk_trt.apps.cli.drawing import draw
from hawk_trt.apps.cli.output import note, print_json
from hawk_trt.apps.explain.explanation import explain
from hawk_trt.errors import InvalidInput

SUMMARY = "draw which visual tokens are kept, and what is answered from them"


def add_parser(subparsers: "options.Subparsers[argparse.ArgumentParser]") -> None:
    """Add the command's options."""
    parser = options.add_command(subparsers, "explain", SUMMARY)
    options.add_pipeline_options(parser)
    options.add_prompt_options(parser)
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--keep-ratios",
        type=options.numbers,
        default="0.1,0.2,0.4",
        metavar="R,R,...",
        help="shares of visual tokens kept, each in (0, 1] (default: %(default)s)",
    )
    options.add_pruning_options(group)
    options.add_selector_options(group)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", type=Path, default=Path("explain.png"), metavar="PNG", help="the picture (default: %(default)s)"
    )
    group.add_argument("--json", action="store_true", help="print grids, scores, kept tokens and answers as JSON")


def run(args: argparse.Namespace) -> int:
    """Answer the prompt at each keep ratio and draw what was kept.

    Raises:
        HawkError: anything that cannot be used or done as asked for.
    """
    if not (args.image or args.video):
        raise InvalidInput("prompt: it has no image or video, so there is nothing to explain. Add --image or --video")
    prunings = [options.selected_pruning(args, keep_ratio) for keep_ratio in args.keep_ratios]
    text = options.prompt_text(args)
    pipe = options.open_pipeline(args)
    inputs = pipe.prepare(
        options.messages(args, text),
        images=args.image,
        videos=args.video,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
    )
    results = []
    for pruning in prunings:
        note(f"keep ratio {pruning.keep_ratio:g}")
        result = pipe.generate(inputs, pruning=pruning, max_new_tokens=args.max_new_tokens)
        results.append((pruning.keep_ratio, result))
    merge = pipe.bundle.manifest.vision.spatial_merge_size
    explained = explain(text, pipe.layout(inputs), results, merge, args.selector)
    if args.json:
        print_json(explained, {"picture": str(args.out)})
    else:
        print("keep ratio  kept            answer")
        for selection in explained.selections:
            kept = f"{selection.num_kept} of {explained.num_visual}"
            print(f"{selection.keep_ratio:<10g}  {kept:<14}  {' '.join((selection.answer or '').split())}")
    draw(args.out, explained, args, pipe)
    note(f"picture: {args.out}")
    return 0
