"""`hawk-trt run`: one prompt in, its answer on stdout, and what pruning and time it took on stderr."""

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

from hawk_trt.apps.cli import options
from hawk_trt.apps.cli.drawing import draw
from hawk_trt.apps.cli.output import note, print_json
from hawk_trt.apps.explain.explanation import explain
from hawk_trt.request import Result, SamplingConfig, Timings

SUMMARY = "answer a prompt about images and videos, with few of their tokens"


def add_parser(subparsers: "options.Subparsers[argparse.ArgumentParser]") -> None:
    """Add the command's options."""
    parser = options.add_command(subparsers, "run", SUMMARY)
    options.add_pipeline_options(parser)
    options.add_prompt_options(parser)
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--keep-ratio", type=float, help="share of visual tokens kept, in (0, 1] (default: the bundle's)"
    )
    options.add_pruning_options(group)
    options.add_selector_options(group)
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    group.add_argument(
        "--top-p", type=float, default=1.0, help="fewest tokens of this probability (default: %(default)s)"
    )
    group.add_argument("--top-k", type=int, default=0, help="most probable tokens, 0 for all (default: %(default)s)")
    group.add_argument("--seed", type=int, help="of the draw (default: another each time)")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer there; repeatable")
    group = parser.add_argument_group("output")
    group.add_argument("--no-stream", action="store_true", help="print the answer when it is whole")
    group.add_argument("--picture", type=Path, metavar="PNG", help="draw the kept tokens")
    group.add_argument("--json", action="store_true", help="print the whole result as JSON")


def run(args: argparse.Namespace) -> int:
    """Answer the prompt.

    Raises:
        HawkError: anything that cannot be used or done as asked for.
    """
    # All that can be refused without the model is refused before it is loaded.
    sampling = SamplingConfig(args.temperature, args.top_p, args.top_k, args.seed)
    pruning = options.selected_pruning(args, 1.0 if args.keep_ratio is None else args.keep_ratio)
    text = options.prompt_text(args)
    pipe = options.open_pipeline(args)
    if args.keep_ratio is None:
        pruning = replace(pruning, keep_ratio=pipe.bundle.manifest.keep_ratio)
    prompt = options.messages(args, text)
    stream = pipe.stream(
        prompt,
        images=args.image,
        videos=args.video,
        pruning=pruning,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        stop=args.stop,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
    )
    live = sys.stdout.isatty() and not (args.no_stream or args.json)
    line_begun = False
    try:
        for piece in stream:
            if live:
                print(piece, end="", flush=True)
                line_begun = True
    finally:
        if line_begun:
            print()
    result = stream.result
    picture = args.picture if result.num_visual else None
    if args.json:
        shown = {"keep_ratio": pruning.keep_ratio, "picture": None if picture is None else str(picture)}
        print_json(replace(result, logits=None), shown)
    elif not live:
        print(result.text, flush=True)
    if picture is not None:  # after the answer, which a picture that cannot be written must not cost
        inputs = pipe.prepare(
            prompt, images=args.image, videos=args.video, min_pixels=args.min_pixels, max_pixels=args.max_pixels
        )
        merge = pipe.bundle.manifest.vision.spatial_merge_size
        explained = explain(text, pipe.layout(inputs), [(pruning.keep_ratio, result)], merge, args.selector)
        draw(picture, explained, args, pipe)
    _summarise(args, result)
    return 0


def _summarise(args: argparse.Namespace, result: Result) -> None:
    """The note after an answer: visual tokens kept, time by stage, and where the picture is."""
    if result.num_visual:
        share = 100.0 * result.num_kept / result.num_visual
        note(f"visual tokens  {result.num_kept} kept of {result.num_visual} ({share:.1f} %)")
    else:
        note("visual tokens  none in this prompt, so nothing was pruned")
    stages = [(field.name, 1000.0 * getattr(result.timings, field.name)) for field in fields(Timings)]
    note("time in ms     " + ", ".join(f"{name} {latency_ms:.1f}" for name, latency_ms in stages))
    tokens = len(result.token_ids)
    end = "stopped at --max-new-tokens" if result.finish_reason == "length" else "ended by itself"
    note(f"answer         {tokens} token{'s' * (tokens != 1)}, {end}")
    if args.picture is not None:
        note(f"picture        {args.picture if result.num_visual else 'not drawn: there are no visual tokens'}")
