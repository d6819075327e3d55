"""Images that a request names by address: fetched from allowed hosts alone, and never from a private network.

A name is resolved once, every address that it has must be public, and the connection goes to an address that was
checked: what the name means a moment later does not matter. A redirect is a new address, checked the same way.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import h11

from hawk_trt.apps.serve.errors import ApiError, invalid

_PORTS = {"http": 80, "https": 443}
_MAX_REDIRECTS = 3
_MAX_HEADER_BYTES = 16_384
_CHUNK_BYTES = 65_536
# Addresses that carry another one, which routers on the way may take out: translated IPv4, tunnels.
_CARRIERS = tuple(ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))


@dataclass(frozen=True, slots=True)
class Target:
    """One address to fetch: its parts, checked against the allowed hosts."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """For the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


class RemoteImages:
    """Fetches images."""

    def __init__(self, hosts: Sequence[str], max_bytes: int, timeout_s: float) -> None:
        self._hosts = tuple(host.lower().rstrip(".") for host in hosts)
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def fetch(self, url: str, where: str) -> bytes:
        """The bytes at an address.

        Args:
            url: http or https.
            where: the part of the request that names it.

        Raises:
            ApiError: a host that is not allowed, an address that is not public, or an answer that is no success, too
                large or too late.
        """
        try:
            return await asyncio.wait_for(self._follow(url, where), self._timeout_s)
        except asyncio.TimeoutError:
            raise invalid(f"{where}: not fetched within {self._timeout_s:g} seconds", where, "image_fetch") from None
        except (OSError, h11.RemoteProtocolError) as error:
            kind = type(error).__name__  # the error itself tells of the network behind the server
            raise invalid(f"{where}: cannot be fetched ({kind})", where, "image_fetch") from error

    async def _follow(self, url: str, where: str) -> bytes:
        for _ in range(_MAX_REDIRECTS + 1):
            target = self.target(url, where)
            addresses = await resolve(target.host, target.port)
            if not addresses or not all(is_public(address) for address in addresses):
                raise invalid(f"{where}: the host has no public address", where, "image_host")
            content = await self._get(target, addresses[0], where)
            if isinstance(content, bytes):
                return content
            url = urljoin(url, content)
        raise invalid(f"{where}: more than {_MAX_REDIRECTS} redirects", where, "image_fetch")

    def target(self, url: str, where: str) -> Target:
        """The parts of an address whose host is allowed.

        Raises:
            ApiError: another scheme or host, or no address at all.
        """
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").rstrip(".").encode("idna").decode("ascii").lower()
            port = parts.port or _PORTS.get(parts.scheme, 0)
        except ValueError:  # UnicodeError too
            raise invalid(f"{where}: not an address", where, "image_host") from None
        if parts.scheme not in _PORTS or not host or "@" in parts.netloc:
            raise invalid(f"{where}: expected http(s)://host/path", where, "image_host")
        names = {host} if port == _PORTS[parts.scheme] else {f"{host}:{port}"}
        names |= {"*" + name[place:] for name in names for place, char in enumerate(name) if char == "."}
        if not names & set(self._hosts):
            raise invalid(
                f"{where}: this server fetches no images from {host[:80]}; send the image as a data URL",
                where,
                "image_host",
            )
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not path.isascii() or any(char <= " " or char == "\x7f" for char in path):
            raise invalid(f"{where}: expected a percent-encoded address", where, "image_host")
        return Target(parts.scheme, host, port, path)

    async def _get(self, target: Target, address: str, where: str) -> bytes | str:
        """The content of a target, or where it has moved to."""
        tls = ssl.create_default_context() if target.scheme == "https" else None
        reader, writer = await asyncio.open_connection(
            address, target.port, ssl=tls, server_hostname=None if tls is None else target.host
        )
        try:
            conn = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEADER_BYTES)
            headers = {
                "Host": target.authority,
                "User-Agent": "hawk-trt",
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "Connection": "close",
            }
            writer.write(conn.send(h11.Request(method="GET", target=target.path, headers=list(headers.items()))) or b"")
            writer.write(conn.send(h11.EndOfMessage()) or b"")
            await writer.drain()
            return await self._read(conn, reader, where)
        finally:
            writer.close()

    async def _read(self, conn: h11.Connection, reader: asyncio.StreamReader, where: str) -> bytes | str:
        content = bytearray()
        while True:
            event = conn.next_event()
            if event is h11.NEED_DATA:
                conn.receive_data(await reader.read(_CHUNK_BYTES))
            elif isinstance(event, h11.Response):
                moved = _location(event)
                if moved is not None:
                    return moved
                if event.status_code != 200:
                    raise invalid(f"{where}: its host answered {event.status_code}", where, "image_fetch")
            elif isinstance(event, h11.Data):
                content += event.data
                if len(content) > self._max_bytes:
                    message = f"{where}: more than {self._max_bytes:,} bytes"
                    raise ApiError(413, message, param=where, code="image_too_large")
            elif isinstance(event, h11.EndOfMessage):
                return bytes(content)
            elif isinstance(event, h11.ConnectionClosed):
                raise ConnectionError


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host, as the system finds them.

    Raises:
        OSError: it has none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for _, _, _, _, address in found]


def is_public(address: str) -> bool:
    """Whether an address is of the internet: not loopback, private, link-local, multicast, reserved or a carrier."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif any(ip in net for net in _CARRIERS):
            return False
    return ip.is_global and not ip.is_multicast


def _location(response: h11.Response) -> str | None:
    """Where a redirect leads."""
    if response.status_code not in (301, 302, 303, 307, 308):
        return None
    return next((value.decode("latin-1") for name, value in response.headers if name == b"location"), None)
