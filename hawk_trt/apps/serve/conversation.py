"""The messages of a request on their way to the pipeline: checked, their images decoded.

What comes in is a stranger's: only data URLs and allowed addresses name images, only common formats are opened, and
the sizes of all images together are bounded before any of them is decoded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from hawk_trt.apps.serve.protocol import ChatMessage, ImagePart
from hawk_trt.apps.serve.refusal import Refusal, invalid
from hawk_trt.apps.serve.settings import ServeSettings
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import data_url_bytes, load_image, resize

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Pillow reads more, and some of that by starting other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_LOW_DETAIL_PX = 512

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image of a request, not yet fetched or decoded.

    where: its place in the request.  url: data: or http(s).  low: shrink it to fit 512 x 512.
    """

    where: str
    url: str
    low: bool

    @property
    def remote(self) -> bool:
        """Whether it has to be fetched."""
        return not self.url.startswith("data:")


def image_sources(messages: Sequence[ChatMessage], settings: ServeSettings) -> tuple[ImageSource, ...]:
    """Check the messages, and list their images in order.

    Raises:
        Refusal: a role or content that is not known, or more than the server allows.
    """
    if len(messages) > settings.max_messages:
        count = f"got {len(messages)}, expected at most {settings.max_messages}"
        raise invalid(f"messages: {count}", "messages", "too_many_messages")
    sources = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role not in _ROLES:
            raise invalid(f"{where}.role: got {message.role[:60]!r}, expected {', '.join(_ROLES)}", f"{where}.role")
        if not message.content and message.content != "":
            raise invalid(f"{where}.content: expected text, or a list with a text or image", f"{where}.content")
        for number, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                place = f"{where}.content[{number}].image_url"
                if message.role != "user":
                    raise invalid(f"{place}: only a user's message has images, this one is {message.role}'s", place)
                sources.append(ImageSource(place, part.image_url.url, part.image_url.detail == "low"))
    if len(sources) > settings.max_images:
        raise invalid(
            f"messages: got {len(sources)} images, expected at most {settings.max_images}",
            "messages",
            "too_many_images",
        )
    return tuple(sources)


def pictures(
    sources: Sequence[ImageSource], fetched: Mapping[str, bytes], settings: ServeSettings
) -> tuple[Picture, ...]:
    """Decode all images: uint8 [height, width, 3] each.

    Args:
        sources: in order.
        fetched: the bytes of the remote ones, by their place.
        settings: with the limit of their pixels together.

    Raises:
        Refusal: an image that cannot be used.
    """
    decoded = []
    left = settings.max_image_pixels
    for source in sources:
        try:
            content = fetched[source.where] if source.remote else data_url_bytes(source.url)
            if not content:
                raise InvalidInput("image (bytes): got none")
            picture = load_image(content, max_pixels=left, formats=_FORMATS)
        except InvalidInput as error:
            reason = str(error).partition(": ")[2]
            raise invalid(f"{source.where}: {reason}", source.where, "invalid_image") from error
        left -= picture.shape[0] * picture.shape[1]
        decoded.append(_shrunk(picture) if source.low else picture)
    return tuple(decoded)


def pipeline_messages(messages: Sequence[ChatMessage], images: Sequence[Picture]) -> list[dict[str, Any]]:
    """The messages as Pipeline.prepare takes them, with the decoded images in their places."""
    rest = iter(images)
    return [
        {
            "role": _ROLES[message.role],
            "content": message.content
            if isinstance(message.content, str)
            else [
                {"type": "image", "image": next(rest)}
                if isinstance(part, ImagePart)
                else {"type": "text", "text": part.text}
                for part in message.content or ()
            ],
        }
        for message in messages
    ]


def check_remote(sources: Sequence[ImageSource], allowed: bool) -> None:
    """Refuse what is no data URL where nothing may be fetched.

    Raises:
        Refusal: an address.
    """
    for source in sources:
        if source.remote and not allowed:
            message = f"{source.where}: this server takes images as data URLs alone: data:image/png;base64,..."
            raise Refusal(400, message, param=source.where, code="image_host")


def _shrunk(picture: Picture) -> Picture:
    height, width = picture.shape[:2]
    scale = min(1.0, _LOW_DETAIL_PX / max(height, width))
    if scale == 1.0:
        return picture
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return np.asarray(resize(picture, *size, Image.Resampling.BICUBIC))
