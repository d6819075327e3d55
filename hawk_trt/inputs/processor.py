"""Prompt, images and videos become ModelInputs, as the checkpoint's own processor makes them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hawk_trt.bundle import Bundle
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import load_image
from hawk_trt.inputs.layout import PromptLayout, prompt_layout
from hawk_trt.inputs.messages import VisualItem, as_list
from hawk_trt.inputs.streamed_rows import joined_rows
from hawk_trt.inputs.tokenizer import ChatTokenizer, read_settings
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
        images = read_settings(bundle, _PREPROCESSOR)
        self._image_settings = None if images is None else family.image_settings(images)
        self._video_settings = self._settings_for_videos(read_settings(bundle, _VIDEO_PREPROCESSOR))
        self._special_tokens = bundle.manifest.special_tokens

    @property
    def takes_images(self) -> bool:
        """Whether the bundle says how images are resized and normalised."""
        return self._image_settings is not None

    def __call__(self, request: Request) -> ModelInputs:
        """Turn a request's prompt into tensors.

        Raises:
            InvalidInput: a prompt, image or video that cannot be used, more tokens than the model's context, or a
                bundle without a tokenizer.
        """
        prompt, images, videos, tools = request.prompt, request.images, request.videos, request.tools
        if isinstance(prompt, ModelInputs):
            if as_list(images, "image") or as_list(videos, "video") or tools:
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

    def layout(self, inputs: ModelInputs, query: str | None = None) -> PromptLayout:
        """Where everything of a prompt lies.

        Raises:
            InvalidInput: tensors that do not fit each other, or more of them than the model's context.
        """
        layout = prompt_layout(inputs, self._family, self._special_tokens, query, self.chat)
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
        loaded = [load_image(item.source) for item in items]
        settings = [self._bounded(self._image_settings, item, min_pixels, max_pixels) for item in items]
        if all(own == settings[0] for own in settings):
            return self._family.images_to_patches(loaded, settings[0])
        return _joined(
            self._family.images_to_patches([image], own) for image, own in zip(loaded, settings, strict=True)
        )

    def _videos(
        self, items: Sequence[VisualItem], min_pixels: int | None, max_pixels: int | None
    ) -> tuple[Patches | None, list[float], list[Sequence[float]]]:
        if not items:
            return None, [], []
        from hawk_trt.inputs.video import load_video  # most prompts have none

        clips, seconds, times = [], [], []
        for item in items:
            video = load_video(
                item.source,
                item.fps,
                item.max_frames,
                self._family.frame_numbers,
                num_frames=item.num_frames,
                min_frames=item.min_frames,
                start=item.start,
                end=item.end,
                timestamps=item.timestamps,
            )
            settings = self._bounded(self._video_settings, item, min_pixels, max_pixels, len(video.frames))
            clips.append(self._family.video_to_patches(video.frames, settings))
            seconds.append(video.seconds_per_frame * self._family.vision.temporal_patch_size)
            times.append(video.times)
        return _joined(clips), seconds, times

    def _bounded(
        self,
        settings: ImageSettings | None,
        item: VisualItem,
        min_pixels: int | None,
        max_pixels: int | None,
        num_frames: int = 1,
    ) -> ImageSettings:
        """The settings of one image or video: the checkpoint's, then the prompt's, then its own."""
        if settings is None:
            raise InvalidInput(f"images: this bundle has no {_PREPROCESSOR}, so it takes ModelInputs alone")
        bounds = self._family.pixel_bounds
        own_bounds = (item.min_pixels or item.max_pixels) and item.kind == "video"
        if bounds == "nothing" and (item.resized or item.total_pixels or own_bounds):
            raise InvalidInput(
                f"{item.kind}: got resized_height, total_pixels or bounds of frames, but this model's "
                "tiles and frames have one size. Leave them out; max_pixels bounds the tiles of an image"
            )
        frames = num_frames if bounds == "video" and item.kind == "video" else 1
        low = settings.min_pixels if min_pixels is None else min_pixels
        high = settings.max_pixels if max_pixels is None else max_pixels
        low = low if item.min_pixels is None else item.min_pixels * frames
        high = high if item.max_pixels is None else item.max_pixels * frames
        if bounds == "video" and item.total_pixels is not None:
            high = min(high, item.total_pixels)
        if not 0 < low <= high:
            raise InvalidInput(f"min_pixels, max_pixels: got {low} and {high}, expected 0 < min_pixels <= max_pixels")
        return replace(settings, min_pixels=low, max_pixels=high, resized=item.resized, total_pixels=item.total_pixels)

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


def _joined(parts: Iterable[Patches]) -> Patches:
    """Images or videos one after another."""
    several = list(parts)
    pixels = joined_rows([part.pixel_values for part in several])
    return Patches(pixels, np.concatenate([part.grid_thw for part in several]))
