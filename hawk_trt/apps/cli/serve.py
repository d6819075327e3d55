"""`hawk-trt serve`: the OpenAI protocol over HTTP, until SIGTERM or Ctrl+C."""

import ipaddress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from hawk_trt.apps.cli.models import kind_of
from hawk_trt.apps.cli.options import KeepRatio, Model, Pruning, Where
from hawk_trt.apps.cli.output import note
from hawk_trt.apps.serve.settings import KEY_VARIABLE, LOOPBACK_HOSTS, ServeLimits, ServeSettings, read_api_keys
from hawk_trt.runtime.vision_cache import DEFAULT_VISION_CACHE_MB

if TYPE_CHECKING:
    from hawk_trt import Pipeline

_LIMITS = Group("Limits", sort_key=4)
_ADDRESS = Group("Address", sort_key=1)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served, to whom and within which limits: all options of the command but the address.

    Attributes:
        model_name: what clients call the model (default: the folder's name)
        api_key: key that opens the server, which others on this machine may see in the list of processes; repeatable
        api_key_file: file of keys that open the server, one a line (default: the one in HAWK_API_KEY, or none)
        cors_origin: web origin (https://example.org) whose pages may call the server; repeatable
        allowed_hosts: names that clients may call the server by: NAME, *.NAME, or * for any; repeatable (default:
            localhost and its addresses; any name if --host is open to other machines)
        remote_host: host to fetch images and videos from: NAME, *.NAME or NAME:PORT; repeatable (default: none)
        no_page: do not serve the page at /
        keep_ratio: share of visual tokens kept, in (0, 1], unless the request says otherwise (default: the bundle's)
        vision_cache_mb: megabytes for the embeddings of images seen before
    """

    where: Where = Where()
    model_name: Annotated[str | None, Parameter(alias="--served-model-name")] = None
    api_key: tuple[str, ...] = ()
    api_key_file: Path | None = None
    cors_origin: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    remote_host: tuple[str, ...] = ()
    no_page: bool = False
    keep_ratio: KeepRatio = None
    pruning: Pruning = Pruning()
    vision_cache_mb: Annotated[float, Parameter(group=_LIMITS)] = DEFAULT_VISION_CACHE_MB
    limits: Annotated[ServeLimits, Parameter(name="*", group=_LIMITS)] = ServeLimits()

    def settings(self, model: Path) -> ServeSettings:
        """The server's settings."""
        return ServeSettings(
            model_name=self.model_name or (str(model) if kind_of(model) == "hub id" else model.resolve().name),
            pruning=self.pruning.config(self.keep_ratio),
            remote_hosts=self.remote_host,
            cors_origins=self.cors_origin,
            allowed_hosts=tuple(name.strip() for names in self.allowed_hosts for name in names.split(",")),
            api_keys=read_api_keys(self.api_key_file, self.api_key),
            page=not self.no_page,
            **asdict(self.limits),
        )

    def open(self, model: Path, settings: ServeSettings) -> "tuple[Pipeline, ServeSettings]":
        """The loaded model, and the settings with the keep ratio of its bundle where the options name none."""
        pipe = self.where.open(model, self.vision_cache_mb)
        return pipe, replace(settings, pruning=self.pruning.config(self.keep_ratio, pipe.bundle))


def serve(
    model: Model,
    served: Served = Served(),
    *,
    host: Annotated[str, Parameter(group=_ADDRESS)] = "127.0.0.1",
    port: Annotated[int, Parameter(group=_ADDRESS)] = 8000,
    config: Annotated[Path | None, Parameter(group=_ADDRESS)] = None,
) -> int:
    """Serve the OpenAI protocol over HTTP: chat completions with images, pruned as each request asks.

    Example: hawk-trt serve artifacts/3b --keep-ratio 0.2 --port 8000

    Args:
        host: address to listen on; 0.0.0.0 listens on all networks
        port: port to listen on; 0 takes a free one
        config: YAML file of options, one a line as keep_ratio: 0.2; the command line wins
    """
    from hawk_trt.apps.serve.app import create_app
    from hawk_trt.apps.serve.server import Server, configure_logging, listen

    del config  # main.options_of_file has read it
    settings = served.settings(model)
    if _is_loopback(host):
        settings = replace(settings, allowed_hosts=(*LOOPBACK_HOSTS, host, *settings.allowed_hosts))
    elif settings.allowed_hosts:
        settings = replace(settings, allowed_hosts=(*settings.allowed_hosts, host))
    configure_logging(settings.log_level)
    listen(host, port).close()  # a port that cannot be opened is said before the model is loaded
    if not settings.api_keys and not _is_loopback(host):
        note(f"warning: {host} is open to others and no key is set. Give one: --api-key-file or {KEY_VARIABLE}")
    pipe, settings = served.open(model, settings)
    with pipe, listen(host, port) as opened:
        name, number = opened.getsockname()[:2]
        note(f"serving {settings.model_name} at http://{f'[{name}]' if ':' in name else name}:{number}/v1")
        server = Server(create_app(pipe, settings))
        server.run(sockets=[opened])
    return 0 if server.started else 1


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
