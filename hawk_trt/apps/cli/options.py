"""The options that commands share, and what they stand for: a loaded pipeline, a prompt, a pruning.

Each class is a group of options: its fields become flags, its docstring their help.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter, Token

from hawk_trt.apps.cli.mistakes import WrongModel
from hawk_trt.apps.cli.models import INTEGERS, TINY, ready, verify
from hawk_trt.apps.cli.vocabulary import IMAGES, VIDEOS
from hawk_trt.errors import InvalidInput
from hawk_trt.pruning.head_weights import read_head_weights
from hawk_trt.request import QUERIES, QUOTAS, SELECTORS, PruningConfig
from hawk_trt.stages import DTYPES, TARGETS

if TYPE_CHECKING:
    from hawk_trt import Pipeline
    from hawk_trt.bundle import Bundle
    from hawk_trt.request import Message

# The names that others give the dtypes.
DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


def _numbers(_: type, tokens: Sequence[Token]) -> tuple[float, ...]:
    try:
        return tuple(ratio_of(part) for token in tokens for part in token.value.split(","))
    except ValueError:
        raise ValueError(f"got {tokens[-1].value!r}, expected numbers with commas between them, as 0.1,0.2") from None


def _number(_: type, tokens: Sequence[Token]) -> float:
    try:
        return ratio_of(tokens[0].value)
    except ValueError:
        raise ValueError(f"got {tokens[0].value!r}, expected one number, as 0.2") from None


def ratio_of(text: str) -> float:
    """A share: "0.2", or "20%"."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def dtypes(*others: str) -> Parameter:
    """An option that takes a dtype, by any of its names, or one of some others."""
    named = {name: name for name in DTYPES} | DTYPE_NAMES | {name: name for name in others}
    return Parameter(choices=tuple(named), converter=lambda _, tokens: named.get(tokens[0].value, tokens[0].value))


def names(known: Sequence[str], *, name: Sequence[str] = ()) -> Parameter:
    """An option that takes some of the known names, with commas between them or repeated."""

    def convert(_: type, tokens: Sequence[Token]) -> tuple[str, ...]:
        given = tuple(part for token in tokens for part in token.value.split(","))
        for one in given:
            if one not in known:
                raise ValueError(f"got {one!r}, expected some of {', '.join(known)}, with commas between them")
        return given

    return Parameter(name=tuple(name), converter=convert, n_tokens=1)


# The sections of a help text, in their order.
PROMPT, PRUNING = Group("Prompt", sort_key=1), Group("Pruning", sort_key=2)
QUESTIONS = Group("Questions", sort_key=1)
WHERE, OUTPUT = Group("Where it runs", sort_key=8), Group("Output", sort_key=9)

MODEL = (
    f"a bundle or engine folder; a checkpoint or hub id is exported first, once; {TINY} is the model that comes along"
)
Model = Annotated[Path, Parameter(help=MODEL)]
Numbers = Annotated[tuple[float, ...], Parameter(converter=_numbers, n_tokens=1)]
KeepRatio = Annotated[float | None, Parameter(alias="--keep-ratios", converter=_number, group=PRUNING)]
KeepRatios = Annotated[Numbers, Parameter(name=("--keep-ratio", "--keep-ratios"), group=PRUNING)]
MaxNewTokens = Annotated[int, Parameter(alias="--max-tokens")]
Dtype = Annotated[str, dtypes()]
Json = Annotated[bool, Parameter(group=OUTPUT)]


@Parameter(name="*", group=WHERE)
@dataclass(frozen=True, kw_only=True)
class Where:
    """What runs the model.

    Attributes:
        device: cpu, cuda or cuda:N (default: cuda for engines, else cpu)
        target: graphs of the bundle to run (default: the best that this machine runs)
        dtype: in which a checkpoint is exported (default: float32); a bundle has its own
        threads: CPU threads (default: one for each core)
        verify: check the weight files by hash before loading them
    """

    device: str | None = None
    target: Annotated[str | None, Parameter(choices=TARGETS)] = None
    dtype: Annotated[str | None, dtypes(*INTEGERS)] = None
    threads: int | None = None
    verify: bool = False

    def open(self, model: Path, vision_cache_mb: float = 0) -> "Pipeline":
        """Load a bundle or engines, or a checkpoint, which is exported first.

        vision_cache_mb: for a command that may be asked twice about an image, unlike most.
        """
        from hawk_trt import Pipeline  # loading graphs and a tokenizer is only for those who run them

        folder = ready(model, self.dtype)
        if self.verify:
            verify(folder)
        return Pipeline.load(
            folder, self.device, target=self.target, vision_cache_mb=vision_cache_mb, threads=self.threads
        )


@Parameter(name="*", group=PROMPT)
@dataclass(frozen=True, kw_only=True)
class Pixels:
    """The size that images are brought to.

    Attributes:
        min_pixels: enlarge smaller images to so many pixels (default: the checkpoint's)
        max_pixels: shrink larger images to so many pixels (default: the checkpoint's)
    """

    min_pixels: int | None = None
    max_pixels: int | None = None


