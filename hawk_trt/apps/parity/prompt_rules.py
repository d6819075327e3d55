"""The host's rules, written a second time and plainly: query range, positions and kept counts of one prompt.

Nothing here calls the runtime's own functions for them, so that parity compares two readings of the rules.
All indices refer to the prompt without its masked positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Tokenizer

from hawk_trt.bundle import Bundle
from hawk_trt.errors import ParityError
from hawk_trt.request import PruningConfig


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Token ids that the rules look for; None where the checkpoint has none.

    user: what follows im_start in a user's turn ("user" and a line break). special: what query="turn" leaves out.
    """

    image: int | None
    video: int | None
    vision_end: int | None
    im_start: int | None
    im_end: int | None
    user: tuple[int, ...] = ()
    special: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class VisualItem:
    """One image or video as the language model meets it.

    grid: merged visual tokens in time, height and width. seconds: that a step of the time axis of a video spans.
    """

    is_video: bool
    grid: tuple[int, int, int]
    seconds: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Visual tokens of the item."""
        return math.prod(self.grid)


def prompt_tokens(bundle: Bundle) -> PromptTokens:
    """The token ids of the reference's rules, from a bundle's manifest and tokenizer.json."""
    known = bundle.manifest.special_tokens
    tokens = PromptTokens(known.image, known.video, known.vision_end, known.im_start, known.im_end)
    text = bundle.read_text("tokenizer.json")
    if text is None:
        return tokens
    tokenizer = Tokenizer.from_str(text)
    user = tuple(tokenizer.encode("user\n", add_special_tokens=False).ids)
    added = tokenizer.get_added_tokens_decoder()
    return replace(tokens, user=user, special=frozenset(index for index, token in added.items() if token.special))


def query_range(ids: Sequence[int], visual: Sequence[int], tokens: PromptTokens, query: str) -> list[int]:
    """Positions of the query tokens; visual: positions of the visual tokens, at least one."""
    if query == "turn":
        return _turn_query(ids, tokens)
    if query == "last":
        return [len(ids) - 1]
    # From the last image to the last im_end; an im_end right behind the image does not count.
    image_ends = [position for position, token in enumerate(ids) if token == tokens.vision_end]
    anchor = image_ends[-1] if image_ends else visual[-1]
    start = anchor + 1
    turn_ends = [position for position in range(start + 1, len(ids)) if ids[position] == tokens.im_end]
    end = turn_ends[-1] if turn_ends else len(ids)
    return list(range(start, end)) or [anchor]


def _turn_query(ids: Sequence[int], tokens: PromptTokens) -> list[int]:
    opening = [tokens.im_start, *tokens.user]
    starts = [p for p in range(len(ids)) if list(ids[p : p + len(opening)]) == opening]
    if not tokens.user or not starts:
        raise ParityError('query: got "turn", expected a prompt with a user turn and a tokenizer to find it')
    left_out = {tokens.image, tokens.video, tokens.vision_end, tokens.im_start, tokens.im_end} | tokens.special
    found = []
    for position in range(starts[-1] + len(opening), len(ids)):
        if ids[position] == tokens.im_end:
            break
        if ids[position] not in left_out:
            found.append(position)
    if not found:
        raise ParityError('query: got "turn", expected text in the last user turn')
    return found


def mrope_positions(kinds: Sequence[int], items: Sequence[VisualItem], tokens_per_second: float) -> list[list[int]]:
    """Qwen2.5-VL's positions by its documented rule: one [time, height, width] a token.

    Text counts on by one on all three axes. A visual token has its time, row and column in the item's grid,
    added to the position where the item starts; text after it goes on at the item's largest position + 1.
    transformers 5 differs after a video (it ignores the time axis there), so its own positions are not used.

    kinds: of each token the index of its item, -1 for text. tokens_per_second: positions that a second of video spans.
    """
    positions: list[list[int]] = []
    following = 0
    place = 0
    while place < len(kinds):
        if kinds[place] < 0:
            positions.append([following] * 3)
            following += 1
            place += 1
            continue
        item = items[kinds[place]]
        start = following
        frames, rows, columns = item.grid
        for frame in range(frames):
            # float32 as in PyTorch: the floor of a product differs between float32 and float64.
            moment = np.float32(frame) * np.float32(item.seconds) * np.float32(tokens_per_second)
            time = int(moment) if item.is_video else 0
            for row in range(rows):
                for column in range(columns):
                    position = [start + time, start + row, start + column]
                    positions.append(position)
                    following = max(following, *(axis + 1 for axis in position))
        place += item.num_tokens
    return positions


def num_kept(num_visual: int, pruning: PruningConfig) -> int:
    """Visual tokens kept of num_visual."""
    if pruning.keep_ratio >= 1.0:
        return num_visual
    return min(num_visual, max(pruning.min_visual_tokens, math.ceil(num_visual * pruning.keep_ratio)))


def frame_numbers(kinds: Sequence[int], items: Sequence[VisualItem]) -> list[int]:
    """The image or frame of a video that each token is of, counted through all of them; -1 for text.

    kinds: of each token the index of its item, -1 for text; masked tokens included.
    """
    frames_of = [item.grid[0] if item.is_video else 1 for item in items]
    seen = [0] * len(items)
    numbers = []
    for kind in kinds:
        if kind < 0:
            numbers.append(-1)
            continue
        frame = seen[kind] // (items[kind].num_tokens // frames_of[kind])
        seen[kind] += 1
        numbers.append(sum(frames_of[:kind]) + frame)
    return numbers


def keep_best(scores: Sequence[float], groups: Sequence[int], pruning: PruningConfig) -> list[int]:
    """Which visual tokens are kept: ordinals among the visual tokens, ascending.

    The highest scores of each group win and, among equals, the lower index.
    """
    kept: list[int] = []
    for group in sorted(set(groups)):
        members = [n for n in range(len(scores)) if groups[n] == group]
        ranked = sorted(members, key=lambda n: (-scores[n], n))
        kept += ranked[: num_kept(len(members), pruning)]
    return sorted(kept)
