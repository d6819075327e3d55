"""`hawk-trt chat`: questions and answers about images in the terminal, or from piped lines.

A line is a question, a command such as /keep 0.1, or holds paths of images, typed, pasted or dragged into the terminal.
"""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote

from cyclopts import Parameter

from hawk_trt.apps.cli.options import PROMPT, KeepRatio, MaxNewTokens, Model, Pixels, Prompt, Pruning, Where, ratio_of
from hawk_trt.apps.cli.output import note
from hawk_trt.apps.cli.run import Sampling
from hawk_trt.apps.cli.vocabulary import IMAGES, VIDEOS
from hawk_trt.errors import BundleError, HawkError, InvalidInput
from hawk_trt.files import cache_folder
from hawk_trt.request import Request
from hawk_trt.runtime.vision_cache import DEFAULT_VISION_CACHE_MB

if TYPE_CHECKING:
    from hawk_trt import Pipeline, Result, SamplingConfig

HELP = """\
/image PATH...  show images with the next question; a path in the question, pasted or dragged here, does the same
/video PATH     show a video with the next question
/keep 0.2       share of visual tokens kept from now on
/kept [FILE]    write the picture of the tokens that the last answer was made from (kept.png)
/clear          forget the conversation
/quit           end; so does Ctrl-D. Ctrl-C stops an answer"""
# A path as terminals paste it: in quotes, with spaces escaped, or as an address.
_WORD = re.compile(r"""(?<!\S)'([^']+)'|(?<!\S)"([^"]+)"|((?:\\.|[^\s\\])+)""")
_HISTORY_LINES = 1000


def chat(
    model: Model,
    where: Where = Where(),
    pruning: Pruning = Pruning(),
    sampling: Sampling = Sampling(),
    pixels: Pixels = Pixels(),
    *,
    image: Annotated[tuple[str, ...], Parameter(alias=("-i", "--images"), group=PROMPT)] = (),
    system: Annotated[str | None, Parameter(group=PROMPT, allow_leading_hyphen=True)] = None,
    keep_ratio: KeepRatio = None,
    max_new_tokens: Annotated[MaxNewTokens, Parameter(group=PROMPT)] = 512,
) -> int:
    """Chat about images in the terminal; /help there lists what it knows.

    Example: hawk-trt chat Qwen/Qwen2.5-VL-3B-Instruct --image photo.jpg

    Args:
        image: an image to show with the first question; repeatable
        system: a system message (default: the chat template's own, if it has one)
        keep_ratio: share of visual tokens kept, in (0, 1] (default: the bundle's)
        max_new_tokens: longest answer, in tokens

    Returns:
        0, or 1 where a piped line failed.
    """
    pruning.config(keep_ratio)
    sampling.config()
    Request("", max_new_tokens=max_new_tokens, **asdict(pixels))  # what it refuses is said before the model is loaded
    with where.open(model, DEFAULT_VISION_CACHE_MB) as pipe:
        if pipe.processor.chat is None:
            raise BundleError(f"{model}: it has no tokenizer, so it cannot chat")
        talk = Conversation(
            pipe,
            pruning,
            pruning.config(keep_ratio, pipe.bundle).keep_ratio,
            sampling.config(pipe.bundle),
            system,
            Prompt(prompt="", **asdict(pixels), max_new_tokens=max_new_tokens),
        )
        if image:
            talk.attach(*image)
        if sys.stdin.isatty():
            manifest = pipe.bundle.manifest
            note(
                f"{Path(manifest.source.name).name}, {manifest.precision}, {pipe.backend.name} on {pipe.backend.device}"
            )
            note(f"keeps {talk.keep_ratio:.0%} of the visual tokens. /help: what you can type. /quit or Ctrl-D ends")
        failed = False
        for line in _lines():
            try:
                if not talk.take(line):
                    break
            except HawkError as error:
                failed = True
                note(f"error: {error}")
    return int(failed and not sys.stdin.isatty())


