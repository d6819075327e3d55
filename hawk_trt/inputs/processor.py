"""Prompt, images and videos become ModelInputs, as the checkpoint's own processor makes them."""

from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Annotated, TypeAlias

import msgspec

from hawk_trt.bundle import Bundle
from hawk_trt.errors import BundleError, InvalidInput
from hawk_trt.inputs.images import load_image
from hawk_trt.inputs.layout import PromptLayout, prompt_layout
from hawk_trt.inputs.tokenizer import ChatTokenizer, read_settings
from hawk_trt.inputs.turns import VisualItem, as_list
from hawk_trt.models.family import Family, ImageSettings, Patches, TokenRun
from hawk_trt.request import ModelInputs, Request

if TYPE_CHECKING:
    from hawk_trt.inputs.video import Video

_PREPROCESSOR = "preprocessor_config.json"
_VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
# What the Qwen2-VL video processor shares among the frames of a video, where the model's context is no shorter.
_MAX_VIDEO_TOKENS = 128_000
_ALL_FRAMES = 1e6  # a second
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=2)]


class _Sampling(msgspec.Struct):
    """How the checkpoint samples the file of a video."""

    fps: Annotated[float, msgspec.Meta(gt=0)] | None = None
    num_frames: _Count | None = None
    min_frames: _Count | None = None
    max_frames: _Count | None = None


