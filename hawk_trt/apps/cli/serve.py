"""`hawk-trt serve`: the OpenAI protocol over HTTP, until SIGTERM or Ctrl+C."""

import argparse
import ipaddress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hawk_trt.apps.cli import options
from hawk_trt.apps.cli.output import note
from hawk_trt.apps.serve.settings import KEY_VARIABLE, ServeLimits, ServeSettings, read_api_keys
from hawk_trt.errors import BackendError
from hawk_trt.runtime.vision_cache import DEFAULT_VISION_CACHE_MB

if TYPE_CHECKING:
    from hawk_trt import Pipeline

SUMMARY = "serve the OpenAI protocol over HTTP: chat completions with images, pruned as each request asks"
_PORT = 8000


def add_parser(subparsers: "options.Subparsers[argparse.ArgumentParser]") -> None:
    """Add the command's options."""
    parser = options.add_command(subparsers, "serve", SUMMARY)
    options.add_pipeline_options(parser)
    group = parser.add_argument_group("address")
    group.add_argument("--host", default="127.0.0.1", help="0.0.0.0 is all networks (default: %(default)s)")
    group.add_argument("--port", type=int, default=_PORT, help="0 takes a free one (default: %(default)s)")
    group.add_argument("--model-name", help="what clients call the model (default: the folder's name)")
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"keys that open the server, one a line (default: the one in {KEY_VARIABLE}, or none)",
    )
    group.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN", help="whose pages may call it; repeatable"
    )
    group.add_argument(
        "--remote-host",
        action="append",
        default=[],
        metavar="HOST",
        help="images may be fetched from there: NAME, *.NAME or NAME:PORT; repeatable (default: data URLs alone)",
    )
    group.add_argument("--no-page", action="store_true", help="no page at / to ask from")
    group = parser.add_argument_group("pruning of a request that does not say otherwise")
    group.add_argument(
        "--keep-ratio", type=float, help="share of visual tokens kept, in (0, 1] (default: the bundle's)"
    )
    options.add_pruning_options(group)
    options.add_selector_options(group)
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--vision-cache-mb",
        type=float,
        default=DEFAULT_VISION_CACHE_MB,
        metavar="N",
        help="megabytes of embeddings of images asked about before (default: %(default)s)",
    )
    for field in fields(ServeLimits):
        text = field.metadata["help"]
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=int if field.type in (int, int | None) else float,
            default=field.default,
            metavar="N",
            help=text if field.default is None else f"{text} (default: %(default)s)",
        )


def run(args: argparse.Namespace) -> int:
    """Serve.

    Raises:
        HawkError: anything that cannot be used or done as asked for.
    """
    try:
        from hawk_trt.apps.serve.app import create_app
        from hawk_trt.apps.serve.server import Server, configure_logging, listen
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "hawk_trt":
            raise
        raise BackendError(
            f"{error.name}: not installed. pip install 'hawk-trt[serve]', or fastapi uvicorn prometheus-client"
        ) from error
    settings = settings_of(args)
    if not settings.api_keys and not _is_loopback(args.host):
        note(f"warning: {args.host} is open to others and no key is set. Give one: --api-key-file or {KEY_VARIABLE}")
    configure_logging()
    pipe, settings = open_served(args, settings)
    with pipe, listen(args.host, args.port) as port:
        host, number = port.getsockname()[:2]
        note(f"serving {settings.model_name} at http://{f'[{host}]' if ':' in host else host}:{number}/v1")
        server = Server(create_app(pipe, settings))
        server.run(sockets=[port])
    return 0 if server.started else 1


def open_served(args: argparse.Namespace, settings: ServeSettings) -> "tuple[Pipeline, ServeSettings]":
    """The pipeline that the options name, and the settings with the keep ratio of its bundle where they name none.

    Raises:
        HawkError: it cannot be loaded as asked for.
    """
    pipe = options.open_pipeline(args, args.vision_cache_mb)
    if args.keep_ratio is None:
        kept = replace(settings.pruning, keep_ratio=pipe.bundle.manifest.keep_ratio)
        settings = replace(settings, pruning=kept)
    return pipe, settings


def settings_of(args: argparse.Namespace) -> ServeSettings:
    """The settings that the options name.

    Raises:
        InvalidInput: a value out of its range, or a key file without a key.
    """
    limits = {field.name: getattr(args, field.name) for field in fields(ServeLimits)}
    return ServeSettings(
        model_name=args.model_name or args.bundle.resolve().name,
        pruning=options.selected_pruning(args, 1.0 if args.keep_ratio is None else args.keep_ratio),
        remote_hosts=tuple(args.remote_host),
        cors_origins=tuple(args.cors_origin),
        api_keys=read_api_keys(args.api_key_file),
        page=not args.no_page,
        **limits,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
