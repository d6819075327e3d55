"""The options that commands share, and what they stand for: a loaded pipeline, a prompt, a pruning."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hawk_trt.bundle import Bundle
from hawk_trt.engine_folder import EngineFolder
from hawk_trt.errors import InvalidInput
from hawk_trt.pruning.head_weights import read_head_weights
from hawk_trt.request import QUERIES, QUOTAS, SELECTORS, PruningConfig
from hawk_trt.runtime.backends import BACKENDS, backend_for
from hawk_trt.stages import TARGETS

if TYPE_CHECKING:
    from hawk_trt import Pipeline
    from hawk_trt.request import Message

Subparsers = argparse._SubParsersAction  # argparse has no public name for it


def add_command(subparsers: "Subparsers[argparse.ArgumentParser]", name: str, summary: str) -> argparse.ArgumentParser:
    """Add a command's parser, with its summary as description."""
    return subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)


def add_pipeline_options(parser: argparse.ArgumentParser) -> None:
    """Add what open_pipeline reads."""
    parser.add_argument("bundle", type=Path, help="folder that an export wrote, or with engines built from it")
    group = parser.add_argument_group("where it runs")
    group.add_argument(
        "--backend", choices=BACKENDS, help="what runs it (default: tensorrt for engines, else onnxruntime)"
    )
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda for engines, else cpu)")
    group.add_argument("--target", choices=TARGETS, help="which graphs of the bundle (default: the best that run)")
    group.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: one a core)")
    group.add_argument("--verify", action="store_true", help="check the weight files by hash before loading them")


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add what prompt_text and messages read."""
    group = parser.add_argument_group("prompt")
    group.add_argument("--image", action="append", default=[], help="an image before the prompt; repeatable")
    group.add_argument("--video", action="append", default=[], help="a video before the prompt; repeatable")
    group.add_argument("--fps", type=float, help="frames a second taken from a video (default: the model's, mostly 2)")
    group.add_argument("--max-frames", type=int, metavar="N", help="most frames taken from a video (default: 768)")
    group.add_argument("--prompt", required=True, help="the question, or - to read it from stdin")
    group.add_argument("--system", help="a system message (default: the chat template's own, if it has one)")
    group.add_argument("--min-pixels", type=int, help="enlarge smaller images to this area (default: the checkpoint's)")
    group.add_argument("--max-pixels", type=int, help="shrink larger images to this area (default: the checkpoint's)")
    group.add_argument(
        "--max-new-tokens", type=int, default=128, help="longest answer, in tokens (default: %(default)s)"
    )


def add_pruning_options(group: "argparse._ArgumentGroup") -> None:
    """Add what pruning reads, but for the keep ratio."""
    group.add_argument(
        "--query",
        choices=QUERIES,
        help="text that scores the visual tokens: paper, what follows the last image; turn, all of the last user turn "
        "(default: paper, and turn where no text follows the image)",
    )
    group.add_argument(
        "--quota",
        choices=QUOTAS,
        default="global",
        help="one selection over all images, one for each, or one for each frame (default: %(default)s)",
    )
    group.add_argument("--min-visual-tokens", type=int, default=1, help="keep at least so many (default: %(default)s)")
    group.add_argument(
        "--head-weights", type=Path, metavar="FILE", help="JSON, one weight a query head (default: the bundle's)"
    )


def add_selector_options(group: "argparse._ArgumentGroup") -> None:
    """Add what selected_pruning reads besides."""
    group.add_argument(
        "--selector", choices=SELECTORS, default="hawk", help="who chooses the kept tokens (default: %(default)s)"
    )
    group.add_argument(
        "--selector-seed", type=int, default=0, metavar="N", help="of --selector random (default: %(default)s)"
    )
    add_score_options(group)


def add_score_options(group: "argparse._ArgumentGroup") -> None:
    """Add the options of selectors that rank by scores."""
    group.add_argument(
        "--keep-mass",
        type=float,
        metavar="P",
        help="keep the fewest tokens that carry this share of the score mass, at most the keep ratio (default: off)",
    )
    group.add_argument(
        "--diversity",
        type=float,
        default=0.0,
        metavar="P",
        help="share of the kept tokens chosen among near-ties for being unlike the others (default: %(default)s)",
    )


def numbers(text: str) -> list[float]:
    """Numbers with commas between them, as an argparse type."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers with commas between them") from None


