"""The options that the engine builder and the preflight share."""

import argparse
from pathlib import Path

from hawk_trt.bundle import Manifest
from hawk_trt.engine_folder import Limits
from hawk_trt.errors import InvalidInput

from .profiles import DEFAULT_TEXT_TOKENS, DEFAULT_VISUAL_TOKENS, TOPK_LIMIT, plan_limits


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add what limits() reads."""
    group = parser.add_argument_group("the largest request")
    group.add_argument(
        "--max-visual-tokens",
        type=int,
        metavar="N",
        help=f"of a prompt, before pruning (default: {DEFAULT_VISUAL_TOKENS})",
    )
    group.add_argument(
        "--max-prompt-tokens",
        type=int,
        metavar="N",
        help=f"text and visual, before pruning (default: {DEFAULT_TEXT_TOKENS} more than the visual ones)",
    )
    group.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help=f"tokens kept and generated: the KV cache's length (default: {TOPK_LIMIT}, or the model's if shorter)",
    )
    group.add_argument("--batch", type=int, default=1, metavar="N", help="prompts side by side (default: %(default)s)")


def limits(args: argparse.Namespace, manifest: Manifest, *, plugin: bool) -> Limits:
    """The limits that the options ask for.

    Raises:
        InvalidInput: they contradict each other, the model or TensorRT.
    """
    return plan_limits(
        manifest,
        visual_tokens=args.max_visual_tokens,
        prompt_tokens=args.max_prompt_tokens,
        context=args.max_context,
        batch=args.batch,
        plugin=plugin,
    )


def existing_file(path: Path, flag: str) -> Path:
    """The absolute path of a file that must be there.

    Raises:
        InvalidInput: it is not.
    """
    if not path.is_file():
        raise InvalidInput(f"{flag}: {path} is not there")
    return path.resolve()
