"""The arguments of a Ray Serve application: those of `hawk-trt serve`, and how many replicas of what size.

Ray gives a dictionary, from `serve run ... NAME=VALUE`, where every value is text, or from a config file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from hawk_trt.apps.serve.settings import ServeLimits, ServeSettings, read_api_keys
from hawk_trt.bundle import holds_engines
from hawk_trt.engine_folder import read_engine_manifest
from hawk_trt.errors import InvalidInput
from hawk_trt.pruning.head_weights import read_head_weights
from hawk_trt.request import PruningConfig
from hawk_trt.runtime.vision_cache import DEFAULT_VISION_CACHE_MB

_PRUNING = ("selector", "min_visual_tokens", "query", "quota", "keep_mass", "diversity")
_LISTS = ("api_key", "cors_origin", "allowed_hosts", "remote_host")


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions(ServeLimits):
    """What a replica serves and takes of its machine; `hawk-trt serve --help` explains the options.

    Attributes:
        path: a bundle or engines, on every machine.
        num_gpus: of a replica; None is 1 for engines and device cuda, else 0.
        num_cpus: of a replica; None is as many as threads, else 1.
    """

    path: Path
    device: str | None = None
    target: str | None = None
    threads: int | None = None
    verify: bool = False
    vision_cache_mb: float = DEFAULT_VISION_CACHE_MB
    model_name: str | None = None
    api_key: tuple[str, ...] = ()
    api_key_file: Path | None = None
    cors_origin: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    remote_host: tuple[str, ...] = ()
    no_page: bool = False
    keep_ratio: float | None = None
    min_visual_tokens: int = 1
    head_weights: Path | None = None
    query: str = "paper"
    quota: str = "global"
    selector: str = "hawk"
    selector_seed: int = 0
    keep_mass: float | None = None
    diversity: float = 0.0
    min_replicas: int = 1
    max_replicas: int = 1
    num_gpus: float | None = None
    num_cpus: float | None = None

    def __post_init__(self) -> None:
        ServeLimits.__post_init__(self)
        if not self.path.is_absolute() or not self.path.is_dir():
            raise InvalidInput(
                f"path: {self.path} is no folder here. Give an absolute path, the same on every machine of the cluster"
            )
        if not (0 <= self.min_replicas <= self.max_replicas and self.max_replicas):
            got = f"{self.min_replicas} to {self.max_replicas}"
            raise InvalidInput(f"min_replicas, max_replicas: got {got}, expected 0 <= min <= max and max >= 1")

    @classmethod
    def read(cls, arguments: Mapping[str, object]) -> "ReplicaOptions":
        """The options that Ray gives; a name may have hyphens in place of underscores."""
        given = {name.replace("-", "_"): value for name, value in arguments.items()}
        for name in given:
            if name in ("host", "port"):
                where = "say it in the config file, below http_options"
                raise InvalidInput(f"{name}: Ray Serve opens the port itself; {where}")
            if name not in {entry.name for entry in fields(cls)}:
                raise InvalidInput(f"{name}: unknown. All arguments: hawk-trt serve --help, and docs/scale.md")
        if not given.get("path"):
            raise InvalidInput("path: missing, expected a bundle or engines: path=/models/3b")
        given["path"] = Path.cwd() / str(given["path"])
        for name in _LISTS:
            if isinstance(given.get(name), str):
                given[name] = [given[name]]
        try:
            return TypeAdapter(cls).validate_python(given)
        except ValidationError as error:
            (first, *_) = error.errors()
            place = ".".join(map(str, first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            raise InvalidInput(f"{place}: got {first['input']!r}. {message}" if place else message) from None

    @property
    def runs_engines(self) -> bool:
        """Whether it is TensorRT that runs."""
        return holds_engines(self.path)

    @property
    def rows(self) -> int:
        """Requests that share the decode steps of a replica."""
        if not self.runs_engines:
            return self.max_batch
        return min(self.max_batch, read_engine_manifest(self.path).limits.batch)

    @property
    def resources(self) -> dict[str, float]:
        """What Ray sets aside for a replica."""
        on_gpu = self.runs_engines or (self.device or "").startswith("cuda")
        return {
            "num_gpus": float(on_gpu) if self.num_gpus is None else self.num_gpus,
            "num_cpus": float(self.threads or 1) if self.num_cpus is None else self.num_cpus,
        }

    def settings(self, keep_ratio: float) -> ServeSettings:
        """The settings of a replica; keep_ratio is of the bundle, for where the options name none."""
        return ServeSettings(
            model_name=self.model_name or self.path.resolve().name,
            pruning=PruningConfig(
                keep_ratio=keep_ratio if self.keep_ratio is None else self.keep_ratio,
                head_weights=None if self.head_weights is None else read_head_weights(self.head_weights).values,
                seed=self.selector_seed,
                **{name: getattr(self, name) for name in _PRUNING},
            ),
            remote_hosts=self.remote_host,
            cors_origins=self.cors_origin,
            allowed_hosts=self.allowed_hosts,
            api_keys=read_api_keys(self.api_key_file, self.api_key),
            page=not self.no_page,
            **{entry.name: getattr(self, entry.name) for entry in fields(ServeLimits)},
        )