def open_pipeline(args: argparse.Namespace, vision_cache_mb: float = 0) -> "Pipeline":
    """Load the bundle that the options name.

    Args:
        args: of the command.
        vision_cache_mb: for a command that may be asked twice about an image, unlike most.

    Raises:
        HawkError: it cannot be loaded as asked for.
    """
    from hawk_trt import Pipeline  # loading graphs and a tokenizer is only for those who run them

    if args.verify:
        from hawk_trt.apps.cli.verification import verify

        verify(args.bundle)
    backend = args.backend or backend_for(args.bundle)
    return Pipeline.load(
        args.bundle,
        backend=backend,
        device=args.device,
        target=args.target,
        vision_cache_mb=vision_cache_mb,
        threads=args.threads,
    )


def load_bundle(folder: Path) -> Bundle:
    """The bundle of a folder, or the one inside an engine folder, whose graphs are plans.

    Raises:
        BundleError: neither is there, or it is damaged.
    """
    return EngineFolder.load(folder).bundle if backend_for(folder) == "tensorrt" else Bundle.load(folder)


def prompt_text(args: argparse.Namespace) -> str:
    """The prompt, from the options or from stdin.

    Raises:
        InvalidInput: it is empty, or not UTF-8.
    """
    try:
        text: str = sys.stdin.read().strip() if args.prompt == "-" else args.prompt
    except UnicodeDecodeError as error:
        raise InvalidInput(f"--prompt -: stdin is not {error.encoding} text ({error.reason})") from error
    if not text.strip():
        raise InvalidInput("--prompt: got an empty text, expected a question")
    return text


def messages(args: argparse.Namespace, text: str) -> "str | Sequence[Message]":
    """The prompt as the pipeline takes it: the text alone, or chat messages where it has to say more.

    Raises:
        InvalidInput: sampling of a video that is out of its range, or without a video.
    """
    for name, value, least in (("--fps", args.fps, 0), ("--max-frames", args.max_frames, 1)):
        if value is not None and not value > least:
            raise InvalidInput(f"{name}: got {value:g}, expected {'above 0' if not least else 'at least 2'}")
        if value is not None and not args.video:
            raise InvalidInput(f"{name}: got it without a --video to take frames from; leave it out")
    sampling = {"fps": args.fps, "max_frames": args.max_frames}
    if args.system is None and all(value is None for value in sampling.values()):
        return text
    content: list[dict[str, object]] = [{"type": "image"} for _ in args.image]
    content += [{"type": "video", **sampling} for _ in args.video]
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def pruning(args: argparse.Namespace, keep_ratio: float) -> PruningConfig:
    """The pruning that the options ask for, at a keep ratio.

    Raises:
        InvalidInput: a value out of its range.
    """
    return PruningConfig(
        keep_ratio=keep_ratio,
        head_weights=None if args.head_weights is None else read_head_weights(args.head_weights).values,
        min_visual_tokens=args.min_visual_tokens,
        query=args.query,
        quota=args.quota,
    )


def selected_pruning(args: argparse.Namespace, keep_ratio: float) -> PruningConfig:
    """The pruning that the options ask for, with its selector.

    Raises:
        InvalidInput: a value out of its range, or one that does not go with the selector.
    """
    return replace(
        pruning(args, keep_ratio),
        selector=args.selector,
        seed=args.selector_seed,
        keep_mass=args.keep_mass,
        diversity=args.diversity,
    )
