"""The page at /: what is sent, and that it can neither load nor send anything elsewhere."""

import re

import pytest

from serving import serving

NAMES = ("style.css", "page.js", "chat.js", "kept.js", "overlay.js", "icon.svg", "sample.webp")


@pytest.fixture(scope="module")
def server(tiny_bundle):
    with serving(tiny_bundle, api_keys=("secret",)) as running:
        yield running


def test_the_page_and_its_files_are_sent_without_a_key_and_with_headers_that_keep_them_to_this_server(server):
    kinds = {"": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "webp": "image/webp"}
    for name in ("", *NAMES):
        response = server.http.get(f"/page/{name}" if name else "/")
        assert response.status_code == 200, name
        assert response.headers["content-type"].startswith(kinds[name.rpartition(".")[2]])
        policy = response.headers["content-security-policy"].split("; ")
        assert {"default-src 'self'", "object-src 'none'", "base-uri 'none'", "frame-ancestors 'none'"} <= set(policy)
        assert "unsafe" not in " ".join(policy) and "http" not in " ".join(policy)
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cache-control"] == "no-cache"
    assert server.http.head("/").status_code == 200
    assert server.http.post("/").status_code == 405


def test_the_page_names_nothing_elsewhere_has_no_inline_code_and_writes_no_markup(server):
    page = server.http.get("/").text
    assert re.findall(r"(?:src|href)=\"([^\"]+)\"", page) == [
        "page/icon.svg", "page/style.css", "page/page.js", "page/icon.svg"
    ]  # fmt: skip
    assert not re.search(r"<style|style=|<script(?! type=\"module\" src=)|\son\w+=", page)
    scripts = {name: server.http.get(f"/page/{name}").text for name in NAMES if name.endswith(".js")}
    for name, script in scripts.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?:|Storage", script)
        assert set(re.findall(r"from \"\./(.+?)\"", script)) <= set(NAMES), name


def test_only_files_of_the_page_are_sent(server):
    for name in ("__init__.py", "index.html", "nothing.js", "%2e%2e/app.py", "../app.py"):
        assert server.http.get(f"/page/{name}").status_code == 404


def test_the_page_can_be_turned_off(tiny_bundle):
    with serving(tiny_bundle, page=False) as server:
        assert [server.http.get(path).status_code for path in ("/", "/page/page.js", "/health")] == [404, 404, 200]
