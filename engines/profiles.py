"""Optimization profiles: what the engines must take, from the manifest and the flags, as min, opt and max per input.

In: limits, the manifest, the inputs of a prepared graph. Out: one profile for prefill and one for decode (vision:
one), and an early refusal of what TensorRT would only warn of at build and fail at when run.

A vision engine has a profile for one frame of the largest size, and one for several that together are no larger: of
one profile for both, frames and patches, TensorRT would plan memory for the largest of both at once. Tiles need one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cyclopts import Group, Parameter

from hawk_trt.bundle import Manifest, TensorEntry
from hawk_trt.engine_folder import InputRange, Limits
from hawk_trt.errors import InvalidInput
from hawk_trt.models.vision_config import InternVLVision, Qwen25Vision, VisionConfig
from hawk_trt.runtime.versions import OPSET_24_TENSORRT, at_least
from hawk_trt.stages import CONTEXT_LEN, MAX_LINEAR_TOKENS, PORTABLE, TENSORRT, VISION

# The targets that it runs.
TENSORRT_TARGETS = (TENSORRT, PORTABLE)
# TensorRT's TopK takes no more in any version; beyond, it warns at build and fails when run.
TOPK_LIMIT = 3840
DEFAULT_VISUAL_TOKENS = 4096
# Where the GPU shares the machine's memory, as on a Jetson.
DEFAULT_VISUAL_TOKENS_SHARED = 2048
DEFAULT_CONTEXT_SHARED = 2048
DEFAULT_TEXT_TOKENS = 1024
# Of a vision call: an InternVL image's tiles with its thumbnail, and frames of up to a quarter of the visual tokens.
DEFAULT_TILES = 13
DEFAULT_FRAMES = 4
# What the builder tunes for: an image of 1008 x 1008 pixels, the paper's fixed resolution, and some text.
TYPICAL_VISUAL_TOKENS = 1296
_TYPICAL_TEXT_TOKENS = 128
_TYPICAL_ANSWER_TOKENS = 128
# Processors refuse an image whose one side is more than 200 times the other; rounding to blocks can add half of that.
_MAX_ASPECT_RATIO = 300


class Range(NamedTuple):
    """Smallest, tuned-for and largest size of a dimension."""

    low: int
    opt: int
    high: int


@Parameter(name="*", group=Group("The largest request", sort_key=2))
@dataclass(frozen=True, kw_only=True)
class LargestRequest:
    """What the engines must be able to take: options of a command line.

    Attributes:
        max_visual_tokens: of a prompt, before pruning (default: 4096; 2048 on a GPU that shares the machine's memory)
        max_prompt_tokens: text and visual, before pruning (default: 1024 more than the visual ones)
        max_context: tokens kept and generated: the KV cache's length (default: 3840, or the model's if shorter; 2048 on
            a GPU that shares the machine's memory)
        batch: prompts side by side
        vision_batch: frames of one size in a vision call, each at most that share of the visual tokens (default: 4), or
            tiles (default: 13)
    """

    max_visual_tokens: int | None = None
    max_prompt_tokens: int | None = None
    max_context: int | None = None
    batch: int = 1
    vision_batch: int | None = None

    def limits(self, manifest: Manifest, *, plugin: bool, shared_memory: bool = False) -> Limits:
        """Fill in what was not asked for, and refuse what cannot be; plugin: whether the top-k one is used.

        The defaults are smaller with shared_memory, where the GPU shares the machine's.
        """
        longest = manifest.language.max_position_embeddings
        default_visual = DEFAULT_VISUAL_TOKENS_SHARED if shared_memory else DEFAULT_VISUAL_TOKENS
        default_context = DEFAULT_CONTEXT_SHARED if shared_memory else TOPK_LIMIT
        visual = default_visual if self.max_visual_tokens is None else self.max_visual_tokens
        prompt = visual + DEFAULT_TEXT_TOKENS if self.max_prompt_tokens is None else self.max_prompt_tokens
        context = min(longest, default_context) if self.max_context is None else self.max_context
        default_batch = DEFAULT_TILES if isinstance(manifest.vision, InternVLVision) else DEFAULT_FRAMES
        vision_batch = default_batch if self.vision_batch is None else self.vision_batch
        for flag, value, least in (
            ("--max-visual-tokens", visual, 1),
            ("--max-prompt-tokens", prompt, visual + 1),
            ("--max-context", context, 2),
            ("--batch", self.batch, 1),
            ("--vision-batch", vision_batch, 1),
        ):
            if value < least:
                because = " (the visual tokens and some text)" if flag == "--max-prompt-tokens" else ""
                raise InvalidInput(f"{flag}: got {value}, expected at least {least}{because}")
        if context > longest:
            raise InvalidInput(f"--max-context: got {context}, expected at most {longest}, the model's own context")
        if manifest.language.linear is not None and prompt > MAX_LINEAR_TOKENS:
            raise InvalidInput(
                f"--max-prompt-tokens: got {prompt}, expected at most {MAX_LINEAR_TOKENS}, which the graphs of linear "
                "layers take"
            )
        limits = Limits(visual, prompt, context, self.batch, vision_batch)
        if limits.kept_tokens > TOPK_LIMIT and not plugin:
            raise InvalidInput(
                f"--max-context: got {context} with prompts of up to {prompt} tokens, so that up to "
                f"{limits.kept_tokens} tokens may be kept, and TensorRT's TopK takes {TOPK_LIMIT}: it builds with more "
                "and fails when run. Build the plugin, which has no such limit (make plugin, then --plugin PATH), or "
                f"give --max-context {TOPK_LIMIT}"
            )
        return limits


def choose_target(manifest: Manifest, version: str, asked: str | None = None) -> str:
    """The target to build: the one asked for, else tensorrt from TensorRT 10.15 on and portable below.

    Refuses one that the bundle does not hold, or that TensorRT does not run.
    """
    weights = manifest.weights
    if weights is not None and weights.bits == 8 and weights.block_size:
        raise InvalidInput(
            f"weights: got int8 in blocks of {weights.block_size}, for which TensorRT documents 4-bit integers alone. "
            "Export again with --dtype int8 --block-size 0 (a scale a row), with --dtype int4, or with float weights"
        )
    too_old = not at_least(version, OPSET_24_TENSORRT)
    target = asked or (PORTABLE if too_old or TENSORRT not in manifest.targets else TENSORRT)
    if target == TENSORRT and too_old:
        raise InvalidInput(
            f"--target: got tensorrt with TensorRT {version}, whose KV cache ops begin with {OPSET_24_TENSORRT}. "
            "Use --target portable"
        )
    if target not in manifest.targets:
        raise InvalidInput(
            f"--target: this bundle holds {', '.join(manifest.targets)}, TensorRT {version} needs {target}. "
            f"Export again with --target {target}"
        )
    return target


def plan_profiles(
    manifest: Manifest, stage: str, inputs: Sequence[TensorEntry], limits: Limits
) -> tuple[tuple[InputRange, ...], ...]:
    """The optimization profiles of a prepared graph: prefill and decode, or vision's for one frame and for several."""
    if stage == VISION:
        ranges = vision_ranges(manifest.vision, limits.visual_tokens, limits.vision_batch)
    else:
        ranges = _language_ranges(manifest, limits)
    return tuple(tuple(_input_range(tensor, words) for tensor in inputs) for words in ranges)


def _language_ranges(manifest: Manifest, limits: Limits) -> list[dict[str, Range]]:
    """Ranges of a prefill and of a decode step."""
    visual = min(limits.visual_tokens, TYPICAL_VISUAL_TOKENS)
    prompt = min(limits.prompt_tokens, visual + _TYPICAL_TEXT_TOKENS)
    # of a typical prompt the bundle's share of its image is kept, and its text
    typical = min(math.ceil(visual * manifest.keep_ratio) + _TYPICAL_TEXT_TOKENS, limits.kept_tokens)
    kept, answered = min(typical, prompt), min(typical + _TYPICAL_ANSWER_TOKENS, limits.context)
    prefill = {
        "batch": Range(1, limits.batch, limits.batch),
        "seq_len": Range(1, prompt, limits.prompt_tokens),
        "num_text": Range(1, (prompt - visual) * limits.batch, limits.prompt_tokens * limits.batch),
        "num_visual": Range(1, visual * limits.batch, limits.visual_tokens * limits.batch),
        "num_kept_total": Range(1, kept, limits.kept_tokens),
        "past_len": Range(0, 0, 0),
        CONTEXT_LEN: Range(1, kept, limits.context),
    }
    decode = {
        "batch": Range(1, limits.batch, limits.batch),
        "seq_len": Range(1, 1, 1),
        "num_text": Range(1, limits.batch, limits.batch),
        "num_visual": Range(1, 1, 1),
        "num_kept_total": Range(1, 1, 1),
        "past_len": Range(1, limits.context, limits.context),
        CONTEXT_LEN: Range(1, answered, limits.context),
    }
    return [prefill, decode]


def _input_range(tensor: TensorEntry, ranges: dict[str, Range]) -> InputRange:
    unknown = [size for size in tensor.shape if isinstance(size, str) and size not in ranges]
    if unknown:
        raise InvalidInput(
            f"{tensor.name}: dimension {unknown[0]!r} has no range: this version cannot build engines for this family"
        )
    sizes = [Range(size, size, size) if isinstance(size, int) else ranges[size] for size in tensor.shape]
    low, opt, high = (tuple(size[column] for size in sizes) for column in range(3))
    return InputRange(tensor.name, low, opt, high)


def vision_ranges(vision: VisionConfig, visual_tokens: int, vision_batch: int) -> list[dict[str, Range]]:
    """Ranges of the vision dimensions of all families, by their word, for each optimization profile.

    A token is a block of merge x merge patches; a window is side x side blocks. vision_batch counts frames of one size
    in a call, which together are no larger than the largest image's visual_tokens; or tiles.
    """
    if isinstance(vision, InternVLVision):
        tiles = max(1, min(vision_batch, visual_tokens // vision.tile_tokens))
        return [{"num_tiles": Range(1, tiles, tiles)}]
    calls = [(1, visual_tokens)]  # up to so many frames of up to so many tokens each
    if vision_batch > 1 and visual_tokens >= vision_batch:
        calls.append((vision_batch, visual_tokens // vision_batch))
    profiles, patches = [], vision.spatial_merge_size**2
    for frames, tokens in calls:
        square = math.isqrt(min(tokens, TYPICAL_VISUAL_TOKENS))
        ranges = {
            "num_frames": Range(1, frames, frames),
            "num_patches": Range(patches, square**2 * patches, tokens * patches),
        }
        if isinstance(vision, Qwen25Vision):
            side = vision.window_side
            ranges["num_windows"] = Range(1, math.ceil(square / side) ** 2, _most_windows(tokens, side))
            ranges["window_len"] = Range(patches, min(square, side) ** 2 * patches, side**2 * patches)
        profiles.append(ranges)
    return profiles


def _most_windows(blocks: int, side: int) -> int:
    """Windows of the frame of at most so many blocks that has the most: a long one, with windows cut at its edge."""
    shapes = ((high, min(blocks // high, high * _MAX_ASPECT_RATIO)) for high in range(1, math.isqrt(blocks) + 1))
    return max(math.ceil(high / side) * math.ceil(wide / side) for high, wide in shapes)
