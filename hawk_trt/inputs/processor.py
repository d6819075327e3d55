"""Prompt, images and videos become ModelInputs, as the checkpoint's own processor makes them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hawk_trt.bundle import Bundle
from hawk_trt.errors import BundleError, InvalidInput
from hawk_trt.inputs.images import load_image
from hawk_trt.inputs.layout import PromptLayout, prompt_layout
from hawk_trt.inputs.messages import VisualItem
from hawk_trt.inputs.prompt import ChatTokenizer
from hawk_trt.inputs.streamed_rows import joined_rows
from hawk_trt.inputs.video import load_video
from hawk_trt.models.family import Family, ImageSettings, Patches, TokenRun
from hawk_trt.request import ModelInputs, Request

_PREPROCESSOR = "preprocessor_config.json"
_VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
# What the Qwen2-VL video processor shares among the frames of a video, where the model's context is no shorter.
_MAX_VIDEO_TOKENS = 128_000


class Processor:
    """Tokenizer, chat template and image settings of one bundle.

    Attributes:
        chat: the tokenizer and chat template, None where the bundle has none: then only ModelInputs work.
    """

    def __init__(self, bundle: Bundle, family: Family) -> None:
        self.chat = ChatTokenizer.from_bundle(bundle)
        self._family = family
        self._context = bundle.manifest.language.max_position_embeddings
        self._vocab_size = bundle.manifest.language.vocab_size
        images = _read(bundle, _PREPROCESSOR)
        self._image_settings = None if images is None else family.image_settings(images)
        self._video_settings = self._settings_for_videos(_read(bundle, _VIDEO_PREPROCESSOR))
        self._special_tokens = bundle.manifest.special_tokens

    def __call__(self, request: Request) -> ModelInputs:
        """Turn a request's prompt into tensors.

        Raises:
            InvalidInput: a prompt, image or video that cannot be used, more tokens than the model's context, or a
                bundle without a tokenizer.
        """
        prompt, images, videos, tools = request.prompt, request.images, request.videos, request.tools
        if isinstance(prompt, ModelInputs):
            if len(images) or len(videos) or len(tools):
                raise InvalidInput(
                    "images, videos, tools: got some beside ModelInputs, which hold their own; leave them out"
                )
            return prompt
        min_pixels, max_pixels = request.min_pixels, request.max_pixels
        if self.chat is None:
            raise InvalidInput(
                "prompt: this bundle has no tokenizer, so it takes ModelInputs alone. If the checkpoint has "
                "vocab.json but no tokenizer.json, write it with transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), and export again"
            )
        encoded = self.chat.encode(prompt, images, videos, tools)
        image_items = [item for item in encoded.visual if item.kind == "image"]
        video_items = [item for item in encoded.visual if item.kind == "video"]
        pictures = self._images(image_items, min_pixels, max_pixels)
        clips, seconds, times = self._videos(video_items, min_pixels, max_pixels)
        kinds = [item.kind for item in encoded.visual]
        grids = {"image": _grids(pictures), "video": _grids(clips)}
        frame_times = {"image": iter([()] * len(image_items)), "video": iter(times)}
        expanded = [
            self._family.placeholder(kind, next(grids[kind]), next(frame_times[kind]), self._special_tokens)
            for kind in kinds
        ]
        input_ids = self.chat.expand(encoded, expanded)
        self._check_context(len(input_ids), expanded)
        return self._family.model_inputs(
            input_ids,
            kinds,
            pictures,
            clips,
            None if clips is None else np.array(seconds, np.float32),
        )

    def layout(self, inputs: ModelInputs, query: str = "paper") -> PromptLayout:
        """Where everything of a prompt lies.

        Raises:
            InvalidInput: tensors that do not fit each other, or more of them than the model's context.
        """
        layout = prompt_layout(
            inputs,
            self._family,
            self._special_tokens,
            query,
            None if self.chat is None else self.chat.turn_query_mask,
        )
        if layout.input_ids.min() < 0 or layout.input_ids.max() >= self._vocab_size:
            raise InvalidInput(
                f"input_ids: got ids from {layout.input_ids.min()} to {layout.input_ids.max()}, "
                f"expected 0 to {self._vocab_size - 1}"
            )
        if layout.next_position >= self._context:
            raise InvalidInput(
                f"prompt: got {layout.next_position} positions, expected fewer than {self._context}, the model's "
                "context. Shorten the text, or shrink the images with max_pixels"
            )
        return layout

    def _images(self, items: Sequence[VisualItem], min_pixels: int | None, max_pixels: int | None) -> Patches | None:
        if not items:
            return None
        settings = _bounded(self._image_settings, min_pixels, max_pixels)
        loaded = [load_image(item.source) for item in items]
        return self._family.images_to_patches(loaded, settings)

    def _videos(
        self, items: Sequence[VisualItem], min_pixels: int | None, max_pixels: int | None
    ) -> tuple[Patches | None, list[float], list[Sequence[float]]]:
        if not items:
            return None, [], []
        settings = _bounded(self._video_settings, min_pixels, max_pixels)
        clips, seconds, times = [], [], []
        for item in items:
            video = load_video(item.source, item.fps, item.max_frames, self._family.frame_numbers)
            clips.append(self._family.video_to_patches(video.frames, settings))
            seconds.append(video.seconds_per_frame * self._family.vision.temporal_patch_size)
            times.append(video.times)
        pixels = joined_rows([clip.pixel_values for clip in clips])
        return Patches(pixels, np.concatenate([clip.grid_thw for clip in clips])), seconds, times

    def _settings_for_videos(self, own: Mapping[str, Any] | None) -> ImageSettings | None:
        """Settings of videos: the checkpoint's own ones for them, else those of images with the family's bound."""
        settings = self._image_settings if own is None else self._family.image_settings(own)
        if settings is None:
            return None
        most = self._family.max_frame_pixels
        if own is None and most is not None:
            settings = replace(settings, max_pixels=max(min(settings.max_pixels, most), settings.min_pixels))
        return replace(settings, max_video_tokens=min(self._context, _MAX_VIDEO_TOKENS))

    def _check_context(self, num_tokens: int, expanded: Sequence[Sequence[str | TokenRun]]) -> None:
        """Refuse more tokens than the model's context before a frame or patch of a video is made."""
        if num_tokens <= self._context:
            return
        visual = sum(part.count for parts in expanded for part in parts if isinstance(part, TokenRun))
        raise InvalidInput(
            f"prompt: got {num_tokens} tokens, {visual} of them of images and videos, expected at most "
            f"{self._context}, the model's context. Take smaller pictures: --max-pixels (max_pixels=); "
            "or fewer frames of a video: --fps, --max-frames"
        )


def _grids(patches: Patches | None) -> Iterator[list[int]]:
    """The rows of grid_thw, one after another."""
    return iter([] if patches is None else patches.grid_thw.tolist())


def _read(bundle: Bundle, name: str) -> Mapping[str, Any] | None:
    text = bundle.read_text(name)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise BundleError(
            f"{name}: not JSON ({error}). Mend it in the checkpoint and export again: make export"
        ) from error
    if not isinstance(content, dict):
        raise BundleError(f"{name}: got a {type(content).__name__}, expected an object. Export again: make export")
    return content


def _bounded(settings: ImageSettings | None, min_pixels: int | None, max_pixels: int | None) -> ImageSettings:
    if settings is None:
        raise InvalidInput(f"images: this bundle has no {_PREPROCESSOR}, so it takes ModelInputs alone")
    low = settings.min_pixels if min_pixels is None else min_pixels
    high = settings.max_pixels if max_pixels is None else max_pixels
    if not 0 < low <= high:
        raise InvalidInput(f"min_pixels, max_pixels: got {low} and {high}, expected 0 < min_pixels <= max_pixels")
    return replace(settings, min_pixels=low, max_pixels=high)
