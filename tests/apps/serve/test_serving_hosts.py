"""Who may call a server of one machine: names in Host, pages in Origin; and clients that never read."""

import socket
from contextlib import ExitStack

import openai
import pytest

from hawk_trt.apps.cli.serve import Served
from hawk_trt.apps.serve.middleware import is_allowed
from hawk_trt.apps.serve.server import listen
from hawk_trt.apps.serve.settings import LOOPBACK_HOSTS, read_api_keys
from hawk_trt.errors import InvalidInput
from serving import question, serving, wait_for


@pytest.fixture(scope="module")
def server(tiny_bundle):
    with serving(
        tiny_bundle, allowed_hosts=(*LOOPBACK_HOSTS, "*.mine.example"), cors_origins=("https://ok.example",)
    ) as running:
        yield running


@pytest.fixture(scope="module")
def plain(tiny_bundle):
    with serving(tiny_bundle) as running:
        yield running


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST.:8000", "a.localhost:1", "127.0.0.1:80", "[::1]:8000", "[::1]"]
)
def test_this_machines_names_are_allowed(host):
    assert is_allowed(host, LOOPBACK_HOSTS)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "localhost:80.evil.example", "127.0.0.1.nip.io", "",
     "[::2]", "127.0.0.1:80:80", "notlocalhost"],
)  # fmt: skip
def test_other_names_are_not(host):
    assert not is_allowed(host, LOOPBACK_HOSTS)
    assert is_allowed(host, ("*",))


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/models", "/metrics", "/health", "/", "/nothing", "/openapi.json"]
)
def test_a_page_that_was_rebound_is_refused(server, path):
    for headers in ({"host": "evil.example:8000"}, {"host": "evil.example", "origin": "http://evil.example"}):
        method = "POST" if "chat" in path else "GET"
        refused = server.http.request(method, path, json=question(), headers=headers)
        assert refused.status_code == 403
        error = refused.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("permission_error", "host", "host_not_allowed")
        assert "evil.example" in error["message"] and "--allowed-hosts" in error["message"]
        assert set(refused.headers) & {"location", "access-control-allow-origin"} == set()


@pytest.mark.parametrize("origin", ["null", "http://evil.example", "http://localhost:3000", "http://[", "file://"])
def test_a_page_of_others_is_refused(server, origin):
    refused = server.http.post("/v1/chat/completions", json=question(), headers={"origin": origin})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin_not_allowed")


def test_own_pages_and_those_that_were_named_are_answered(server):
    for headers in (
        {"origin": server.url},
        {"origin": "https://ok.example"},
        {"host": "a.mine.example", "origin": "https://a.mine.example"},
        {},
    ):
        assert server.http.post("/v1/chat/completions", json=question(), headers=headers).status_code == 200


def test_a_server_of_one_machine_checks_and_one_that_is_open_does_not(plain, tiny_bundle):
    assert plain.http.get("/v1/models", headers={"host": "api.example"}).status_code == 200
    served = Served(allowed_hosts=("a.example, b.example", "c.example")).settings(tiny_bundle)
    assert served.allowed_hosts == ("a.example", "b.example", "c.example")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_other_protocols_of_openai_say_what_to_use(plain, path):
    refused = plain.http.post(path, json={"model": "tiny-vlm", "prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "unknown_url")
    assert "/v1/chat/completions" in refused.json()["error"]["message"]


def test_errors_repeat_little_of_what_a_client_sent(plain):
    long = "x" * 100_000
    bodies = [
        question(model=long),
        question(temperature=long),
        question(pruning={long: 1}),
        question(pruning={"selector": long}),
        question("What?", "data:image/png;base64," + long[:-1] + "%"),
        question("What?", "http://" + long),
        question() | {"messages": [{"role": long, "content": "x"}]},
        question() | {"messages": [{"role": "user", "content": [{"type": long}]}]},
    ]
    for body in bodies:
        refused = plain.http.post("/v1/chat/completions", json=body)
        assert refused.status_code in (400, 404)
        assert len(refused.content) < 2_000
    refused = plain.http.get("/v1/models/" + long[:8_000])
    assert refused.status_code == 404 and len(refused.content) < 2_000


def test_no_answer_leads_to_the_name_that_a_client_gave(plain):
    moved = plain.http.get("/metrics/", headers={"host": "evil.example"})
    assert (moved.status_code, "location" in moved.headers) == (200, False)


def test_a_client_that_never_reads_is_closed(tiny_bundle, monkeypatch):
    monkeypatch.setattr("hawk_trt.apps.serve.server._UNREAD_SECONDS", 1.0)
    with serving(tiny_bundle) as server, ExitStack() as clients:
        server.http.close()
        for _ in range(4):
            client = clients.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", server.port))
            client.setblocking(False)  # the server stops reading when nothing of its answers is taken
            with pytest.raises((BlockingIOError, ConnectionError)):  # or has closed this one already
                while True:
                    client.send(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        wait_for(lambda: not server.server.server_state.connections)


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_there_is_not_is_refused_and_no_other_taken(port):
    with pytest.raises(InvalidInput, match=f"port: got {port}, expected 0"):
        listen("127.0.0.1", port)


def test_a_key_opens_the_server_and_nothing_else_does(tiny_bundle):
    with serving(tiny_bundle, api_keys=("first", "second")) as server:
        for key in ("first", "second"):
            with server.openai(key) as client:
                assert client.chat.completions.create(**question()).choices
        with server.openai("third") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        for header in ("", "first", "Basic first", "Bearer", "Bearer firs", "Bearer first ä"):
            headers = {"authorization": header.encode()}
            for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/responses"):
                refused = server.http.get(path, headers=headers)
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert server.http.post("/v1/chat/completions", json=question(), headers=headers).status_code == 401
        assert server.http.get("/health").status_code == server.http.get("/ready").status_code == 200


def test_pages_of_others_may_call_the_server_only_where_they_were_allowed_to(plain, tiny_bundle):
    origin = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in plain.http.options("/v1/chat/completions", headers=origin).headers
    with serving(tiny_bundle, cors_origins=("https://page.example",)) as server:
        allowed = server.http.options("/v1/chat/completions", headers=origin).headers
        assert allowed["access-control-allow-origin"] == "https://page.example"
        asked = {"access-control-request-headers": "authorization,content-type,x-stainless-os,http-referer"}
        asked |= {"access-control-request-private-network": "true"}  # OpenAI's client in a page, in Chrome
        allowed = server.http.options("/v1/chat/completions", headers=origin | asked)
        assert allowed.status_code == 200 and "x-stainless-os" in allowed.headers["access-control-allow-headers"]
        assert allowed.headers["access-control-allow-private-network"] == "true"
        other = server.http.options("/v1/chat/completions", headers=origin | {"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_keys_come_from_the_command_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HAWK_API_KEY", "of the environment")
    (tmp_path / "keys").write_text("first\nsecond\n", encoding="utf-8-sig")
    assert read_api_keys(None) == ("of the environment",)
    assert read_api_keys(None, (" given\n",)) == ("given",)
    assert read_api_keys(tmp_path / "keys", ("given",)) == ("given", "first", "second")
    with pytest.raises(InvalidInput, match="empty key"):
        read_api_keys(None, (" ",))