@Parameter(name="*", group=PROMPT)
@dataclass(frozen=True, kw_only=True)
class Prompt(Pixels):
    """A question about images and videos.

    Attributes:
        prompt: the question, or - to read it from stdin
        image: an image before the prompt; repeatable
        video: a video before the prompt; repeatable
        fps: frames for each second of video (default: the model's, mostly 2)
        max_frames: most frames taken from a video (default: 768)
        system: a system message (default: the chat template's own, if it has one)
        max_new_tokens: longest answer, in tokens
    """

    prompt: Annotated[str, Parameter(alias="-p", allow_leading_hyphen=True)]
    image: Annotated[tuple[str, ...], Parameter(alias=("-i", "--images"))] = ()
    video: Annotated[tuple[str, ...], Parameter(alias="--videos")] = ()
    fps: float | None = None
    max_frames: int | None = None
    system: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None
    max_new_tokens: MaxNewTokens = 128

    def __post_init__(self) -> None:
        for flag, paths, other, suffixes in (
            ("--image", self.image, "--video", VIDEOS),
            ("--video", self.video, "--image", IMAGES),
        ):
            for path in paths:
                if Path(path).suffix.lower() in suffixes and not path.lower().endswith(".gif"):
                    raise WrongModel(f"{flag} {path}: {other[2:]}, expected {flag[2:]}", flag, other)

    def text(self) -> str:
        """The question, from the option or from stdin."""
        try:
            text = sys.stdin.read().strip() if self.prompt == "-" else self.prompt
        except UnicodeDecodeError as error:
            raise InvalidInput(f"--prompt -: stdin is not {error.encoding} text ({error.reason})") from error
        if not text.strip():
            raise InvalidInput("--prompt: got an empty text, expected a question")
        return text

    def messages(self, text: str) -> "str | Sequence[Message]":
        """The prompt as the pipeline takes it: the text alone, or chat messages where it has to say more."""
        for name, value, least in (("--fps", self.fps, 0), ("--max-frames", self.max_frames, 1)):
            if value is not None and not value > least:
                raise InvalidInput(f"{name}: got {value:g}, expected {'above 0' if not least else 'at least 2'}")
            if value is not None and not self.video:
                raise InvalidInput(f"{name}: got it without a --video to take frames from; leave it out")
        if self.system is None and self.fps is None and self.max_frames is None:
            return text
        content: list[dict[str, Any]] = [{"type": "image"} for _ in self.image]
        content += [{"type": "video", "fps": self.fps, "max_frames": self.max_frames} for _ in self.video]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": [*content, {"type": "text", "text": text}]}]

    @property
    def media(self) -> dict[str, Any]:
        """What Pipeline's methods take besides the messages."""
        sizes = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return {"images": self.image, "videos": self.video, **sizes}


@Parameter(name="*", group=QUESTIONS)
@dataclass(frozen=True, kw_only=True)
class Asked:
    """How much of a data set is asked, and how.

    Attributes:
        count: samples of each data set (default: all of a file, 100 of tiny)
        seed: of the order of samples, and of random choices
        max_new_tokens: longest answer
        max_pixels: shrink larger images to this area (default: the checkpoint's)
    """

    count: int | None = None
    seed: int = 0
    max_new_tokens: MaxNewTokens = 32
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        for flag, got in (("--max-new-tokens", self.max_new_tokens), ("--max-pixels", self.max_pixels)):
            if got is not None and got < 1:
                raise InvalidInput(f"{flag}: got {got}, expected at least 1")


@Parameter(name="*", group=PRUNING)
@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What scores the visual tokens, and over what they compete.

    Attributes:
        query: what scores: text after the last image (paper), the last user turn, the last token (default: paper, turn)
        quota: choose tokens over all images together, for each image, or for each frame
        min_visual_tokens: fewest visual tokens kept
        head_weights: JSON file with a weight for each query head of layer 0 (default: the bundle's)
    """

    query: Annotated[str | None, Parameter(choices=QUERIES)] = None
    quota: Annotated[str, Parameter(choices=QUOTAS)] = "global"
    min_visual_tokens: int = 1
    head_weights: Path | None = None

    def config(self, keep_ratio: float | None, bundle: "Bundle | None" = None) -> PruningConfig:
        """The pruning that the options ask for, at a keep ratio; None is the bundle's, once there is one."""
        if keep_ratio is None:
            keep_ratio = 1.0 if bundle is None else bundle.manifest.keep_ratio
        if 1.0 < keep_ratio <= 100.0:
            raise InvalidInput(
                f"keep_ratio: got {keep_ratio:g}, expected a number in (0, 1]. "
                f"To keep {keep_ratio:g} %: --keep-ratio {keep_ratio / 100:g}"
            )
        given = asdict(self) | {"keep_ratio": keep_ratio}
        if self.head_weights is not None:
            given["head_weights"] = read_head_weights(self.head_weights).values
        return PruningConfig(**given)


@Parameter(name="*", group=PRUNING)
@dataclass(frozen=True, kw_only=True)
class Choosing(Scoring):
    """The options of selectors that rank by scores.

    Attributes:
        keep_mass: keep the fewest tokens that carry this share of the score mass, at most the keep ratio (default: off)
        diversity: share of the kept tokens that are chosen among near-ties because they differ from the others
    """

    keep_mass: float | None = None
    diversity: float = 0.0


@Parameter(name="*", group=PRUNING)
@dataclass(frozen=True, kw_only=True)
class Pruning(Choosing):
    """The choice of the kept tokens.

    Attributes:
        selector: rule that chooses the kept tokens (docs/selectors.md)
        seed: random seed of --selector random
    """

    selector: Annotated[str, Parameter(choices=SELECTORS)] = "hawk"
    seed: Annotated[int, Parameter(name="--selector-seed")] = 0
