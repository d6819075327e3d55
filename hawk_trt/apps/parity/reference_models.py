"""What the PyTorch reference needs of each family: language model, visual embeddings and positions.

A class a family, found by the model_type of config.json. With reference.py the only file of parity that imports torch
and transformers.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import (
    Cache,
    InternVLForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from hawk_trt.apps.parity.prompt_rules import VisualItem, mrope_positions
from hawk_trt.request import ModelInputs


class Qwen25VL:
    """Qwen2.5-VL, and what the other families change."""

    model_class: ClassVar[Any] = Qwen2_5_VLForConditionalGeneration

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - the model classes share no base with these attributes
        self.language: Any = model.model.language_model  # with layers, embed_tokens and config
        # the first of full attention
        self.scoring_layer = next(n for n, layer in enumerate(self.language.layers) if hasattr(layer, "self_attn"))
        self.lm_head: Any = model.lm_head  # from hidden states to logits
        self._vision = model.model
        self._config: Any = model.config

    def items(self, inputs: ModelInputs) -> tuple[list[VisualItem], list[VisualItem]]:
        images = [VisualItem(False, self._merged(grid)) for grid in _rows(inputs.image_grid_thw)]
        grids = [self._merged(grid) for grid in _rows(inputs.video_grid_thw)]
        seconds = np.ones(len(grids)) if inputs.second_per_grid_ts is None else np.ravel(inputs.second_per_grid_ts)
        return images, [VisualItem(True, grid, float(step)) for grid, step in zip(grids, seconds, strict=True)]

    def embed(self, inputs: ModelInputs) -> tuple[list[Tensor], list[Tensor]]:
        """Rows [tokens, (1 + levels) * hidden] of each image and of each video.

        Visual embeddings, and DeepStack's levels beside them where the family has some.
        """
        images: list[Tensor] = []
        videos: list[Tensor] = []
        if inputs.pixel_values is not None and len(_rows(inputs.image_grid_thw)):
            grids = torch.tensor(_rows(inputs.image_grid_thw), device=self.lm_head.weight.device)
            images = self._parts(self._vision.get_image_features(self._pixels(inputs.pixel_values), grids))
        if inputs.pixel_values_videos is not None and len(_rows(inputs.video_grid_thw)):
            grids = torch.tensor(_rows(inputs.video_grid_thw), device=self.lm_head.weight.device)
            videos = self._parts(self._vision.get_video_features(self._pixels(inputs.pixel_values_videos), grids))
        return images, videos

    def positions(self, kinds: Sequence[int], items: Sequence[VisualItem]) -> list[list[int]]:
        """Positions of each token on each axis; kinds: the item of each token, -1 for text."""
        return mrope_positions(kinds, items, float(self._config.vision_config.tokens_per_second))

    def layers(
        self, x: Tensor, positions: Tensor, layers: range, cache: Cache | None, mask: Tensor | None = None
    ) -> Tensor:
        """The output of some layers, causal from an empty cache or of one token a row; eager attention needs the mask.

        x: [rows, n, hidden].  positions: int64 [axes, n].
        """
        rotary = self.language.rotary_emb(x, positions[:, None])
        for number in layers:
            x = self.language.layers[number](
                x, position_embeddings=rotary, attention_mask=mask, past_key_values=cache, use_cache=cache is not None
            )
        return x

    def _parts(self, features: Any) -> list[Tensor]:  # noqa: ANN401 - an output class of transformers
        return list(features.pooler_output)

    def _merged(self, grid: Sequence[int]) -> tuple[int, int, int]:
        frames, rows, columns = grid
        merge = int(self._config.vision_config.spatial_merge_size)
        return frames, rows // merge, columns // merge

    def _pixels(self, pixel_values: npt.ArrayLike) -> Tensor:
        weight = self.lm_head.weight
        pixels = torch.from_numpy(np.ascontiguousarray(pixel_values, dtype=np.float32))
        return pixels.to(weight.device, weight.dtype)


class Qwen2VL(Qwen25VL):
    """Qwen2-VL: a frame is one step of the time axis, however long it is."""

    model_class: ClassVar[Any] = Qwen2VLForConditionalGeneration

    def positions(self, kinds: Sequence[int], items: Sequence[VisualItem]) -> list[list[int]]:
        return mrope_positions(kinds, [VisualItem(item.is_video, item.grid) for item in items], 1.0)


class Qwen3VL(Qwen25VL):
    """Qwen3-VL: every frame of a video is a picture of its own, and DeepStack's levels lie beside the embeddings."""

    model_class: ClassVar[Any] = Qwen3VLForConditionalGeneration

    def positions(self, kinds: Sequence[int], items: Sequence[VisualItem]) -> list[list[int]]:
        frames: list[VisualItem] = []
        seen = dict.fromkeys(range(len(items)), 0)  # tokens of each item so far
        frame_kinds = []
        for kind in kinds:
            if kind >= 0:
                _, rows, columns = items[kind].grid
                if seen[kind] % (rows * columns) == 0:
                    frames.append(VisualItem(False, (1, rows, columns)))
                seen[kind] += 1
            frame_kinds.append(len(frames) - 1 if kind >= 0 else -1)
        return mrope_positions(frame_kinds, frames, 1.0)

    def _parts(self, features: Any) -> list[Tensor]:  # noqa: ANN401 - an output class of transformers
        return [torch.cat(parts, 1) for parts in zip(features.pooler_output, *features.deepstack_features, strict=True)]


class Qwen35VL(Qwen3VL):
    """Qwen3.5: Qwen3-VL's positions and tower, without DeepStack."""

    model_class: ClassVar[Any] = Qwen3_5ForConditionalGeneration

    def _parts(self, features: Any) -> list[Tensor]:  # noqa: ANN401 - an output class of transformers
        return list(features.pooler_output)


class InternVL(Qwen25VL):
    """InternVL: a run of placeholders is an image or a frame, its length says of how many tiles; positions are 1-D."""

    model_class: ClassVar[Any] = InternVLForConditionalGeneration

    def items(self, inputs: ModelInputs) -> tuple[list[VisualItem], list[VisualItem]]:
        runs: list[int] = []
        before = None
        for token in np.ravel(np.asarray(inputs.input_ids)).tolist():
            if token == self._config.image_token_id:
                if token != before:
                    runs.append(0)
                runs[-1] += 1
            before = token
        tile_tokens = int(self._config.image_seq_length)
        return [VisualItem(False, (run // tile_tokens, 1, tile_tokens)) for run in runs], []

    def embed(self, inputs: ModelInputs) -> tuple[list[Tensor], list[Tensor]]:
        if inputs.pixel_values is None:
            return [], []
        features = self._vision.get_image_features(self._pixels(inputs.pixel_values)).pooler_output
        tiles = [item.grid[0] for item in self.items(inputs)[0]]
        return [part.flatten(0, 1) for part in features.split(tiles)], []

    def positions(self, kinds: Sequence[int], items: Sequence[VisualItem]) -> list[list[int]]:  # noqa: ARG002
        return [[place] for place in range(len(kinds))]


FAMILIES: dict[str, type[Qwen25VL]] = {
    "internvl": InternVL,
    "qwen2_vl": Qwen2VL,
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": Qwen3VL,
    "qwen3_5": Qwen35VL,
}


def _rows(grid_thw: npt.ArrayLike | None) -> list[list[int]]:
    return [] if grid_thw is None else np.asarray(grid_thw, dtype=np.int64).reshape(-1, 3).tolist()
