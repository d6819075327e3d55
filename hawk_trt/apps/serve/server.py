"""The server process: uvicorn around the application, with an orderly end and no patience for half a request."""

import asyncio
import logging
import socket
from typing import Any
from weakref import ref

import anyio
import anyio.to_thread
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from hawk_trt.apps.serve.service import Service, log
from hawk_trt.errors import InvalidInput

_HEADER_SECONDS = 10.0
_MAX_HEADER_BYTES = 32_768
_LAST_SECONDS = 3.0  # of a drain: uvicorn waits for what is still being sent, and as long again may all else take
_BACKLOG = 1024
_UNREAD_SECONDS = 15.0
_POLL_SECONDS = 0.1


def _timed_connection(**options: Any) -> H11Protocol:  # noqa: ANN401 - uvicorn's own
    """A connection, closed when it brings no request for a while: uvicorn itself waits for headers without end."""
    connection = H11Protocol(**options)
    loop, known = asyncio.get_running_loop(), ref(connection)  # a closed one, and what it received, must not wait

    def look(seen: "ref[RequestResponseCycle] | None") -> None:
        """Close it where no request has come since the last look and none is being answered."""
        connection = known()
        if connection is None or connection.transport.is_closing():
            return
        request = connection.cycle
        if request is None or (request.response_complete and seen is not None and seen() is request):
            connection.transport.close()
        else:
            loop.call_later(_HEADER_SECONDS, look, ref(request))

    loop.call_later(_HEADER_SECONDS, look, None)
    return connection


class Server(uvicorn.Server):
    """Runs until SIGTERM or SIGINT; then it takes nothing new, finishes what runs, and ends.

    The port stays open meanwhile, to say that the server is not ready. A second signal ends it at once.
    """

    def __init__(self, app: FastAPI) -> None:
        self._service: Service = app.state.service
        settings = self._service.settings
        last_seconds = min(_LAST_SECONDS, settings.drain_seconds / 4)
        self._drain_seconds = settings.drain_seconds - 2 * last_seconds
        super().__init__(
            uvicorn.Config(
                app,
                http=_timed_connection,  # type: ignore[arg-type]  # uvicorn calls it, and asks for no class
                ws="none",
                limit_concurrency=settings.max_connections,
                h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
                timeout_graceful_shutdown=last_seconds,  # a part of a second counts too
                server_header=False,
                log_config=None,
                lifespan="on",
            )
        )

    async def main_loop(self) -> None:
        """Until a signal has come, and then until the open requests are answered: uvicorn closes the port after."""
        await super().main_loop()
        log.info("stopping: finishing %d requests", self._service.open_requests)
        self._service.state = "draining"
        with anyio.move_on_after(self._drain_seconds):
            while self._service.open_requests and not self.force_exit:
                await anyio.sleep(_POLL_SECONDS)
        if self._service.open_requests:  # they hear that the server is stopping, while uvicorn still sends
            await anyio.to_thread.run_sync(self._service.batcher.close, 0.0)

    def handle_exit(self, *_: object) -> None:
        """Note a signal. The process does not end by it, as it would with uvicorn's own, but with code 0."""
        self.force_exit = self.should_exit
        self.should_exit = True


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
