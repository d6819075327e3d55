"""What a caller asks and what comes back: Request, ModelInputs, PruningConfig, SamplingConfig; Result, Timings.

All are values: frozen, the two configs checked at construction and compared by content. Those that hold arrays are not.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import InvalidInput

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

    ImageInput: TypeAlias = str | PathLike[str] | bytes | PillowImage | npt.NDArray[np.uint8]
    VideoInput: TypeAlias = str | PathLike[str] | npt.NDArray[np.uint8] | Sequence[ImageInput]
    Message: TypeAlias = Mapping[str, Any]
    Prompt: TypeAlias = "str | Sequence[Message] | ModelInputs"


Selector: TypeAlias = Callable[[Any, int], npt.NDArray[np.int64]]
"""Chooses k of some pruning.selectors.Candidates: int64 [k], each in [0, n), without repetition, in any order."""
SELECTORS = ("hawk", "uniform", "fastv-input", "random", "divprune", "cdpruner", "dart", "norm")
SCORED = ("hawk", "uniform", "fastv-input")
"""Selectors that rank by HAWK's scores: the graph can carry them out by itself."""
EQUAL_HEADS = ("uniform", "fastv-input")
"""Selectors that take no head weights."""
READ_TEXT = ("cdpruner", "dart")
"""Selectors that compare embeddings of the query's tokens; a last token alone says nothing to them."""
QUERIES = ("paper", "turn", "last")
QUOTAS = ("global", "per-image", "per-frame")
_LARGEST_WEIGHT = 1e30  # scores are sums of weights in float32, and must stay far below the 3e38 that keeps text tokens
_SMALLEST_WEIGHT = 1e-30  # below, float32 or a GPU makes scores of 0
# Least, most, and whether the least itself is refused.
_RANGES = {
    "keep_ratio": (0.0, 1.0, True),
    "keep_mass": (0.0, 1.0, True),
    "diversity": (0.0, 1.0, False),
    "temperature": (0.0, math.inf, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "repetition_penalty": (0.01, 100.0, False),  # float32 holds the logits
    "presence_penalty": (-2.0, 2.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
}
_LEAST_INTEGERS = {
    **{"min_visual_tokens": 1, "max_new_tokens": 1, "min_pixels": 1, "max_pixels": 1},
    **{"seed": 0, "top_k": 0, "logprobs": 0},
}


@dataclass(frozen=True, slots=True)
class PruningConfig:
    """How visual tokens are scored and how many are kept; InvalidInput where a value cannot be used.

    Attributes:
        keep_ratio: share of visual tokens kept, in (0, 1]; 1.0 prunes nothing.
        head_weights: importance of each query head of layer 0, used as given, never
            rescaled; None takes the bundle's.
        selector: who chooses the kept tokens: one of SELECTORS, or a function of Candidates and k.
        min_visual_tokens: at least so many are kept (or all, where there are fewer).
        query: "paper", the text after the last image up to the end of its turn, "turn", every text token of
            the last user turn, "last", the last token of the prompt, whatever it is (mostly one of the chat
            template, after which the answer begins), or None: "paper", and where that holds no text, since the
            image follows the question, the last user turn that has text.
        quota: "global", one selection over all visual tokens; "per-image", one for each image or
            video; or "per-frame", one for each image and each frame of a video.
        keep_mass: keep the fewest tokens that carry this share of the score mass, in (0, 1], and no
            more than keep_ratio allows; None keeps as many as keep_ratio says.
        diversity: share of the kept tokens, in [0, 1], that are chosen among near-ties for being
            unlike the others.
        seed: of selector "random", at least 0.
    """

    keep_ratio: float = 0.2
    head_weights: tuple[float, ...] | None = None
    selector: str | Selector = "hawk"
    min_visual_tokens: int = 1
    query: str | None = None
    quota: str = "global"
    keep_mass: float | None = None
    diversity: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_numbers(self)
        for name, value, allowed in (
            ("selector", self.selector, SELECTORS),
            ("query", QUERIES[0] if self.query is None else self.query, QUERIES),
            ("quota", self.quota, QUOTAS),
        ):
            own = name == "selector" and callable(value)
            if not own and not (isinstance(value, str) and value in allowed):
                raise InvalidInput(f"{name}: got {value!r}, expected one of {', '.join(allowed)}")
        if self.head_weights is not None:
            object.__setattr__(self, "head_weights", check_head_weights(self.head_weights))
            if self.selector in EQUAL_HEADS:
                raise InvalidInput(f"head_weights: selector {self.selector!r} weighs all heads alike; leave them out")
        if (self.keep_mass is not None or self.diversity) and self.selector not in SCORED:
            name = "diversity" if self.keep_mass is None else "keep_mass"
            raise InvalidInput(
                f"{name}: it needs a selector that ranks by scores ({', '.join(SCORED)}), got {self.selector!r}"
            )


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How the next token is drawn from the logits; InvalidInput where a value is out of its range.

    Attributes:
        temperature: divides the logits; 0.0 is greedy, and then the others do nothing.
        top_p: keeps the smallest set of tokens whose probability reaches it, in (0, 1].
        top_k: keeps so many of the most probable tokens; 0 keeps all.
        seed: of the draw; None draws afresh each time.
        min_p: keeps tokens of at least this share of the largest probability, in [0, 1].
        repetition_penalty: above 1, tokens of the prompt and the answer become less probable; transformers' rule,
            in [0.01, 100].
        presence_penalty: is taken from the logits of tokens that the answer holds, in [-2, 2]; OpenAI's rule.
        frequency_penalty: the same, for each time that the answer holds them.
        logit_bias: is added to the logits of some tokens, in [-100, 100]: pairs of token id and bias, or a mapping.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: "Mapping[int, float] | Sequence[tuple[int, float]]" = ()

    def __post_init__(self) -> None:
        _check_numbers(self)
        try:
            biases = dict(self.logit_bias)
        except (TypeError, ValueError):
            got = repr(self.logit_bias)[:60]
            raise InvalidInput(f"logit_bias: got {got}, expected a mapping of token id to bias") from None
        for token, bias in biases.items():
            _check_integer("logit_bias", token, 0)
            biases[token] = _number("logit_bias", bias, -100.0, 100.0)
        object.__setattr__(self, "logit_bias", tuple(sorted(biases.items())))

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0.0

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or biases change the logits before a token is chosen."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(penalties or self.logit_bias)


def num_kept(num_visual: int, keep_ratio: float, min_visual_tokens: int) -> int:
    """How many of num_visual tokens are kept: k = min(N, max(min_visual_tokens, ceil(N * keep_ratio))).

    In float64 on the host: in float32, 50 tokens at 0.3 would give 16 instead of 15.
    """
    wanted: int = math.ceil(num_visual * keep_ratio)
    return min(num_visual, max(min_visual_tokens, wanted))


def check_head_weights(weights: Sequence[float], num_heads: int | None = None) -> tuple[float, ...]:
    """The weights, one number a query head of layer 0, as floats.

    Raises InvalidInput: wrong length, a value that is not finite, below 0 or too large for scores in float32, or all
    zero there.
    """
    try:
        listed = tuple(weights)
        if isinstance(weights, str | bytes | Mapping) or any(isinstance(w, str | bytes | bool) for w in listed):
            raise TypeError
        values = tuple(float(w) for w in listed)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(f"head_weights: got {weights!r:.100}, expected a sequence of numbers") from error
    if num_heads is not None and len(values) != num_heads:
        raise InvalidInput(f"head_weights: got {len(values)} values, expected {num_heads}, one a query head of layer 0")
    if not values or not all(math.isfinite(w) and w >= 0.0 for w in values):
        raise InvalidInput(f"head_weights: got {values!r:.100}, expected finite numbers of at least 0")
    if not any(values):
        raise InvalidInput(
            "head_weights: all are 0, so every visual token scores the same; expected at least one above 0"
        )
    if not _SMALLEST_WEIGHT <= max(values) <= _LARGEST_WEIGHT:
        raise InvalidInput(
            f"head_weights: the largest is {max(values):g}, expected one from {_SMALLEST_WEIGHT:g} to "
            f"{_LARGEST_WEIGHT:g}: scores are computed in float32. Multiply all weights by the same number"
        )
    return values


def _check_numbers(config: "PruningConfig | SamplingConfig | Request") -> None:
    """Check every number that has a range or a least value; numpy's floats become Python's."""
    for entry in fields(config):
        name, value = entry.name, getattr(config, entry.name)
        if value is entry.default is None:
            continue
        if name in _RANGES:
            object.__setattr__(config, name, _number(name, value, *_RANGES[name]))
        elif name in _LEAST_INTEGERS:
            _check_integer(name, value, _LEAST_INTEGERS[name])


def _number(name: str, value: object, least: float, most: float, above: bool = False) -> float:
    """A finite number from least (with `above`: from above it) to most, or InvalidInput."""
    if isinstance(value, np.floating):
        value = float(str(value))  # float32's 0.2 is a little more than 0.2, and would keep a token more
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.integer)
        or not least <= value <= min(most, sys.float_info.max)
        or (above and value == least)
    ):
        bounds = f"in {'(' if above else '['}{least:g}, {most:g}]" if math.isfinite(most) else f"of at least {least:g}"
        raise InvalidInput(f"{name}: got {value!r:.60}, expected a number {bounds}")
    return int(value) if isinstance(value, np.integer) else value


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:  # numpy's integers are ones too
        raise InvalidInput(f"{name}: got {value!r}, expected an integer of at least {least}")


