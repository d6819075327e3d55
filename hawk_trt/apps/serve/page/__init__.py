"""The page at /: the files of this folder, with headers that keep them from loading or sending anything elsewhere."""

from importlib.resources import files
from pathlib import PurePath

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
    routes = []
    for file in files(__name__).iterdir():
        kind = _KINDS.get(PurePath(file.name).suffix)
        if kind is not None:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            sent = Response(file.read_bytes(), headers=_HEADERS, media_type=kind)  # each time the same
            routes.append(Route(path, sent, methods=["GET"], include_in_schema=False))
    return routes
