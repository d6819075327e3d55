"""Where everything of a prompt lies: positions, visual rows, query tokens; and prompts side by side as a batch.

In: ModelInputs. Out: PromptLayout, one prompt without its padding, then PrefillInputs, the host inputs of
first_layer for a left-padded batch. Nothing here touches pixels, weights or a runtime.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import InvalidInput
from hawk_trt.models.family import IMAGE, VIDEO, Family, IntArray
from hawk_trt.models.vision_config import VisionConfig
from hawk_trt.request import ModelInputs
from hawk_trt.stages import BIAS_DROP, BIAS_KEEP

if TYPE_CHECKING:
    from hawk_trt.inputs.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """One prompt without padding; n real tokens, N of them visual."""

    input_ids: IntArray  # int64 [n]
    source_index: IntArray  # int64 [n], each token's index in the prompt as given
    visual_rows: IntArray  # int64 [n], row in the prompt's visual embeddings (images, then videos), -1 for text
    items: IntArray  # int64 [n], which image or video (images, then videos) a visual token is of, -1 for text
    frames: IntArray  # int64 [n], which image or frame of a video, counted through all of them; -1 for text
    position_ids: IntArray  # int64 [axes, n]
    query_weights: npt.NDArray[np.float32]  # float32 [n], 1/T at the query tokens
    query: str  # "paper", "turn" or "last": whose rule chose the query tokens
    num_rows: int  # rows of the prompt's visual embeddings, those of masked placeholders included
    image_grid_thw: IntArray
    video_grid_thw: IntArray  # int64 [items, 3], masked ones included

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_visual(self) -> int:
        return int(np.count_nonzero(self.visual_rows >= 0))

    @property
    def next_position(self) -> int:
        """Position of the first generated token: the one it has without pruning."""
        return int(self.position_ids.max()) + 1


@dataclass(frozen=True, slots=True)
class PrefillInputs:
    """Host inputs of first_layer for a batch, by the names of the stage contract.

    text_ids is int64 [num_text], the ids of the text of all rows, which text_embeds is looked up by; at least one.
    num_kept_total is the length of `slots`; pads holds the left padding of each row.
    """

    text_ids: IntArray
    source_rows: IntArray
    position_ids: IntArray
    query_weights: npt.NDArray[np.float32]
    select_bias: npt.NDArray[np.float32]
    head_weights: npt.NDArray[np.float32]
    kv_start: IntArray
    num_kept_total: int
    pads: IntArray

    def arrays(self, table: npt.NDArray[Any], *, zero_padding: bool) -> dict[str, npt.NDArray[Any]]:
        """Inputs of first_layer by name, but those of vision and `slots`; text_embeds are looked up in a table.

        zero_padding: padding reads a row of zeros; linear layers have no mask, and zeros leave their states alone.
        """
        embeds, rows = table[self.text_ids], self.source_rows
        if zero_padding and self.pads.any():
            rows = np.where(np.arange(rows.shape[1]) < self.pads[:, None], -1 - len(embeds), rows)
            embeds = np.concatenate([embeds, np.zeros_like(embeds[:1])])
        names = ("position_ids", "query_weights", "select_bias", "head_weights", "kv_start")
        others = {"text_embeds": embeds, "source_rows": rows, "write_index": np.zeros(len(rows), np.int64)}
        return others | {name: getattr(self, name) for name in names}


def prompt_layout(
    inputs: ModelInputs,
    family: Family,
    special: SpecialTokens,
    query: str | None,
    chat: "ChatTokenizer | None",
) -> PromptLayout:
    """Lay out one prompt. query: as PruningConfig has it. chat: knows the turns; None without a tokenizer.

    Raises InvalidInput: shapes, masks, placeholders and grids that do not fit, or query="turn" without a tokenizer.
    """
    ids, real = _tokens(inputs)
    kind = np.zeros(len(ids), np.int8)
    for token, value in ((special.image, IMAGE), (special.video, VIDEO)):
        if token is not None:
            kind[ids == token] = value
    images, videos = family.item_grids(inputs, kind)
    rows, items, frames = _visual_places(kind, images, videos, family.vision)
    seconds = _seconds(inputs.second_per_grid_ts, len(videos))
    # an image of which no placeholder is real takes no positions; one that is masked in part keeps all of its own
    present = np.isin(np.arange(len(images) + len(videos)), items[real & (items >= 0)])
    placed = real | np.append(present, False)[items]  # items of text are -1: the False
    of_images, of_videos = np.split(present, [len(images)])
    shown = images[of_images], videos[of_videos], seconds[of_videos]
    positions = family.position_ids(kind[placed], *shown)[:, real[placed]]
    asked, query = query_mask(ids[real], rows[real] >= 0, special, query, chat)
    weights = np.where(asked, np.float32(1.0 / max(int(asked.sum()), 1)), np.float32(0.0)).astype(np.float32)
    return PromptLayout(
        input_ids=ids[real],
        source_index=np.flatnonzero(real),
        visual_rows=rows[real],
        items=items[real],
        frames=frames[real],
        position_ids=positions,
        query_weights=weights,
        query=query,
        num_rows=int((kind > 0).sum()),
        image_grid_thw=images,
        video_grid_thw=videos,
    )


def query_mask(
    ids: IntArray,
    visual: npt.NDArray[np.bool_],
    special: SpecialTokens,
    query: str | None,
    chat: "ChatTokenizer | None",
) -> tuple[npt.NDArray[np.bool_], str]:
    """The tokens that score the visual ones, bool [n], and whose rule chose them: "paper", "turn" or "last".

    "turn" is the text of the last user turn. Unasked it counts where the authors' range holds no text of a turn; then
    of the last user turn that has text.
    """
    if query == "last":
        return (np.arange(len(ids)) == len(ids) - 1) & visual.any(), "last"
    if query == "turn":
        if chat is None:
            raise InvalidInput('query: "turn" needs a tokenizer, and this bundle has none; use query="paper"')
        users = [text for role, text in chat.turns(ids) if role == "user"]
        if not users:
            raise InvalidInput('query: "turn" needs a user turn and this prompt has none. Use query="paper"')
        if not len(users[-1]):
            raise InvalidInput('query: "turn" needs text in the last user turn and there is none. Use query="paper"')
        return np.isin(np.arange(len(ids)), users[-1]), "turn"
    paper = paper_query_mask(ids, visual, special)
    if chat is None or not visual.any():
        return paper, "paper"
    turns = chat.turns(ids)
    asked = [text for role, text in turns if role == "user" and chat.says_something(ids[text])]
    if not asked or any(chat.says_something(ids[text[paper[text]]]) for _, text in turns):
        return paper, "paper"
    if query == "paper":
        warnings.warn(
            'query="paper": the text behind the last image is the template\'s alone, so the question does not choose '
            'the visual tokens. Put the image before the question, or leave query out, or take query="turn"',
            stacklevel=2,
        )
        return paper, "paper"
    return np.isin(np.arange(len(ids)), asked[-1]), "turn"


def paper_query_mask(ids: IntArray, visual: npt.NDArray[np.bool_], special: SpecialTokens) -> npt.NDArray[np.bool_]:
    """The authors' query range, over a prompt without padding.

    From behind the last vision_end (without one, behind the last visual token) up to the last im_end that is
    strictly later (without one, the prompt's end). Where that is empty, the last vision_end itself (without
    one, the last visual token). Nothing where there is no visual token.

    ids are int64 [n], visual and the result bool [n].
    """
    mask = np.zeros(len(ids), np.bool_)
    if not visual.any():
        return mask
    ends = np.flatnonzero(ids == special.vision_end)
    last = int(ends[-1]) if len(ends) else int(np.flatnonzero(visual)[-1])
    start = last + 1
    stops = np.flatnonzero(ids == special.im_end)
    stops = stops[stops > start]
    stop = int(stops[-1]) if len(stops) else len(ids)
    if start < stop:
        mask[start:stop] = True
    else:
        mask[last] = True
    return mask


def collate(
    prompts: Sequence[PromptLayout],
    kept_counts: Sequence[int],
    kept_rows: Sequence[npt.NDArray[np.bool_] | None],
    head_weights: npt.NDArray[np.float32],
) -> PrefillInputs:
    """Lay prompts side by side, left-padded, so that every row keeps the same number K of positions.

    K is the largest kept count; row i keeps K - K_i of its padding tokens besides its own K_i, and is padded
    far enough for that.

    kept_counts: visual tokens kept in each.  kept_rows: bool [num_visual] of each where the choice is made already,
    else None: the scores decide.  head_weights: float32 [heads].
    """
    totals = [p.num_tokens - p.num_visual + kept for p, kept in zip(prompts, kept_counts, strict=True)]
    total = max(totals)
    seq_len = max(p.num_tokens + total - own for p, own in zip(prompts, totals, strict=True))
    batch = len(prompts)
    text_ids: list[IntArray] = []
    source_rows = np.full((batch, seq_len), -1, np.int64)
    position_ids = np.zeros((prompts[0].position_ids.shape[0], batch, seq_len), np.int64)
    query_weights = np.zeros((batch, seq_len), np.float32)
    select_bias = np.full((batch, seq_len), BIAS_DROP, np.float32)
    num_visual = num_text = 0
    for i, (prompt, own, chosen) in enumerate(zip(prompts, totals, kept_rows, strict=True)):
        pad = seq_len - prompt.num_tokens
        visual = prompt.visual_rows >= 0
        text_ids.append(prompt.input_ids[~visual])
        if len(text_ids[-1]):
            source_rows[i, :pad] = -1 - num_text  # its own first text: no other row's embedding is read for this one
        text_rows = num_text + np.cumsum(~visual) - 1
        source_rows[i, pad:] = np.where(visual, num_visual + prompt.visual_rows, -1 - text_rows)
        position_ids[:, i, pad:] = prompt.position_ids
        query_weights[i, pad:] = prompt.query_weights
        select_bias[i, pad - (total - own) : pad] = BIAS_KEEP
        bias = np.where(visual, np.float32(0.0), np.float32(BIAS_KEEP))
        if chosen is not None:
            bias[visual] = np.where(chosen, BIAS_KEEP, BIAS_DROP)
        select_bias[i, pad:] = bias
        num_visual += prompt.num_rows
        num_text += len(text_ids[-1])
    return PrefillInputs(
        text_ids=np.concatenate(text_ids) if num_text else np.zeros(1, np.int64),
        source_rows=source_rows,
        position_ids=position_ids,
        query_weights=query_weights,
        select_bias=select_bias,
        head_weights=head_weights,
        kv_start=np.array([total - own for own in totals], np.int64),
        num_kept_total=total,
        pads=np.array([seq_len - p.num_tokens for p in prompts], np.int64),
    )


def _tokens(inputs: ModelInputs) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """input_ids [n] and which of them attention_mask calls real."""
    if not np.size(inputs.input_ids):
        raise InvalidInput("input_ids: got no token, expected int64[seq_len] with at least one")
    ids = _vector("input_ids", inputs.input_ids)
    if inputs.attention_mask is None:
        return ids, np.ones(len(ids), np.bool_)
    mask = _vector("attention_mask", inputs.attention_mask)
    if len(mask) != len(ids):
        raise InvalidInput(f"attention_mask: got {len(mask)} values, expected {len(ids)}, one a token of input_ids")
    if not mask.any():
        raise InvalidInput("attention_mask: all 0, so the prompt is padding only; expected at least one 1")
    return ids, mask != 0


def _vector(name: str, values: npt.ArrayLike) -> IntArray:
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise InvalidInput(
            f"{name}: got {array.dtype}{list(array.shape)}, expected int64[seq_len] or int64[1, seq_len]"
        )
    return array.astype(np.int64)


def _seconds(values: npt.ArrayLike | None, num_videos: int) -> npt.NDArray[np.float32]:
    if values is None:
        return np.ones(num_videos, np.float32)
    seconds = np.asarray(values, np.float32).reshape(-1)
    if len(seconds) != num_videos or not np.isfinite(seconds).all() or (seconds < 0).any():
        raise InvalidInput(
            f"second_per_grid_ts: got {seconds.tolist()}, expected {num_videos} finite seconds, one a video"
        )
    return seconds


def _visual_places(
    kind: npt.NDArray[np.int8], images: IntArray, videos: IntArray, vision: VisionConfig
) -> tuple[IntArray, IntArray, IntArray]:
    """Visual row, item and frame of every position, masked placeholders included; images first, then videos."""
    rows, items, frames = np.full((3, len(kind)), -1, np.int64)
    row_offset = item_offset = frame_offset = 0
    for value, name, grids in ((IMAGE, "image", images), (VIDEO, "video", videos)):
        where = np.flatnonzero(kind == value)
        counts = vision.tokens_per_item(grids)
        if len(where) != counts.sum():
            raise InvalidInput(
                f"input_ids: got {len(where)} {name} placeholders, expected {counts.sum()}: "
                f"{name}_grid_thw {grids.tolist()} makes {counts.tolist()} visual tokens"
            )
        rows[where] = row_offset + np.arange(len(where))
        items[where] = item_offset + np.repeat(np.arange(len(counts)), counts)
        lengths = grids[:, 0] if value == VIDEO else np.ones(len(counts), np.int64)
        per_frame = np.repeat(counts // lengths, lengths)
        frames[where] = frame_offset + np.repeat(np.arange(len(per_frame)), per_frame)
        row_offset += len(where)
        item_offset += len(counts)
        frame_offset += len(per_frame)
    return rows, items, frames
