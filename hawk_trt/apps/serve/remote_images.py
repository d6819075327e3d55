"""Images and videos that a request names by address: fetched from allowed hosts, and never from a private network.

A name is resolved once, every address that it has must be public, and the connection goes to an address that was
checked: what the name means a moment later does not matter. A redirect is a new address, checked the same way.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from typing import Any
from urllib.parse import urljoin, urlsplit

import anyio
import httpcore

from hawk_trt.apps.serve.errors import ApiError, invalid

_PORTS = {"http": 80, "https": 443}
_MAX_REDIRECTS = 3
_HEADERS = [("User-Agent", "hawk-trt"), ("Accept", "image/*, video/*"), ("Accept-Encoding", "identity")]
_UNICAST = ipaddress.IPv6Network("2000::/3")  # beyond it IPv6 has local and translated addresses alone
# Addresses that carry an IPv4 address, which routers on the way may take out, and those of documents.
_CARRIERS = tuple(map(ipaddress.IPv6Network, ("2002::/16", "2001::/32", "3fff::/20")))
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)  # the 32 bits before an IPv4 address


class RemoteImages:
    """Fetches images and videos."""

    def __init__(self, hosts: Sequence[str], max_bytes: int, timeout_s: float) -> None:
        self._hosts = tuple(host.lower().rstrip(".") for host in hosts)
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._tls = ssl.create_default_context() if hosts else None  # reading the authorities takes its time

    async def fetch(self, url: str, where: str) -> bytes:
        """The bytes at an address, which a part of the request (where) names.

        Refused: a host that is not allowed or not public, and an answer that is no success, too large or too late.
        """
        network = _PublicNetwork()
        try:
            with anyio.fail_after(self._timeout_s):
                async with httpcore.AsyncConnectionPool(self._tls, network_backend=network) as pool:
                    for _ in range(_MAX_REDIRECTS + 1):
                        content = await self._get(pool, self._checked(url, where), where)
                        if isinstance(content, bytes):
                            return content
                        try:
                            url = urljoin(url, content)
                        except ValueError:
                            raise invalid(f"{where}: redirected to what is no address", where, "image_fetch") from None
            raise invalid(f"{where}: more than {_MAX_REDIRECTS} redirects", where, "image_fetch")
        except _NotPublicError:
            raise invalid(f"{where}: the host has no public address", where, "image_host") from None
        except TimeoutError:
            raise invalid(f"{where}: not fetched within {self._timeout_s:g} seconds", where, "image_fetch") from None
        except (OSError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            kind = type(error).__name__  # the error itself tells of the network behind the server
            raise invalid(f"{where}: cannot be fetched ({kind})", where, "image_fetch") from error

    def _checked(self, url: str, where: str) -> httpcore.URL:
        """The parts of an address whose host is allowed."""
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").rstrip(".").encode("idna").decode("ascii").lower()
            port = parts.port or _PORTS.get(parts.scheme, 0)
        except ValueError:  # UnicodeError too
            raise invalid(f"{where}: not an address", where, "image_host") from None
        if parts.scheme not in _PORTS or not host or "@" in parts.netloc:
            raise invalid(
                f"{where}: got {url[:60]!r}, expected a data URL, or http(s)://host/path", where, "image_host"
            )
        names = {host} if port == _PORTS[parts.scheme] else {f"{host}:{port}"}
        names |= {"*" + name[place:] for name in names for place, char in enumerate(name) if char == "."}
        if not names & set(self._hosts):
            message = f"{where}: this server fetches nothing from {host[:80]}; send a data URL"
            raise invalid(message, where, "image_host")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not path.isascii() or any(char <= " " or char == "\x7f" for char in path):
            raise invalid(f"{where}: expected a percent-encoded address", where, "image_host")
        return httpcore.URL(scheme=parts.scheme, host=host, port=port, target=path)

    async def _get(self, pool: httpcore.AsyncConnectionPool, url: httpcore.URL, where: str) -> bytes | str:
        """The content at an address, or where it has moved to."""
        content = bytearray()
        async with pool.stream("GET", url, headers=_HEADERS) as response:
            moved = next((value for name, value in response.headers if name.lower() == b"location"), None)
            if moved is not None and response.status in (301, 302, 303, 307, 308):
                return moved.decode("latin-1")
            if response.status != 200:
                raise invalid(f"{where}: its host answered {response.status}", where, "image_fetch")
            async for part in response.aiter_stream():
                content += part
                if len(content) > self._max_bytes:
                    message = f"{where}: more than {self._max_bytes:,} bytes"
                    raise ApiError(413, message, param=where, code="image_too_large")
        return bytes(content)


class _NotPublicError(Exception):
    """A host that has no address, or one that is not of the internet."""


class _PublicNetwork(httpcore.AnyIOBackend):
    """Connects to a host only where all its addresses are public, and then to one of those that were checked."""

    async def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:  # noqa: ANN401 - httpcore's own
        addresses = await resolve(host, port)
        if not addresses or not all(is_public(address) for address in addresses):
            raise _NotPublicError
        return await super().connect_tcp(addresses[0], port, *args, **options)


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host, as the system finds them; OSError where it has none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for _, _, _, _, address in found]


def is_public(address: str) -> bool:
    """Whether an address is of the internet: not loopback, private, link-local, multicast, reserved or a carrier."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip not in _UNICAST or any(ip in net for net in _CARRIERS) or (int(ip) >> 32) & 0xFFFF_FFFF in _ISATAP:
            return False
    return ip.is_global and not ip.is_multicast
