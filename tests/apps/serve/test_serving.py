"""The server under the official client: the protocol, and answers equal to those without it."""

import json
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import openai
import pytest
from PIL import Image

from hawk_trt.inputs.images import resize
from hawk_trt.request import PruningConfig, SamplingConfig
from serving import MODEL, SAMPLES, data_url, image, question, samples, serving, wait_for

PICTURE, QUESTION, ANSWER = samples()[0]


@pytest.fixture(scope="module")
def server(tiny_bundle):
    with serving(tiny_bundle) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with server.openai() as client:
        yield client


def offline(server, prompt, images=(), keep_ratio=0.2, sampling=None, max_new_tokens=8, **options):
    return server.pipe.generate(
        prompt, images, (), PruningConfig(keep_ratio=keep_ratio), max_new_tokens, sampling, **options
    )


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("keep_ratio", [1.0, 0.2])
def test_an_image_is_answered_as_without_the_server(server, client, number, keep_ratio):
    picture, text, _ = samples()[number]
    body = question(text, picture)
    got = client.chat.completions.create(**body, extra_body={"pruning": {"keep_ratio": keep_ratio}})
    expected = offline(server, text, [picture], keep_ratio)
    assert (got.choices[0].message.content, got.choices[0].finish_reason) == (expected.text, expected.finish_reason)
    assert got.usage.completion_tokens == len(expected.token_ids)
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    assert (got.usage.visual_tokens, got.usage.kept_visual_tokens) == (expected.num_visual, expected.num_kept)
    assert (got.model, got.object, got.choices[0].message.role) == (MODEL, "chat.completion", "assistant")


def test_a_streamed_answer_is_the_whole_one_in_pieces(server, client):
    body = question("Where is the circle?", SAMPLES / "1-where.png", stream=True, max_tokens=8)
    chunks = list(client.chat.completions.create(**body, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    expected = offline(server, "Where is the circle?", [SAMPLES / "1-where.png"])
    assert text == expected.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == expected.finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.kept_visual_tokens == expected.num_kept
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_ends_with_done_and_has_no_usage_unless_asked(server):
    with server.http.stream("POST", "/v1/chat/completions", json=question(stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert all(json.loads(event)["usage"] is None for event in events[:-1])


def test_text_alone_is_answered_as_without_the_server(server, client):
    got = client.chat.completions.create(**question("Count the circles.", max_tokens=12))
    expected = offline(server, "Count the circles.", max_new_tokens=12)
    assert (got.choices[0].message.content, got.usage.visual_tokens) == (expected.text, 0)


def test_several_turns_with_an_image_in_each_reach_the_model_in_order(server, client):
    first, second = SAMPLES / "0-colour.png", SAMPLES / "2-count.png"
    turns = [
        {"role": "developer", "content": "Answer briefly."},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}, image(first)]},
        {"role": "assistant", "content": "cyan"},
        {"role": "user", "content": [image(second), {"type": "text", "text": "Count the circles."}]},
    ]
    got = client.chat.completions.create(model=MODEL, messages=turns, temperature=0, max_tokens=8)
    prompt = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}, {"type": "image", "image": first}]},
        {"role": "assistant", "content": "cyan"},
        {
            "role": "user",
            "content": [{"type": "image", "image": second}, {"type": "text", "text": "Count the circles."}],
        },
    ]
    expected = offline(server, prompt)
    assert got.choices[0].message.content == expected.text
    assert (got.usage.visual_tokens, got.usage.kept_visual_tokens) == (expected.num_visual, expected.num_kept)


def test_a_seed_gives_the_same_answer_again_and_that_of_the_pipeline(server, client):
    body = question("Say anything.", temperature=1.0, top_p=0.9, seed=-7, max_tokens=16)
    texts = {client.chat.completions.create(**body).choices[0].message.content for _ in range(2)}
    sampling = SamplingConfig(temperature=1.0, top_p=0.9, seed=-7 % 2**64)
    assert texts == {offline(server, "Say anything.", sampling=sampling, max_new_tokens=16).text}


def test_the_temperature_is_one_unless_a_request_says_otherwise(server):
    body = question("Say anything.", seed=3, max_tokens=16)
    del body["temperature"]
    got = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    sampling = SamplingConfig(temperature=1.0, seed=3)
    assert got == offline(server, "Say anything.", sampling=sampling, max_new_tokens=16).text


def test_stop_ends_the_answer_before_the_text(client):
    whole = client.chat.completions.create(**question(QUESTION, PICTURE)).choices[0].message.content
    cut = client.chat.completions.create(**question(QUESTION, PICTURE, stop=[whole[2:4]])).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(whole[2:4])], "stop")


def test_max_completion_tokens_bounds_the_answer(client):
    body = question("Where is the circle?", PICTURE) | {"max_tokens": None, "max_completion_tokens": 1}
    got = client.chat.completions.create(**body)
    assert (got.usage.completion_tokens, got.choices[0].finish_reason) == (1, "length")


