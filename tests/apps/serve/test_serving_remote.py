"""Images by address: only of allowed hosts, and never from where the server stands."""

import asyncio
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from hawk_trt.apps.serve import remote_images
from hawk_trt.apps.serve.errors import ApiError
from hawk_trt.apps.serve.remote_images import RemoteImages, is_public
from serving import SAMPLES, question, serving

PICTURE = (SAMPLES / "0-colour.png").read_bytes()
PLACE = "messages[0].content[0].image_url"


NONSENSE = ("http://[bad/", "//[", "http://", "ftp://images.example/x", "javascript:1", "http://images.example:99999/",
            "ü", "http://images.example:x/", "a b", "file:///etc/passwd")  # fmt: skip


class Host(BaseHTTPRequestHandler):
    """A web server on this machine, which no request may reach unless a test says that loopback is public."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(f"{self.headers['Host']}{self.path}")
        moved = {"/moved": "/image.png", "/round": "/round", "/inside": "http://127.0.0.1:1/secret"}.get(self.path)
        moved = NONSENSE[int(self.path[1:])] if self.path[1:].isdigit() else moved
        if moved:
            self.send_response(302)
            self.send_header("Location", moved)
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            content = {"/image.png": PICTURE, "/large": bytes(2_000_000)}.get(self.path, b"")
            self.wfile.write(content)
            if self.path == "/slow":
                threading.Event().wait(1)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def port():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def names(monkeypatch):
    """What a name resolves to, for a test to fill; each name is resolved so often."""
    known, asked = {}, []

    async def resolve(host, _):
        asked.append(host)
        if host not in known:
            raise OSError("no such name")
        return known[host]

    monkeypatch.setattr(remote_images, "resolve", resolve)
    known["asked"] = asked
    return known


@contextmanager
def loopback_is_public(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(remote_images, "is_public", lambda address: address == "127.0.0.1")
        yield


def fetch(url, *hosts, max_bytes=1_000_000, seconds=5.0):
    return asyncio.run(RemoteImages(hosts, max_bytes, seconds).fetch(url, PLACE))


def refusal(url, *hosts, **limits):
    with pytest.raises(ApiError) as refused:
        fetch(url, *hosts, **limits)
    return refused.value


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.9.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "192.0.2.1", "224.0.0.1", "239.1.1.1", "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0",
        "fc00::1", "fd12::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
        "::7f00:1", "::a9fe:a9fe", "::ffff:0:7f00:1", "::ffff:0:169.254.169.254", "fec0::1", "3fff::1", "5f00::1",
        "100::1",
        "2606:4700::5efe:7f00:1", "2606:4700::200:5efe:10.0.0.1", "64:ff9b:1::a00:1", "4000::1",
        "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001::1", "2001:db8::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_of_the_internet_are_known(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_of_the_internet_are_known(address):
    assert is_public(address)


@pytest.mark.parametrize(
    ("addresses", "reason"),
    [
        (["127.0.0.1"], "public"),
        (["::ffff:127.0.0.1"], "public"),
        (["8.8.8.8", "10.0.0.1"], "public"),
        (["169.254.169.254"], "public"),
        ([], "public"),
    ],
)
def test_an_allowed_name_that_leads_inside_is_refused(names, port, addresses, reason):
    names["images.example"] = addresses
    Host.asked.clear()
    assert reason in refusal(f"http://images.example:{port}/image.png", f"images.example:{port}").body.error.message
    assert Host.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x", "http://2130706433/x", "http://0x7f000001/x", "http://0177.0.0.1/x", "http://127.1/x",
        "http://[::1]/x", "http://[::ffff:127.0.0.1]/x", "http://localhost/x", "http://localhost./x",
        "http://images.example@127.0.0.1/x", "http://127.0.0.1#@images.example/x", "http://images.example:22/x",
        "http://images.example.evil.example/x", "http://evilimages.example/x", "ftp://images.example/x",
        "gopher://images.example/x", "file:///etc/passwd", "http:///x", "http://", "//images.example/x",
        "http://images.example:99999/x", "http://[::1/x", "http://images.example/a b", "http://images.example/\r\nX: y",
        "http://\uff49mages.example\\@127.0.0.1/x", "javascript:alert(1)", "",
    ],
)  # fmt: skip
def test_addresses_of_other_hosts_are_refused_before_any_is_resolved(names, url):
    assert refusal(url, "images.example").status == 400
    assert names["asked"] == []


def test_a_number_that_is_an_address_is_checked_as_one_even_where_it_is_allowed():
    for host in ("2130706433", "127.1", "0x7f000001", "[::1]", "localhost"):
        assert "public" in refusal(f"http://{host}/x", host.strip("[]")).body.error.message


def test_an_image_of_an_allowed_host_is_fetched_from_the_address_that_was_checked(names, port, monkeypatch):
    names["cdn.images.example"] = ["127.0.0.1"]
    with loopback_is_public(monkeypatch):
        assert fetch(f"http://CDN.images.example:{port}/image.png", f"*.images.example:{port}") == PICTURE
    assert names["asked"] == ["cdn.images.example"]  # once: what it means a moment later does not matter
    assert Host.asked[-1] == f"cdn.images.example:{port}/image.png"


def test_redirects_are_checked_as_addresses_of_their_own(names, port, monkeypatch):
    names["images.example"] = ["127.0.0.1"]
    base, host = f"http://images.example:{port}", f"images.example:{port}"
    with loopback_is_public(monkeypatch):
        assert fetch(f"{base}/moved", host) == PICTURE
        assert "redirects" in refusal(f"{base}/round", host).body.error.message
        assert "fetches nothing from 127.0.0.1" in refusal(f"{base}/inside", host).body.error.message


@pytest.mark.parametrize("number", range(len(NONSENSE)))
def test_a_redirect_to_nonsense_is_refused(names, port, monkeypatch, number):
    names["images.example"] = ["127.0.0.1"]
    with loopback_is_public(monkeypatch):
        refused = refusal(f"http://images.example:{port}/{number}", f"images.example:{port}")
    assert refused.status == 400 and refused.body.error.code in ("image_host", "image_fetch")


def test_size_time_and_status_of_a_fetched_image_are_bounded(names, port, monkeypatch):
    names["images.example"] = ["127.0.0.1"]
    base, host = f"http://images.example:{port}", f"images.example:{port}"
    with loopback_is_public(monkeypatch):
        assert refusal(f"{base}/large", host).status == 413
        assert "within 0.2 seconds" in refusal(f"{base}/slow", host, seconds=0.2).body.error.message
        assert "404" in refusal(f"{base}/missing", host).body.error.message
    assert "cannot be fetched" in refusal("http://gone.example/x", "gone.example").body.error.message


def test_a_request_with_an_address_is_answered_as_with_the_image(names, port, monkeypatch, tiny_bundle):
    names["images.example"] = ["127.0.0.1"]
    url = f"http://images.example:{port}/image.png"
    with loopback_is_public(monkeypatch), serving(tiny_bundle, remote_hosts=(f"images.example:{port}",)) as server:
        answers = [
            server.http.post("/v1/chat/completions", json=question("What colour is the heart?", picture)).json()
            for picture in (url, SAMPLES / "0-colour.png")
        ]
        assert answers[0]["choices"] == answers[1]["choices"]
        refused = server.http.post("/v1/chat/completions", json=question("What?", "http://10.0.0.1/image.png"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "image_host")
