"""What /v1/models tells: the one model that a server has, and what a request may ask of it."""

from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, Struct

from hawk_trt.apps.serve.settings import ServeSettings
from hawk_trt.request import QUERIES, QUOTAS, SELECTORS

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline


class Abilities(Struct, frozen=True):
    """An extension: what a request may ask for."""

    family: str
    dtype: str
    keep_ratio: Annotated[float, Meta(description="Of a request that says none.")]
    selector: Annotated[str, Meta(description="Of a request that says none.")]
    selectors: list[str]
    queries: list[str]
    quotas: list[str]
    max_tokens: int
    max_images: int
    max_body_bytes: int
    remote_images: Annotated[bool, Meta(description="Whether images may be fetched from some hosts.")]


class Model(Struct, frozen=True):
    """A model."""

    id: str
    object: Literal["model"]
    created: Annotated[int, Meta(description="When the server began, in seconds since 1970.")]
    owned_by: str
    hawk: Abilities


class ModelList(Struct, frozen=True):
    """All models."""

    object: Literal["list"]
    data: list[Model]


def served_model(pipe: "Pipeline", settings: ServeSettings, created: int) -> Model:
    """The model that a server has."""
    manifest = pipe.bundle.manifest
    return Model(
        settings.model_name,
        "model",
        created,
        "hawk_trt",
        Abilities(
            family=manifest.family,
            dtype=manifest.dtype,
            keep_ratio=settings.pruning.keep_ratio,
            selector=str(settings.pruning.selector),
            selectors=list(SELECTORS),
            queries=list(QUERIES),
            quotas=list(QUOTAS),
            max_tokens=settings.max_tokens,
            max_images=settings.max_images,
            max_body_bytes=settings.max_body_bytes,
            remote_images=bool(settings.remote_hosts),
        ),
    )
