"""The server process: uvicorn around the application, with an orderly end and no patience for half a request."""

import asyncio
import logging
import signal
import socket
import threading
from typing import Any
from weakref import ref

import anyio
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from hawk_trt.apps.serve.middleware import CONNECTION, Connection
from hawk_trt.apps.serve.service import Service, log
from hawk_trt.errors import InvalidInput

_HEADER_SECONDS = 10.0
_MAX_HEADER_BYTES = 32_768
_LAST_SECONDS = 3.0  # of a drain: uvicorn waits for what is still being sent, and as long again may all else take
_BACKLOG = 1024
_UNREAD_SECONDS = 15.0
_POLL_SECONDS = 0.1


def _timed_connection(app_state: dict[str, Any], **options: Any) -> H11Protocol:  # noqa: ANN401 - uvicorn's own
    """A connection, closed when it brings no request for a while: uvicorn itself waits for headers without end."""
    requests = Connection()
    connection = H11Protocol(app_state=app_state | {CONNECTION: requests}, **options)
    loop, known = asyncio.get_running_loop(), ref(connection)  # a closed one, and what it received, must not wait

    def look(count: int) -> None:
        """Close it where no request has come since the last look and none is being answered."""
        connection = known()
        if connection is None or connection.transport.is_closing():
            return
        if requests.answering or requests.count > count:
            loop.call_later(_HEADER_SECONDS, look, requests.count)
        else:
            connection.transport.close()

    loop.call_later(_HEADER_SECONDS, look, 0)
    return connection


def make_server(app: FastAPI) -> uvicorn.Server:
    """A server that runs until SIGTERM or SIGINT; then it takes nothing new, finishes what runs, and ends.

    The port stays open meanwhile, to say that the server is not ready. A second signal ends it at once.
    """
    service: Service = app.state.service
    last_seconds = min(_LAST_SECONDS, service.settings.drain_seconds / 4)
    draining: list[asyncio.Task[None]] = []

    async def drain() -> None:
        with anyio.move_on_after(service.settings.drain_seconds - 2 * last_seconds):
            while service.open_requests:
                await anyio.sleep(_POLL_SECONDS)
        server.should_exit = True

    def stop(sig: signal.Signals) -> None:
        if draining:
            server.force_exit = server.should_exit = True
            return
        log.info("%s: finishing %d requests", sig.name, service.open_requests)
        service.state = "draining"
        draining.append(asyncio.get_running_loop().create_task(drain()))

    async def with_signals(scope: Scope, receive: Receive, send: Send) -> None:
        """The application; when it begins, signals come here, and no more to uvicorn, which would close the port."""
        if scope["type"] == "lifespan" and threading.current_thread() is threading.main_thread():
            for sig in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(sig, stop, sig)
        await app(scope, receive, send)

    server = uvicorn.Server(
        uvicorn.Config(
            with_signals,
            http=_timed_connection,  # type: ignore[arg-type]  # uvicorn calls it, and asks for no class
            ws="none",
            limit_concurrency=service.settings.max_connections,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            timeout_graceful_shutdown=last_seconds,  # type: ignore[arg-type]  # asyncio, which gets it, takes parts
            server_header=False,
            log_config=None,
            lifespan="on",
        )
    )
    return server


def listen(host: str, port: int) -> socket.socket:
    """Open the port. The system closes a connection whose client does not take what was sent for _UNREAD_SECONDS."""
    if not 0 <= port <= 65535:  # the system would take another one in silence
        raise InvalidInput(f"port: got {port}, expected 0 (any that is free) to 65535")
    try:
        kind = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.create_server(kind[4][:2], family=kind[0], backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInput(f"{host}:{port}: cannot listen there ({reason}). Choose others: --host, --port") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; its connections inherit the option
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * _UNREAD_SECONDS))
    return opened


def configure_logging(level: str = "info") -> None:
    """Log to stderr: what this project and uvicorn have to say, without what clients sent."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