@dataclass(frozen=True, slots=True, eq=False)
class ModelInputs:
    """Tensors of one prompt in the layout of the checkpoint's own processor.

    Attributes:
        input_ids: int64 [seq_len] or [1, seq_len], placeholders already expanded.
        attention_mask: int64, the same shape; 0 at padding; None is all ones.
        pixel_values: float32 [num_patches, patch_dim] (Qwen) or [tiles, 3, 448, 448] (InternVL).
        image_grid_thw: int64 [images, 3], patches in time, height and width.
        pixel_values_videos: as pixel_values, of the videos; those that prepare makes of a long video are made
            while they are read, and numpy.asarray makes the array.
        video_grid_thw: int64 [videos, 3].
        second_per_grid_ts: float32 [videos], seconds that one temporal patch spans; None is 1.0 each.
    """

    input_ids: npt.ArrayLike
    attention_mask: npt.ArrayLike | None = None
    pixel_values: npt.NDArray[Any] | None = None
    image_grid_thw: npt.ArrayLike | None = None
    pixel_values_videos: npt.ArrayLike | None = None
    video_grid_thw: npt.ArrayLike | None = None
    second_per_grid_ts: npt.ArrayLike | None = None

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is None:
                continue
            try:  # of lists, and tensors of other libraries
                array = value if isinstance(getattr(value, "dtype", None), np.dtype) else np.asarray(value)
                if array.dtype.kind in "OSU":
                    raise TypeError(f"numpy makes {array.dtype} of it")
            except (TypeError, ValueError, RuntimeError) as error:
                got = f"{type(value).__name__} without numbers that numpy can read ({error})"
                raise InvalidInput(f"{entry.name}: got {got}, expected an array") from error
            object.__setattr__(self, entry.name, array)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and all that is asked of its answer; InvalidInput where a value cannot be used.

    Attributes:
        prompt: a string (images, then videos, come before it), chat messages, or tensors.
        images: paths, bytes, PIL images or uint8 arrays.
        videos: paths, lists of images, or uint8 arrays [frames, height, width, 3].
        pruning: how visual tokens are pruned; None is PruningConfig(), or what the batch asks for.
        max_new_tokens: longest answer; it also ends where the context is full. None is 128, or what the batch asks for.
        sampling: how tokens are drawn; None is greedy, or what the batch asks for.
        stop: strings that end the answer and are not part of it.
        ignore_eos: go on after a stop token.
        return_logits: give the logits of every step.
        logprobs: give the log probability of every token, and those of so many most probable ones; None gives none.
        skip_special_tokens: leave special tokens out of the text.
        tools: what the chat template tells the model that it may call, JSON objects.
        min_pixels: enlarge smaller images to this area.
        max_pixels: shrink larger images to this area.
    """

    prompt: "Prompt"
    images: "Sequence[ImageInput]" = ()
    videos: "Sequence[VideoInput]" = ()
    pruning: PruningConfig | None = None
    max_new_tokens: int | None = None
    sampling: SamplingConfig | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    return_logits: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    tools: "Sequence[Mapping[str, Any]]" = ()
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        _check_numbers(self)
        flags = dict.fromkeys(("ignore_eos", "return_logits", "skip_special_tokens"), bool)
        for name, kind in {"pruning": PruningConfig, "sampling": SamplingConfig, **flags}.items():
            if not isinstance(value := getattr(self, name), kind) and (value is not None or kind is bool):
                raise InvalidInput(f"{name}: got {repr(value)[:60]}, expected a {kind.__name__}")
        listed = isinstance(self.stop, Iterable) and not isinstance(self.stop, str)
        stop = tuple(self.stop) if listed else (self.stop,)
        if not listed or not all(isinstance(string, str) and string for string in stop):
            raise InvalidInput(f"stop: got {self.stop!r}, expected a list of non-empty strings")
        object.__setattr__(self, "stop", stop)  # a generator is read but once

    def with_defaults(self, options: "Request") -> "Request":
        """This request, with the options of another where it asks for none of its own."""
        names = ["pruning", "max_new_tokens", "sampling", "stop"]
        names += ["ignore_eos", "return_logits", "min_pixels", "max_pixels"]
        return replace(
            self,
            logprobs=options.logprobs if self.logprobs is None else self.logprobs,
            skip_special_tokens=self.skip_special_tokens and options.skip_special_tokens,
            **{name: getattr(self, name) or getattr(options, name) for name in names},
        )


@dataclass(slots=True)
class Timings:
    """Seconds by stage of one answer; prompts that share a prefill or a step each report all of it.

    preprocess: image decoding, resizing, patches, chat template, tokens, positions.
    vision: the vision stage.  select: the host's choice of tokens, 0 where the graph makes it.
    first_layer, decoder: the prefill of each.
    decode: all decode steps together.  total: wall clock from call to result.
    """

    preprocess: float = 0.0
    vision: float = 0.0
    select: float = 0.0
    first_layer: float = 0.0
    decoder: float = 0.0
    decode: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How probable the token of a step was, by the model's own logits: without penalties, biases or temperature.

    logprob: natural logarithm of its probability.  top: the most probable tokens with theirs, the best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """One answer.

    Attributes:
        text: the answer, None without a tokenizer.
        token_ids: int ids generated, the stop token included when it ended the answer.
        finish_reason: "stop" or "length".
        num_visual: visual tokens in the prompt.
        num_kept: visual tokens kept.
        kept_indices: int64 [kept], positions kept, text and visual, in the prompt as given, ascending,
            without those whose attention_mask is 0.
        scores: float32 [num_visual], HAWK's score of each visual token in prompt order, before any bias.
        timings: seconds by stage.
        logits: float32 [steps, vocab] where asked for; row i is what token_ids[i] was chosen from.
        logprobs: of each token of token_ids, where asked for.
        query: "paper", "turn" or "last": which text scored the visual tokens.
        num_cached: images and videos of the prompt (InternVL: frames) that the vision stage did not run for, since
            the vision cache knew them.
    """

    text: str | None
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    num_visual: int
    num_kept: int
    kept_indices: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    timings: Timings = field(default_factory=Timings)
    logits: npt.NDArray[np.float32] | None = None
    num_cached: int = 0
    query: str = "paper"
    logprobs: list[TokenLogprobs] | None = None