@pytest.mark.parametrize(
    ("selector", "query"), [("uniform", "turn"), ("hawk", "last"), ("random", "turn"), ("divprune", "turn")]
)
def test_a_request_chooses_its_selector_and_its_query(server, selector, query):
    got = server.http.post(
        "/v1/chat/completions",
        json=question(QUESTION, PICTURE, pruning={"selector": selector, "keep_ratio": 0.3, "query": query}),
    ).json()
    pruning = PruningConfig(keep_ratio=0.3, selector=selector, query=query)
    expected = server.pipe.generate(QUESTION, [PICTURE], pruning=pruning, max_new_tokens=8)
    assert got["choices"][0]["message"]["content"] == expected.text
    assert got["usage"]["kept_visual_tokens"] == expected.num_kept
    assert got["usage"]["query"] == query


def test_details_tell_grid_scores_and_kept_tokens_of_each_image(server):
    body = question("Count the circles.", SAMPLES / "0-colour.png", SAMPLES / "2-count.png", hawk={"details": True})
    told = server.http.post("/v1/chat/completions", json=body).json()["hawk"]
    expected = offline(server, "Count the circles.", [SAMPLES / "0-colour.png", SAMPLES / "2-count.png"])
    assert [entry["grid"] for entry in told["images"]] == [[1, 8, 8]] * 2
    assert [entry["size"] for entry in told["images"]] == [[224, 224]] * 2
    assert told["images"][0]["scores"] + told["images"][1]["scores"] == pytest.approx(expected.scores.tolist())
    assert sum(len(entry["kept"]) for entry in told["images"]) == expected.num_kept
    assert (told["keep_ratio"], told["selector"]) == (0.2, "hawk")
    assert set(told["seconds"]) >= {"preprocess", "vision", "first_layer", "decoder", "decode", "total"}
    # what a page computes from the scores at the same ratio is what was kept
    scores = [score for entry in told["images"] for score in entry["scores"]]
    best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: expected.num_kept]
    assert sorted(best) == told["images"][0]["kept"] + [64 + index for index in told["images"][1]["kept"]]


def test_a_stream_tells_the_details_with_its_last_chunk(server):
    body = question(QUESTION, PICTURE, hawk={"details": True}, stream=True)
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line and "[DONE]" not in line]
    assert [bool(event["hawk"]) for event in events] == [False] * (len(events) - 1) + [True]


def test_low_detail_shrinks_the_image_to_fit_512_pixels(server):
    large = np.asarray(Image.open(PICTURE).convert("RGB").resize((1024, 256)))
    file = BytesIO()
    Image.fromarray(large).save(file, "PNG")
    part = {"type": "image_url", "image_url": {"url": data_url(file.getvalue()), "detail": "low"}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]
    usage = server.ask(messages=messages).json()["usage"]
    shrunk = resize(large, 128, 512, Image.Resampling.BICUBIC)
    assert usage["visual_tokens"] == offline(server, QUESTION, [shrunk]).num_visual
    assert usage["visual_tokens"] != offline(server, QUESTION, [large]).num_visual


def test_many_clients_at_once_get_the_answers_that_they_would_get_alone(server):
    expected = {
        (number, ratio): offline(server, text, [picture], ratio).text
        for number, (picture, text, _) in enumerate(samples())
        for ratio in (0.2, 1.0)
    }
    asked = [*expected] * 6

    def answer(turn):
        (number, ratio), stream = asked[turn], turn % 2 == 0
        picture, text, _ = samples()[number]
        with server.openai() as client:
            body = question(text, picture) | {"extra_body": {"pruning": {"keep_ratio": ratio}}}
            if not stream:
                return client.chat.completions.create(**body).choices[0].message.content
            chunks = client.chat.completions.create(**body, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(12) as clients:
        assert list(clients.map(answer, range(len(asked)))) == [expected[key] for key in asked]


def test_models_are_listed_and_told_one_by_one(client):
    (listed,) = client.models.list().data
    assert listed.id == MODEL
    assert client.models.retrieve(MODEL) == listed
    assert listed.hawk["keep_ratio"] == 0.2
    with pytest.raises(openai.NotFoundError, match="the one that is served"):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**question() | {"model": "gpt-4o"})
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


def test_metrics_count_requests_and_tokens(server):
    def value(name):
        lines = server.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    names = {
        "requests": 'hawk_requests_total{route="/v1/chat/completions",status="200"}',
        "refused": 'hawk_requests_total{route="/v1/chat/completions",status="400"}',
        "visual": 'hawk_tokens_total{kind="visual"}',
        "kept": 'hawk_tokens_total{kind="kept_visual"}',
        "first": "hawk_first_token_seconds_count",
        "vision": 'hawk_stage_seconds_count{stage="vision"}',
    }
    before = {key: value(name) for key, name in names.items()}
    assert server.http.post("/v1/chat/completions", json=question(QUESTION, PICTURE)).status_code == 200
    assert server.ask(n=9).status_code == 400
    more = {"requests": 1, "refused": 1, "visual": 64, "kept": 13, "first": 1, "vision": 1}
    wait_for(lambda: {key: value(name) - before[key] for key, name in names.items()} == more)
    text = server.http.get("/metrics").text
    assert all(name in text for name in ("hawk_queued_requests", "hawk_running_requests", "hawk_kv_cache_bytes"))