@dataclass
class Conversation:
    """The turns so far, and what the next one is asked with."""

    pipe: "Pipeline"
    pruning: Pruning
    keep_ratio: float
    sampling: "SamplingConfig"
    system: str | None
    shown: Prompt  # the images and videos of the turns, and what all turns have in common
    messages: list[dict[str, Any]] = field(default_factory=list)
    attached: list[str] = field(default_factory=list)  # paths that the next question shows
    last: "tuple[list[dict[str, Any]], float, Result] | None" = None  # messages, keep ratio and result of an answer

    def take(self, line: str) -> bool:
        """Do what a line asks for; returns whether the conversation goes on. It is as before where that raises."""
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit", "/bye", "/q"):
            return False
        if command in ("/image", "/video"):
            text, paths = ("", [rest]) if Path(rest).expanduser().is_file() else paths_in(rest)
            self.attach(*paths, *text.split())
        elif command == "/keep":
            self._keep(rest)
        elif command == "/kept":
            self._draw(Path(rest.strip() or "kept.png"))
        elif command == "/clear":
            self.shown = replace(self.shown, image=(), video=())
            self.messages, self.attached, self.last = [], [], None
            note("forgotten")
        elif command in ("/help", "/?", "?"):
            note(HELP)
        elif re.fullmatch(r"/[a-z]+", command):
            known = re.findall(r"^/\w+", HELP, re.MULTILINE)
            close = get_close_matches(command, known, n=1)
            raise InvalidInput(f"{command}: unknown. {f'Did you mean {close[0]}?' if close else 'Known: /help'}")
        else:
            text, paths = paths_in(line)
            if paths:
                self.attach(*paths)
            if text:
                self.ask(text)
        return True

    def attach(self, *paths: str) -> None:
        """Show images or videos with the next question."""
        if not paths:
            raise InvalidInput("/image: expected a path, such as /image photo.jpg")
        for path in paths:
            if not Path(path).expanduser().is_file():
                raise InvalidInput(f"{path}: no such file. Check the path of the image")
        for path in paths:
            self.attached.append(str(Path(path).expanduser()))
            note(f"{path}: goes with the next question")

    def ask(self, question: str) -> None:
        """Print the answer as it comes; Ctrl-C ends it, and what was said by then counts."""
        videos = tuple(path for path in self.attached if Path(path).suffix.lower() in VIDEOS)
        images = tuple(path for path in self.attached if path not in videos)
        self.attached = []
        content = [*({"type": "image"} for _ in images), *({"type": "video"} for _ in videos)]
        turn = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*(self.messages or system), turn]
        shown = replace(self.shown, image=self.shown.image + images, video=self.shown.video + videos)
        begun = time.perf_counter()
        first, answer = 0.0, ""
        stream = self.pipe.stream(
            messages,
            pruning=self.pruning.config(self.keep_ratio),
            max_new_tokens=shown.max_new_tokens,
            sampling=self.sampling,
            **shown.media,
        )
        try:
            for piece in stream:
                first = first or time.perf_counter() - begun
                answer += piece
                print(piece, end="", flush=True)
            self.last = (messages, self.keep_ratio, stream.result)
        except KeyboardInterrupt:
            self.last = None
            answer = answer or "..."
        finally:
            if answer:
                print(flush=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.shown = shown
        if self.last is None:
            note("stopped")
            return
        result = self.last[-1]
        kept = f"{result.num_kept} of {result.num_visual} visual tokens, " if result.num_visual else ""
        note(f"[{kept}first text after {first:.2f} s, {len(result.token_ids)} tokens in {result.timings.total:.2f} s]")

    def _keep(self, text: str) -> None:
        try:
            keep_ratio = ratio_of(text.strip())
        except ValueError:
            raise InvalidInput(f"/keep: got {text!r}, expected a share such as 0.2") from None
        self.pruning.config(keep_ratio)
        self.keep_ratio = keep_ratio
        note(f"keeps {keep_ratio:.1%} of the visual tokens")

    def _draw(self, path: Path) -> None:
        """Write the picture of the last answer's tokens."""
        if self.last is None or not self.last[-1].num_visual:
            raise InvalidInput("/kept: no answer about an image yet. Show one: /image photo.jpg")
        from hawk_trt.apps.cli.explain import draw, lay_out

        messages, keep_ratio, result = self.last
        question = messages[-1]["content"][-1]["text"]
        inputs = self.pipe.prepare(messages, **self.shown.media)
        explained = lay_out(self.pipe, question, inputs, [(keep_ratio, result)], self.pruning)
        draw(path, explained, self.shown, self.pruning, self.pipe)
        note(f"picture: {path}")


def paths_in(line: str) -> tuple[str, list[str]]:
    """The text of a line, and the images and videos that it names by path; those must be there."""
    paths: list[str] = []

    def taken(match: re.Match[str]) -> str:
        word, mark = match[1] or match[2] or re.sub(r"\\(.)", r"\1", match[3]), ""
        if match[3] and word[-1] in ",.?!;:":
            word, mark = word[:-1], word[-1]
        path = Path(unquote(word.removeprefix("file://")) if word.startswith("file://") else word).expanduser()
        if path.suffix.lower() not in (*IMAGES, *VIDEOS):
            return match[0]
        if path.is_file():
            paths.append(str(path))
            return mark
        if "/" in word and "://" not in word:
            raise InvalidInput(f"{word}: no such file. Check the path of the image")
        return match[0]

    return " ".join(_WORD.sub(taken, line).split()), paths


def _lines() -> Iterator[str]:
    """The lines that are typed, with their history, or piped."""
    if not sys.stdin.isatty():
        for line in sys.stdin:  # not yield from, which would close it with the generator
            yield line
        return
    try:
        import readline  # not on every system; input() uses it
    except ImportError:
        readline = None  # type: ignore[assignment]
    file = cache_folder() / "chat-history"
    with suppress(OSError):
        if readline:
            readline.read_history_file(file)
    try:
        while (line := _typed()) is not None:
            yield line
    finally:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            if readline:
                readline.set_history_length(_HISTORY_LINES)
                readline.write_history_file(file)


def _typed() -> str | None:
    """A line, empty where Ctrl-C took it back; None at the end."""
    try:
        return input("> ")
    except KeyboardInterrupt:
        note("\n/quit or Ctrl-D ends")
        return ""
    except EOFError:
        print()
        return None
