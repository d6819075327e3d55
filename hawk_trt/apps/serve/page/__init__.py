"""The page at /: the files of this folder, with headers that keep them from loading or sending anything elsewhere."""

from importlib.resources import files
from pathlib import PurePath

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}
_HEADERS = {
    # blob: is the image that was chosen, which the page shows
    "content-security-policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def page_routes() -> list[Route]:
    """/ and /page/NAME for each file that it loads. None asks for a key: without one the page cannot ask anything."""
    found = {file.name: file.read_bytes() for file in files(__name__).iterdir() if _kind(file.name)}
    routes = [_route(f"/page/{name}", name, content) for name, content in found.items() if name != "index.html"]
    return [_route("/", "index.html", found["index.html"]), *routes]


def _route(path: str, name: str, content: bytes) -> Route:
    async def send(_: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=_kind(name))

    return Route(path, send, methods=["GET"], include_in_schema=False)


def _kind(name: str) -> str | None:
    return _KINDS.get(PurePath(name).suffix)
