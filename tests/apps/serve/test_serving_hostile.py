"""What a server must refuse: each request gets a 4xx that says why, and the server answers the next one."""

import json
import re
import struct
import zlib
from io import BytesIO

import pytest
from PIL import Image

from serving import MODEL, SAMPLES, data_url, image, question, raw_request, serving, wait_for

PICTURE = SAMPLES / "0-colour.png"
LIMITS = {"max_body_mb": 1.0, "max_images": 4, "max_messages": 8, "max_image_pixels": 1_000_000, "max_tokens": 32}


@pytest.fixture(scope="module")
def server(tiny_bundle):
    with serving(tiny_bundle, max_prompt_tokens=500, remote_hosts=("images.example",), **LIMITS) as running:
        yield running


def with_picture(url, **fields):
    return question("What is it?", url, **fields)


def bomb(width=60_000, height=60_000):
    """A PNG of a few hundred bytes that says it is of 3.6 gigapixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def saved(kind, size=(8, 8)):
    file = BytesIO()
    Image.new("RGB", size).save(file, kind)
    return file.getvalue()


def message(**fields):
    return question() | {"messages": [{"role": "user", "content": "Hello."} | fields]}


def pruned(**fields):
    return question("What is it?", PICTURE, pruning=fields)


BODIES = {
    "nothing at all": (b"", "body"),
    "no JSON": (b"{'model'", "body"),
    "no object": (b"[]", "body"),
    "half a JSON": (json.dumps(question()).encode()[:-5], "body"),
    "not UTF-8": (b'{"model": "\xff\xfe", "messages": [{"role": "user"}]}', "UTF-8"),
    "nested a hundred thousand deep": (b'{"metadata":' + b"[" * 100_000, "body"),
    "NaN as a number": (json.dumps(question(temperature=float("nan"))).encode(), "temperature"),
    "half of a surrogate pair": (b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', "body"),
    "no messages": ({"model": MODEL}, "messages"),
    "an empty list of messages": (question() | {"messages": []}, "messages"),
    "a template": (question(chat_template="{{ 1 }}"), "chat_template"),
    "a grammar": (question(guided_json={"type": "object"}), "guided_json"),
    "tokens that end": (question(stop_token_ids=[5]), "stop_token_ids"),
    "a call of a tool": (message(tool_calls=[{"id": "1", "type": "function"}]), "tool_calls"),
    "pixels of one image": (
        question() | {"messages": [{"role": "user", "content": [image(PICTURE) | {"max_pixels": 50176}]}]},
        "messages[0].content[0].max_pixels",
    ),
    "an unknown role": (message(role="tool"), "tool"),
    "no content": (message(content=None), "content"),
    "an empty list of content": (message(content=[]), "content"),
    "content of an unknown type": (message(content=[{"type": "audio_url", "audio_url": {"url": "x"}}]), "audio_url"),
    "content that is a number": (message(content=5), "content"),
    "images beside the content, as Ollama has them": (message(images=["iVBORw0KGgo"]), "images"),
    "an image in a part of text": (
        message(content=[{"type": "text", "text": "What is it?", "image_url": {"url": "x"}}]),
        "image_url",
    ),
    "two sources of an image": (message(content=[{"type": "image", "image": "x", "url": "y"}]), "url"),
    "a system prompt beside the messages, as Anthropic has it": (question(system="Be brief."), "system"),
    "the assistant last": (question() | {"messages": [{"role": "assistant", "content": "x"}]}, "assistant"),
    "an image of the system": (
        question() | {"messages": [{"role": "system", "content": [image(PICTURE)]}, question()["messages"][0]]},
        "system",
    ),
    "too many messages": (question() | {"messages": question()["messages"] * 9}, "messages"),
    "too long a prompt": (question("word " * 2000), "tokens"),
    "too many images": (question("What is it?", *[PICTURE] * 5), "images"),
    "no answer token": (question(max_tokens=0), "max_tokens"),
    "a temperature below 0": (question(temperature=-1), "temperature"),
    "a temperature that is infinite": (json.dumps(question(temperature=1)).replace("1,", "1e999,").encode(), "temp"),
    "top_p above 1": (question(top_p=1.5), "top_p"),
    "an empty stop": (question(stop=""), "stop"),
    "too many stops": (question(stop=["a"] * 65), "stop"),
    "a seed that is a text": (question(seed="7"), "seed"),
    "too many choices": (question(n=9), "n"),
    "no choice": (question(n=0), "n"),
    "tools": (question(tools=[{"type": "function", "function": {"name": "f"}}]), "tools"),
    "top_logprobs without logprobs": (question(top_logprobs=2), "top_logprobs"),
    "too many top_logprobs": (question(logprobs=True, top_logprobs=21), "top_logprobs"),
    "a bias of no token": (question(logit_bias={"word": 5}), "logit_bias"),
    "a bias of a token that the model lacks": (question(logit_bias={"464": 5}), "logit_bias"),
    "too strong a bias": (question(logit_bias={"5": 101}), "logit_bias"),
    "too many biases": (question(logit_bias=dict.fromkeys(range(1025), 0)), "logit_bias"),
    "too strong a penalty": (question(frequency_penalty=2.5), "frequency_penalty"),
    "a repetition_penalty of 0": (question(repetition_penalty=0), "repetition_penalty"),
    "a repetition_penalty beyond float32": (question(repetition_penalty=1e300), "repetition_penalty"),
    "min_p above 1": (question(min_p=1.5), "min_p"),
    "top_k below -1": (question(top_k=-2), "top_k"),
    "JSON as the answer": (question(response_format={"type": "json_object"}), "response_format"),
    "audio": (question(modalities=["text", "audio"]), "modalities"),
    "a keep ratio of 0": (pruned(keep_ratio=0), "pruning.keep_ratio"),
    "a selector that is code": (pruned(selector="__import__('os')"), "pruning.selector"),
    "a field of pruning that is unknown": (pruned(head_weights=[1]), "head_weights"),
    "keep_mass for a selector without scores": (pruned(selector="random", keep_mass=0.5), "pruning.keep_mass"),
    "a file of the server": (with_picture("file:///etc/passwd"), "image_url"),
    "a path of the server": (with_picture("/etc/passwd"), "image_url"),
    "a host that is not allowed": (with_picture("http://169.254.169.254/latest/meta-data"), "169.254.169.254"),
    "no base64": (with_picture("data:image/png;base64,%%%"), "base64"),
    "an empty image": (with_picture("data:image/png;base64,"), "got none"),
    "a text as an image": (with_picture(data_url(b"hello, this is text")), "not an image"),
    "a truncated image": (with_picture(data_url(PICTURE.read_bytes()[:200])), "damaged"),
    "a decompression bomb": (with_picture(data_url(bomb())), "pixels"),
    "a format that starts programs": (with_picture(data_url(saved("EPS"), "png")), "not an image"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "size"), [("PNG", (1900, 1400)), ("JPEG", (1900, 1400)), ("AVIF", (1900, 1400)), ("TIFF", (300, 200))]
)
def test_more_pixels_than_allowed_are_shrunk(server, kind, size):
    large = [data_url(saved(kind, size))] * 2
    answered = server.http.post("/v1/chat/completions", json=question("What is it?", *large))
    assert answered.status_code == 200, answered.text
    assert answered.json()["usage"]["visual_tokens"] > 100


@pytest.mark.parametrize("name", BODIES)
def test_a_wrong_request_is_refused_with_a_reason_and_the_server_goes_on(server, name):
    body, reason = BODIES[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    refused = server.http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert reason in error["message"] or reason in (error["param"] or "")
    assert not re.search(r"Traceback|/[a-z]+/[a-z_]+/|\.py|0x[0-9a-f]{6}", error["message"]), error["message"]
    assert server.http.get("/ready").status_code == 200
    wait_for(lambda: server.service.open_requests == 0)


PLACES = {
    "seed": (question(seed="7"), "invalid_value"),
    "n": (question(n=True), "invalid_value"),
    "logprobs": (question(logprobs=0), "invalid_value"),
    "tools": (question(tools=[{"type": "function"}]), "unsupported"),
    "stop[1]": (question(stop=["x", 3]), "invalid_value"),
    "pruning.keep_ratio": (pruned(keep_ratio="0.2"), "invalid_value"),
    "messages[0].role": (message(role=None), "invalid_value"),
    "messages[0].content": (message(content=5), "invalid_value"),
    "messages[0].tool_call_id": (message(tool_call_id="me"), "unsupported"),
    "messages[0].content[0].image_url.url": (message(content=[image("") | {"image_url": {"url": 1}}]), "invalid_value"),
    "messages[0].content[0].text": (message(content=[{"type": "text"}]), "invalid_value"),
    "messages[0].content[0]": (message(content=[{"type": "text", "text": "a", "images": ["x"]}]), "unsupported"),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_error_names_the_place_of_the_fault(server, place):
    body, code = PLACES[place]
    error = server.http.post("/v1/chat/completions", json=body).json()["error"]
    assert (error["param"], error["code"]) == (place, code)
    assert error["message"].startswith(f"{place}: ")


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
RAW = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "two lengths": (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
    "a length and chunks": (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "a length below 0": (HEAD + b"Content-Length: -1\r\n\r\n", 400),
    "a huge header": (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Big: " + b"a" * 100_000 + b"\r\n\r\n", 431),
    "a huge path": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 414),
    "chunks that are none": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    "a body that says it is large": (HEAD + b"Content-Length: 1000000000\r\nExpect: 100-continue\r\n\r\n", 413),
    "form fields": (HEAD.replace(b"application/json", b"text/plain") + b"Content-Length: 2\r\n\r\n{}", 415),
    "another method": (b"DELETE /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
    "another path": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
}


@pytest.mark.parametrize("name", RAW)
def test_wrong_http_is_refused_and_the_server_goes_on(server, name):
    content, status = RAW[name]
    answer = raw_request(server.port, content)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert server.http.get("/ready").status_code == 200
    wait_for(lambda: server.service.open_requests == 0)


@pytest.mark.parametrize("length", ["told", "chunked"])
def test_a_body_that_is_too_large_is_refused_even_to_a_client_that_sends_it_all(server, length):
    body = json.dumps(with_picture("data:image/png;base64," + "A" * 8_000_000)).encode()
    content = body if length == "told" else (body[place : place + 65536] for place in range(0, len(body), 65536))
    refused = server.http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
    wait_for(lambda: server.service.open_requests == 0)


def test_values_that_ask_for_nothing_are_taken(server):
    neutral = {
        "n": 1, "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [],
        "top_logprobs": 0, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "skip_special_tokens": True,
        "response_format": {"type": "text"}, "user": "me", "metadata": {"a": None}, "store": False, "top_p": 0,
        "service_tier": "auto", "modalities": ["text"], "tool_choice": None, "stream": None, "stop": None,
    }  # fmt: skip
    assert server.ask(**neutral).status_code == 200


def test_keys_that_are_not_known_are_taken_and_told(server):
    def part(**more):
        return {"type": "text", "text": "What colour is the heart?"} | more

    picture = image(PICTURE) | {"uuid": "a"}
    picture["image_url"] |= {"format": "image/png", "detail": None}
    chat = [
        {"role": "system", "content": "Be brief.", "name": None},
        {"role": "user", "name": "bob", "content": [picture, part(cache_control={"type": "ephemeral"})]},
        {"role": "assistant", "content": "cyan", "reasoning_content": "I see", "refusal": None, "annotations": None},
        {"role": "user", "content": "And?"},
    ]
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image(PICTURE), part()]},
        {"role": "assistant", "content": "cyan"},
        {"role": "user", "content": "And?"},
    ]
    odd = {"foo": 1, "nothing": None, "é\r\nx-evil: 1": 2, "top_logprobs": 0, "logprobs": None, "tools": None}
    got = server.ask(messages=chat, **odd)
    assert got.status_code == 200
    assert got.headers["x-hawk-ignored"] == (
        "foo, ???x-evil??1, messages[1].name, messages[1].content[0].uuid, messages[1].content[0].image_url.format, "
        "messages[1].content[1].cache_control, messages[2].reasoning_content"
    )
    assert "x-evil" not in got.headers
    expected = server.ask(messages=plain)
    assert "x-hawk-ignored" not in expected.headers
    assert got.json()["choices"] == expected.json()["choices"]
    streamed = server.ask(messages=chat, stream=True, **odd)
    assert streamed.headers["x-hawk-ignored"] == got.headers["x-hawk-ignored"]
    many = server.ask(**{f"{number}{'k' * 1000}": 1 for number in range(200)})
    assert many.status_code == 200 and len(many.headers["x-hawk-ignored"]) < 2000


def test_an_answer_of_the_assistant_may_be_null(server):
    def chat(content):
        return [question()["messages"][0], {"role": "assistant"} | content, {"role": "user", "content": "And?"}]

    answers = [
        server.ask(messages=chat(content)).json()["choices"] for content in ({"content": None}, {"content": ""}, {})
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("limit", [LIMITS["max_tokens"] + 1, 2048, 32_768, 2**40])
def test_more_answer_tokens_than_allowed_are_as_many_as_allowed(server, name, limit):
    body = question("Count.", logit_bias={"5": 100}) | {"max_tokens": None, name: limit}
    got = server.http.post("/v1/chat/completions", json=body).json()
    assert got["usage"]["completion_tokens"] == LIMITS["max_tokens"]
    assert got["choices"][0]["finish_reason"] == "length"


def test_an_image_may_be_a_text_and_its_scheme_in_capitals(server):
    def ask(image_url):
        part = {"type": "image_url", "image_url": image_url}
        content = [part, {"type": "text", "text": "What colour is the heart?"}]
        return server.ask(messages=[{"role": "user", "content": content}]).json()["choices"]

    url = data_url(PICTURE)
    capitals = url.replace("data:image/png;base64", "DATA:image/png;BASE64")
    assert ask(url) == ask({"url": url}) == ask(capitals) == ask({"url": capitals})
    assert ask(url) == ask(url.partition(",")[2]) == ask({"url": url.partition(",")[2]})


def test_the_types_of_other_protocols_are_taken(server):
    def ask(*content):
        return server.ask(messages=[{"role": "user", "content": [*content]}])

    url, text = data_url(PICTURE), "What colour is the heart?"
    expected = ask(image(PICTURE), {"type": "text", "text": text}).json()["choices"]
    responses = {"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": text}
    for parts in (responses, ({"type": "image", "image": url}, {"type": "text", "text": text})):
        got = ask(*parts)
        assert (got.status_code, got.json().get("choices")) == (200, expected), got.text


@pytest.mark.parametrize("kind", ["input_audio", "audio_url", "file", "input_file", "video"])
def test_what_no_model_here_takes_is_refused_by_its_name(server, kind):
    refused = server.ask(messages=[{"role": "user", "content": [{"type": kind, kind: {"url": "data:x;base64,AA"}}]}])
    assert refused.status_code == 400 and kind in refused.json()["error"]["message"]


def test_what_changes_no_answer_is_taken(server):
    got = server.ask(store=True, service_tier="flex", user="me", stream_options={"include_usage": True})
    assert (got.status_code, got.headers["x-hawk-ignored"]) == (200, "stream_options, store, service_tier")


def test_what_would_change_the_answer_in_another_place_is_not_dropped(server):
    for name, value in (("keep_ratio", 0.2), ("selector", "norm"), ("min_visual_tokens", 4)):
        got = server.ask(**{name: value})
        assert got.status_code == 400 and f'{{"pruning": {{"{name}": ...}}}}' in got.json()["error"]["message"]
    part = {"image_url": {"url": "data:,"}}
    got = server.ask(messages=[{"role": "user", "content": [part]}]).json()["error"]
    assert got["message"].startswith("messages[0].content[0]: got the type None, expected one of text, input_text")


def test_a_wrong_address_names_the_right_one(server):
    for path in ("/chat/completions", "/v1/v1/chat/completions", "/api/chat"):
        refused = server.http.post(path, json=question())
        assert refused.status_code == 404 and "base_url of a client ends in /v1" in refused.json()["error"]["message"]
    assert [server.http.head(path).status_code for path in ("/health", "/ready")] == [200, 200]


def test_an_address_may_have_a_slash_too_many(server):
    for path in ("/v1/chat/completions/", "/v1//chat/completions", "/./v1//chat/completions//"):
        assert server.http.post(path, json=question()).status_code == 200
    assert [server.http.get(path).status_code for path in ("/v1/models/", "/health/", f"/v1/models/{MODEL}/")] == [
        200
    ] * 3


def test_what_says_nothing_is_taken(server):
    expected = server.ask().json()["choices"]
    text = [{"type": "output_text", "text": question()["messages"][0]["content"]}]
    for fields in (
        {"model": None},
        {"max_tokens": 8.0, "n": 1.0, "seed": 0.0},
        {"response_format": {"type": "text", "json_schema": None}, "chat_template_kwargs": {"enable_thinking": None}},
        {"messages": [{"role": "user", "content": text}]},
    ):
        assert server.ask(**fields).json().get("choices") == expected, fields
    refused = server.ask(chat_template_kwargs={"enable_thinking": False})
    assert refused.status_code == 400


def test_a_prompt_beyond_the_context_is_told_by_the_code_that_clients_know(server):
    error = server.http.post("/v1/chat/completions", json=question("word " * 2_000)).json()["error"]
    assert (error["code"], "--" in error["message"]) == ("context_length_exceeded", False), error
    assert "4096, the model's context" in error["message"]


def test_ignore_eos_goes_on_to_the_longest_answer(server):
    got = server.ask(ignore_eos=True, max_tokens=7).json()
    assert (got["usage"]["completion_tokens"], got["choices"][0]["finish_reason"]) == (7, "length")


def test_a_body_may_begin_with_a_byte_order_mark(server):
    content, head = json.dumps(question()).encode(), {"content-type": "application/json"}
    answers = [
        server.http.post("/v1/chat/completions", content=start + content, headers=head).json()["choices"]
        for start in (b"", b"\xef\xbb\xbf")
    ]
    assert answers[0] == answers[1]


def test_usage_tells_the_tokens_of_images(server):
    usage = server.ask(messages=question("What?", PICTURE)["messages"]).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "image_tokens": usage["visual_tokens"]}
    assert usage["visual_tokens"] > 0


def test_what_follows_a_body_of_two_lengths_is_no_request(server):
    head = (
        HEAD.replace(b"Connection: close\r\n", b"")
        + b"Content-Length: 60\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    )
    answer = raw_request(server.port, head + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.count(b"HTTP/1.1 ") == 1 and b"two_lengths" in answer
