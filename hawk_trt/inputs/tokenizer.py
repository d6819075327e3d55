"""Text in: a prompt becomes token ids with one placeholder for each image or video, and the list of these.

Special tokens come from the chat template alone: one that a user spells out is ordinary text. A prompt that spells
none gets exactly the ids that encoding the whole rendered string gives.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer

from hawk_trt.bundle import Bundle, SpecialTokens
from hawk_trt.errors import BundleError, HawkError, InvalidInput
from hawk_trt.files import parse_json
from hawk_trt.inputs.chat_template import ChatTemplate
from hawk_trt.inputs.turns import JsonObject, Sources, Turn, VisualItem, as_list, checked_objects, strings, user_turn
from hawk_trt.models.family import TokenRun

if TYPE_CHECKING:
    from hawk_trt.request import ImageInput, Message, VideoInput

_MAX_HEADER_TOKENS = 32
# No text has so many characters a token on average.
_CHARACTERS_A_TOKEN = 64
# Threads of its own make the tokenizers package warn after every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class ChatTokenizer:
    """The tokenizer and chat template of one checkpoint; without a template it only decodes."""

    def __init__(
        self,
        tokenizer_json: str,
        config: Mapping[str, Any],
        template: str | None,
        special_tokens: SpecialTokens,
        context: int = 1 << 20,
    ) -> None:
        """Make a tokenizer of tokenizer.json; BundleError where it cannot be read.

        config: tokenizer_config.json; the template may use its bos_token, eos_token and the like.  template: Jinja.
        context: tokens that the model reads at most; texts that cannot fit are refused before they are tokenised.
        """
        advice = "Update it: pip install --upgrade tokenizers"
        with _refusing(BundleError, "the installed tokenizers package cannot read it", advice):
            self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # pieces of text are text, whatever they spell
        variables = _named_tokens(config)
        _mark_special(self.tokenizer, {*variables.values(), *_declared_special(config)}, special_tokens)
        added = self.tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: index for index, token in added.items() if token.special}
        self._added = added
        self._special_tokens = special_tokens
        kinds = {special_tokens.image: "image", special_tokens.video: "video"}
        self._placeholders = {token: kind for token, kind in kinds.items() if token is not None}
        self.template = None if template is None else ChatTemplate(template, variables, self._special_ids)
        self._max_characters = _CHARACTERS_A_TOKEN * context

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> "ChatTokenizer | None":
        """The tokenizer of a bundle; None where it has no tokenizer.json."""
        tokenizer_json = bundle.read_text("tokenizer.json")
        if tokenizer_json is None:
            return None
        config = read_settings(bundle, "tokenizer_config.json") or {}
        context = bundle.manifest.language.max_position_embeddings
        template = bundle.read_text("chat_template.jinja")
        return cls(tokenizer_json, config, template, bundle.manifest.special_tokens, context)

    def encode(
        self,
        prompt: "str | Sequence[Message]",
        images: "ImageInput | Sequence[ImageInput]" = (),
        videos: "VideoInput | Sequence[VideoInput]" = (),
        tools: Sequence[JsonObject] = (),
    ) -> list[str | TokenRun | VisualItem]:
        """Turn a string, or chat messages as docs/prompts.md says, into texts, special tokens, and images and videos.

        images, videos: sources of a string's, or of the items of messages without one, in order; one alone needs no
        list. Raises InvalidInput: a prompt that cannot be read, no chat template, or one that refuses this prompt.
        """
        sources: Sources = {"image": as_list(images, "image"), "video": as_list(videos, "video")}
        turns: tuple[Turn, ...]
        if isinstance(prompt, str):
            turns = (user_turn(prompt, sources),)
        else:
            from hawk_trt.inputs.messages import read_messages

            turns = read_messages(prompt, sources)
        tools = checked_objects(() if tools is None else tools, "tools")
        if self.template is None:
            raise InvalidInput(
                "prompt: this bundle has no chat template, expected ModelInputs. Or put a chat_template.jinja "
                "into the checkpoint folder and export again: hawk-trt export CHECKPOINT --out FOLDER"
            )
        characters = sum(len(text) for turn in turns for text in turn.texts()) + sum(map(len, strings(tools)))
        if characters > self._max_characters:
            raise InvalidInput(
                f"prompt: got {characters:,} characters of text, expected at most {self._max_characters:,}, which "
                "already is more than the model's context holds. Shorten the text"
            )
        parts: list[str | TokenRun] = []
        before: AddedToken | None = None
        for piece, special in self.template.pieces(turns, tools):  # a token may take the white space beside it
            token_id = -1 if special is None else self._special_ids[special]
            token = self._added.get(token_id)
            text = piece.lstrip() if before is not None and before.rstrip else piece
            parts.append(text.rstrip() if token is not None and token.lstrip else text)
            parts += [] if token is None else [TokenRun(token_id)]
            before = token
        visual = [item for turn in turns for item in turn.visual()]
        given = [item.kind for item in visual]
        kinds = [self._placeholders.get(part.token_id) if isinstance(part, TokenRun) else None for part in parts]
        placed = [kind for kind in kinds if kind is not None]
        if placed != given:
            raise InvalidInput(
                f"prompt: got {_listed(given)}, but the bundle's chat template makes {_listed(placed)} of it. "
                "Use a checkpoint whose template takes them, or pass ModelInputs"
            )
        items = iter(visual)
        return [part if kind is None else next(items) for part, kind in zip(parts, kinds, strict=True) if part != ""]

    def expand(
        self, parts: Sequence[str | TokenRun | VisualItem], placeholders: Sequence[Sequence[str | TokenRun]]
    ) -> npt.NDArray[np.int64]:
        """Token ids of an encoded prompt with what the family makes of its images and videos: int64 [seq_len].

        placeholders: texts and runs of tokens for each, in the prompt's order. Those that bring vision_start and
        vision_end replace the ones around the image or video too.
        """
        waiting = iter(placeholders)
        special = self._special_tokens
        around = [TokenRun(-1 if n is None else n) for n in (special.vision_start, special.vision_end)]
        left = list(parts)
        expanded: list[str | TokenRun] = []
        while left:
            part = left.pop(0)
            if not isinstance(part, VisualItem):
                expanded.append(part)
                continue
            own = next(waiting)
            if around[0] in own and (expanded[-1:], left[:1]) == ([around[0]], [around[1]]):
                del expanded[-1], left[0]
            expanded += own
        return self.token_ids(expanded)

    def token_ids(self, parts: Sequence[str | TokenRun]) -> npt.NDArray[np.int64]:
        """The ids of texts and runs of tokens, one after another: int64 [seq_len]; texts that meet are read as one."""
        texts, runs = [""], []
        for part in parts:
            if isinstance(part, str):
                texts[-1] += part
            else:
                texts.append("")
                runs.append(part)
        # As a batch, since only that lets other threads run meanwhile.
        with _refusing(InvalidInput, "the bundle's tokenizer cannot read this text", "Shorten it, or export again"):
            encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        token_ids = list(encoded[0].ids)
        for run, text in zip(runs, encoded[1:], strict=True):
            token_ids += [run.token_id] * run.count + text.ids
        return np.array(token_ids, dtype=np.int64)

    def turns(self, input_ids: npt.NDArray[np.int64]) -> list[tuple[str, npt.NDArray[np.int64]]]:
        """Role of each turn, and where its text is: neither header, nor visual and special tokens.

        It lies between "<|im_start|>", role, newline, and its <|im_end|>. A token that joins the newline to the text
        after it counts as the newline.
        """
        no_text = np.isin(input_ids, [*self._placeholders, *self._special_ids.values()])
        turns = []
        for start in np.flatnonzero(input_ids == self._special_tokens.im_start).tolist():
            header, begin = "", start + 1
            while "\n" not in header and begin < min(input_ids.size, start + 1 + _MAX_HEADER_TOKENS):
                begin += 1
                header = self.tokenizer.decode(input_ids[start + 1 : begin].tolist(), skip_special_tokens=False)
            role, newline, _ = header.partition("\n")
            ends = np.flatnonzero(input_ids[begin:] == self._special_tokens.im_end)
            if newline and (len(ends) or role == "user"):  # the header of the answer that is asked for opens no turn
                end = begin + int(ends[0]) if len(ends) else input_ids.size
                turns.append((role, begin + np.flatnonzero(~no_text[begin:end])))
        return turns

    def says_something(self, token_ids: npt.NDArray[np.int64]) -> bool:
        """Whether tokens spell more than white space."""
        return bool(self.tokenizer.decode(token_ids.tolist()).strip())


def read_settings(bundle: Bundle, name: str) -> dict[str, Any] | None:
    """The JSON object in a small file of a bundle, None where it has none; BundleError where it is damaged."""
    text = bundle.read_text(name)
    advice = "Mend it in the checkpoint and export again: hawk-trt export CHECKPOINT --out FOLDER"
    return None if text is None else parse_json(text, dict[str, Any], name, BundleError, advice)


@contextmanager
def _refusing(kind: type[HawkError], what: str, advice: str) -> Iterator[None]:
    """Make an error of what the tokenizers package raises, which has no class of its own, and panics."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics are none of Exception
        raise kind(f"tokenizer.json: {what} ({str(error)[:200]}). {advice}") from error


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like of tokenizer_config.json, by name."""
    extra = config.get("extra_special_tokens")
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    named = {name: spelling(value) for name, value in (tokens | (extra if isinstance(extra, dict) else {})).items()}
    return {name: content for name, content in named.items() if content is not None}


def _declared_special(config: Mapping[str, Any]) -> set[str]:
    """The other tokens that tokenizer_config.json calls special."""
    added = config.get("added_tokens_decoder")
    told = added.values() if isinstance(added, Mapping) else ()
    entries = [entry for entry in told if isinstance(entry, Mapping) and entry.get("special")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or ()
        entries += more.values() if isinstance(more, Mapping) else more if isinstance(more, list) else ()
    return {content for entry in entries if (content := spelling(entry))}


def spelling(entry: object) -> str | None:
    """The spelling of a token, which configs give as a string or as an object."""
    content = entry.get("content") if isinstance(entry, Mapping) else entry
    return content if isinstance(content, str) else None


def _mark_special(tokenizer: Tokenizer, declared: Collection[str], special_tokens: SpecialTokens) -> None:
    """Make tokens special that tokenizer.json has as ordinary ones, without adding any."""
    *ids, eos = astuple(special_tokens)
    known = {tokenizer.id_to_token(index) for index in (*ids, *eos) if index is not None}
    added = tokenizer.get_added_tokens_decoder()
    for content in filter(None, known.union(declared)):
        index = tokenizer.token_to_id(content)
        if index is not None and not (index in added and added[index].special):
            old = added.get(index, AddedToken(content))
            sides = {"lstrip": old.lstrip, "rstrip": old.rstrip}
            tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False, **sides)])


def _listed(kinds: Sequence[str]) -> str:
    return ", ".join(kinds) or "no image and no video"