class Processor:
    """Tokenizer, chat template and image settings of one bundle; where it has no `chat`, only ModelInputs work.

    settings: of "image" and "video", None where the bundle does not say how they are resized and normalised.
    """

    def __init__(self, bundle: Bundle, family: Family) -> None:
        self.chat = ChatTokenizer.from_bundle(bundle)
        self._family = family
        self._context = bundle.manifest.language.max_position_embeddings
        self._vocab_size = bundle.manifest.language.vocab_size
        self._special_tokens = bundle.manifest.special_tokens
        images, videos = (read_settings(bundle, name) for name in (_PREPROCESSOR, _VIDEO_PREPROCESSOR))
        own = {
            "image": None if images is None else family.image_settings(images),
            "video": None if videos is None else family.image_settings(videos),
        }
        # videos without settings of their own take those of images, with the family's bound
        of_videos, most = own["video"] or own["image"], family.max_frame_pixels
        if of_videos is not None:
            if own["video"] is None and most is not None:
                of_videos = replace(of_videos, max_pixels=max(min(of_videos.max_pixels, most), of_videos.min_pixels))
            of_videos = replace(of_videos, max_video_tokens=min(self._context, _MAX_VIDEO_TOKENS))
        self.settings = {"image": own["image"], "video": of_videos}
        try:
            self.sampling = msgspec.convert(videos or {}, _Sampling, strict=False)
        except msgspec.ValidationError as error:
            raise BundleError(f"{_VIDEO_PREPROCESSOR}: {error}. Mend it in the checkpoint and export again") from error

    def __call__(self, request: Request) -> ModelInputs:
        """Turn a request's prompt into tensors.

        Raises InvalidInput: a prompt, image or video that cannot be used, more tokens than the model's context, or a
        bundle without a tokenizer.
        """
        prompt, images, videos, tools = request.prompt, request.images, request.videos, request.tools
        if isinstance(prompt, ModelInputs):
            if as_list(images, "image") or as_list(videos, "video") or tools:
                raise InvalidInput(
                    "images, videos, tools: got some beside ModelInputs, which hold their own; leave them out"
                )
            return prompt
        if self.chat is None:
            raise InvalidInput(
                "prompt: this bundle has no tokenizer, so it takes ModelInputs alone. If the checkpoint has "
                "vocab.json but no tokenizer.json, write it with transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), and export again"
            )
        parts = self.chat.encode(prompt, images, videos, tools)
        items = [self._patches(part, request) for part in parts if isinstance(part, VisualItem)]
        expanded = [self._family.placeholder(item, self._special_tokens) for item in items]
        input_ids = self.chat.expand(parts, expanded)
        if len(input_ids) > self._context:  # before a frame or patch of a long video is made
            visual = sum(run.count for own in expanded for run in own if isinstance(run, TokenRun))
            raise InvalidInput(
                f"prompt: got {len(input_ids)} tokens, {visual} of them of images and videos, expected at most "
                f"{self._context}, the model's context. Shorten the text, or take smaller pictures: --max-pixels "
                "(max_pixels=), or fewer frames of a video: --fps, --max-frames"
            )
        return self._family.model_inputs(input_ids, items)

    def layout(self, inputs: ModelInputs, query: str | None = None) -> PromptLayout:
        """Where everything of a prompt lies; InvalidInput where its tensors do not fit each other or the context."""
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

    def _patches(self, item: VisualItem, request: Request) -> Patches:
        """Open an image or video and make patches of it."""
        if item.kind == "image":
            image = load_image(item.source)
            return self._family.images_to_patches([image], self._bounded(item, request))
        video = self.open_video(item)
        patches = self._family.video_to_patches(video.frames, self._bounded(item, request, len(video.frames)))
        seconds = video.seconds_per_frame * self._family.vision.temporal_patch_size
        return replace(patches, kind="video", times=video.times, seconds_per_patch=seconds)

    def open_video(self, item: VisualItem) -> "Video":
        """The frames of a video; the checkpoint's rule samples a file where the item says no other."""
        from hawk_trt.inputs.video import load_video  # most prompts have none

        said = self.sampling
        if item.num_frames is None and isinstance(item.source, str | PathLike):
            fps, most = item.fps or said.fps, item.max_frames or said.max_frames
            if said.num_frames and item.fps is None:  # so many of all
                fps, most = _ALL_FRAMES, min(said.num_frames, most or said.num_frames)
            least = item.min_frames or (said.min_frames and min(said.min_frames, most or said.min_frames))
            item = replace(item, fps=fps, min_frames=least, max_frames=most)
        return load_video(item, self._family.frame_numbers)

    def _bounded(self, item: VisualItem, request: Request, num_frames: int = 1) -> ImageSettings:
        """The settings of one image or video: the checkpoint's, then the prompt's, then its own."""
        settings, bounds = self.settings[item.kind], self._family.pixel_bounds
        if settings is None:
            raise InvalidInput(f"images: this bundle has no {_PREPROCESSOR}, so it takes ModelInputs alone")
        own_bounds = (item.min_pixels or item.max_pixels) and item.kind == "video"
        if bounds == "nothing" and (item.resized or item.total_pixels or own_bounds):
            raise InvalidInput(
                f"{item.kind}: got resized_height, total_pixels or bounds of frames, but this model's "
                "tiles and frames have one size. Leave them out; max_pixels bounds the tiles of an image"
            )
        frames = num_frames if bounds == "video" else 1
        low = settings.min_pixels if request.min_pixels is None else request.min_pixels
        high = settings.max_pixels if request.max_pixels is None else request.max_pixels
        low = low if item.min_pixels is None else item.min_pixels * frames
        high = high if item.max_pixels is None else item.max_pixels * frames
        if bounds == "video" and item.total_pixels is not None:
            high = min(high, item.total_pixels)
        area = self._context * self._family.vision.token_side**2  # of the pixels of a context of visual tokens
        if low > area:
            raise InvalidInput(
                f"min_pixels: got {low}, expected at most {area}: the model's context is {self._context} tokens"
            )
        if bounds == "nothing":
            high = min(high, area)  # so many tiles to choose from
        if not 0 < low <= high:
            raise InvalidInput(f"min_pixels, max_pixels: got {low} and {high}, expected 0 < min_pixels <= max_pixels")
        return replace(settings, min_pixels=low, max_pixels=high, resized=item.resized, total_pixels=item.total_pixels)
