"""The arguments of a Ray Serve application: those of `hawk-trt serve`, and how many replicas of what size.

Ray gives a dictionary, from `serve run ... NAME=VALUE`, where every value is text, or from a config file. Cyclopts
reads the dictionary as it reads the options of the command.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclopts import CycloptsError, Parameter

from hawk_trt.apps.cli.main import make_app
from hawk_trt.apps.cli.serve import Served
from hawk_trt.bundle import holds_engines
from hawk_trt.engine_folder import read_engine_manifest
from hawk_trt.errors import HawkError, InvalidInput


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ReplicaOptions(Served):
    """What a replica serves and takes of its machine; `hawk-trt serve --help` explains the options.

    Attributes:
        path: a bundle or engines, on every machine
        num_gpus: of a replica; None is 1 for engines and device cuda, else 0
        num_cpus: of a replica; None is as many as threads, else 1
    """

    path: Path
    min_replicas: int = 1
    max_replicas: int = 1
    num_gpus: float | None = None
    num_cpus: float | None = None

    def __post_init__(self) -> None:
        if not self.path.is_absolute() or not self.path.is_dir():
            raise InvalidInput(
                f"path: {self.path} is no folder here. Give an absolute path, the same on every machine of the cluster"
            )
        if not (0 <= self.min_replicas <= self.max_replicas and self.max_replicas):
            got = f"{self.min_replicas} to {self.max_replicas}"
            raise InvalidInput(f"min_replicas, max_replicas: got {got}, expected 0 <= min <= max and max >= 1")

    @property
    def rows(self) -> int:
        """Requests that share the decode steps of a replica."""
        most = self.limits.max_batch
        return min(most, read_engine_manifest(self.path).limits.batch) if holds_engines(self.path) else most

    @property
    def resources(self) -> dict[str, float]:
        """What Ray sets aside for a replica."""
        on_gpu = holds_engines(self.path) or (self.where.device or "").startswith("cuda")
        return {
            "num_gpus": float(on_gpu) if self.num_gpus is None else self.num_gpus,
            "num_cpus": float(self.where.threads or 1) if self.num_cpus is None else self.num_cpus,
        }


def read_options(arguments: Mapping[str, Any]) -> ReplicaOptions:
    """The options that Ray gives; a name may have hyphens in place of underscores."""
    app = make_app("serve run", command=_given)
    known = {name: argument for argument in app.assemble_argument_collection() for name in argument.names}
    words = []
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if flag in ("--host", "--port"):
            where = "say it in the config file, below http_options"
            raise InvalidInput(f"{name}: Ray Serve opens the port itself; {where}")
        if flag not in known:
            raise InvalidInput(f"{name}: unknown. All arguments: hawk-trt serve --help, and docs/scale.md")
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, bool) and known[flag].hint is not bool:
                raise InvalidInput(f"{name}: got {one}, expected no true or false, which YAML makes of yes and no too")
            if one is not None:
                words.append(f"{flag}={Path.cwd() / str(one) if name == 'path' else one}")
    if not arguments.get("path"):
        raise InvalidInput("path: missing, expected a bundle or engines: path=/models/3b")
    try:
        options: ReplicaOptions = app(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        if isinstance(error.__cause__, HawkError):
            raise error.__cause__ from None
        token = getattr(error, "token", None)
        got = f"{token.keyword.removeprefix('--').replace('-', '_')}: got {token.value!r}. " if token else ""
        raise InvalidInput(f"{got}{' '.join(str(error).split())}") from None
    return options


def _given(options: ReplicaOptions) -> ReplicaOptions:
    return options
