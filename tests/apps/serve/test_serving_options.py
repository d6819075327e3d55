"""What a request may say of its answer, under the official client: each option equals that of the pipeline."""

import openai
import pytest

from hawk_trt import Pipeline
from hawk_trt.request import PruningConfig, SamplingConfig
from serving import question, samples, serving, wait_for

PICTURE, QUESTION, ANSWER = samples()[0]
OPEN = "Say anything."
IM_START, IM_END = 457, 458
FREE = {str(IM_END): -100}  # the answer goes on, and is less sure of itself


@pytest.fixture(scope="module")
def server(tiny_bundle):
    with serving(tiny_bundle, max_queue=4, max_batch=4, max_choices=6) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with server.openai() as client:
        yield client


def offline(server, prompt, images=(), max_new_tokens=8, **options):
    pruning = PruningConfig(keep_ratio=0.2)
    return server.pipe.generate(prompt, images, (), pruning, max_new_tokens, **options)


def ids(bias):
    return {int(token): value for token, value in bias.items()}


def asked(client, text, *pictures, **fields):
    """The choices of a whole answer, and those of the same one streamed: text, reason and log probabilities."""
    body = question(text, *pictures, **fields)
    whole = [
        (choice.message.content, choice.finish_reason, (choice.logprobs and choice.logprobs.content) or None)
        for choice in client.chat.completions.create(**body).choices
    ]
    streamed = [["", None, None] for _ in whole]
    for chunk in client.chat.completions.create(**body, stream=True):
        for choice in chunk.choices:
            mine = streamed[choice.index]
            assert mine[1] is None, "more after the end of a choice"
            mine[0] += choice.delta.content or ""
            mine[1] = choice.finish_reason
            if choice.logprobs:
                mine[2] = (mine[2] or []) + choice.logprobs.content
    assert [tuple(choice) for choice in streamed] == whole
    return whole


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5, "presence_penalty": -0.5},
        {"logit_bias": {"200": 100, "201": 99.5, "458": -100}, "frequency_penalty": 1.0},
        {"extra_body": {"repetition_penalty": 1.8}},
        {"temperature": 2, "seed": 3, "extra_body": {"top_k": 5}},
        {"temperature": 2, "seed": 3, "extra_body": {"top_k": -1, "min_p": 0.3}},
    ],
    ids=str,
)
def test_an_option_of_sampling_is_that_of_the_pipeline(server, client, fields):
    fields = {"logit_bias": FREE} | fields
    ((text, reason, logprobs),) = asked(client, OPEN, max_tokens=12, **fields)
    settings = {name: value for name, value in fields.items() if name != "extra_body"} | fields.get("extra_body", {})
    settings["logit_bias"] = ids(settings["logit_bias"])
    if "top_k" in settings:
        settings["top_k"] = max(settings["top_k"], 0)
    expected = offline(server, OPEN, max_new_tokens=12, sampling=SamplingConfig(**settings))
    assert (text, reason, logprobs) == (expected.text, expected.finish_reason, None)
    plain = SamplingConfig(settings.get("temperature", 0), seed=3, logit_bias=ids(FREE))
    assert text != offline(server, OPEN, max_new_tokens=12, sampling=plain).text


@pytest.mark.parametrize("top", [None, 0, 3])
def test_log_probabilities_are_those_of_the_pipeline_for_the_tokens_of_the_text(server, client, top):
    fields = {"logprobs": True} | ({} if top is None else {"top_logprobs": top})
    ((text, reason, content),) = asked(client, QUESTION, PICTURE, **fields)
    expected = offline(server, QUESTION, [PICTURE], logprobs=top or 0)
    assert (text, reason, expected.token_ids[-1]) == (ANSWER, "stop", IM_END)
    assert (
        b"".join(bytes(token.bytes) for token in content).decode() == "".join(token.token for token in content) == text
    )
    assert len(content) == len(expected.token_ids) - 1  # all but the one that ends the answer
    for token, step in zip(content, expected.logprobs, strict=False):
        assert token.logprob == pytest.approx(step.logprob, abs=1e-5)
        assert [entry.logprob for entry in token.top_logprobs] == pytest.approx(
            [value for _, value in step.top], abs=1e-5
        )
        assert all(bytes(entry.bytes).decode("utf-8", "replace") == entry.token for entry in token.top_logprobs)
        if top:  # greedy
            assert token.top_logprobs[0].model_dump() == token.model_dump(exclude={"top_logprobs"})


def test_log_probabilities_give_the_bytes_of_characters_that_go_over_several_tokens(server, client):
    tokenizer = server.pipe.processor.chat.tokenizer
    letters = tokenizer.pre_tokenizer.pre_tokenize_str("né環")[0][0]
    wanted = [tokenizer.token_to_id(letter) for letter in letters]
    assert len(set(wanted)) == len("né環".encode())
    # a bias for each, that a penalty takes away once the token is there, brings them one after another
    bias = {str(token): 100 - 1.9 * place for place, token in enumerate(wanted)}
    fields = {"logit_bias": bias, "frequency_penalty": 2.0, "presence_penalty": 2.0, "max_tokens": len(wanted)}
    sampling = SamplingConfig(logit_bias=ids(bias), frequency_penalty=2.0, presence_penalty=2.0)
    expected = offline(server, OPEN, max_new_tokens=len(wanted), sampling=sampling)
    ((text, _, content),) = asked(client, OPEN, logprobs=True, **fields)
    assert text == expected.text
    spelled = [tokenizer.id_to_token(token) for token in expected.token_ids]
    known = dict(zip(letters, "né環".encode(), strict=True))
    assert [token.bytes for token in content] == [[known[letter]] for letter in spelled]


def test_the_tokens_of_a_stop_string_have_no_log_probabilities(server, client):
    whole = offline(server, QUESTION, [PICTURE]).text
    ((text, reason, content),) = asked(client, QUESTION, PICTURE, logprobs=True, stop=[whole[1:3]])
    assert (text, reason) == (whole[:1], "stop")
    assert "".join(token.token for token in content).startswith(text)
    ((text, _, content),) = asked(client, QUESTION, PICTURE, logprobs=True, stop=[whole[:2]])
    assert (text, content) == ("", None)


def test_choices_have_seeds_of_their_own_and_the_usage_of_all(server, client):
    body = question(QUESTION, PICTURE, temperature=2, seed=11, n=4, max_tokens=6)
    texts = [text for text, _, _ in asked(client, QUESTION, PICTURE, temperature=2, seed=11, n=4, max_tokens=6)]
    assert texts == [
        offline(server, QUESTION, [PICTURE], 6, sampling=SamplingConfig(temperature=2.0, seed=11 + choice)).text
        for choice in range(4)
    ]
    assert len(set(texts)) > 1
    got = client.chat.completions.create(**body)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    alone = client.chat.completions.create(**body | {"n": 1})
    assert (got.usage.prompt_tokens, got.usage.visual_tokens) == (alone.usage.prompt_tokens, 64)
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    assert got.usage.completion_tokens > alone.usage.completion_tokens


def test_the_vision_stage_runs_once_for_all_choices(tiny_bundle):
    with serving(tiny_bundle) as server:
        assert server.http.post("/v1/chat/completions", json=question(QUESTION, PICTURE, n=3)).status_code == 200
        lines = server.http.get("/metrics").text.splitlines()
        assert "hawk_vision_cache_hits_total 2.0" in lines
        assert 'hawk_tokens_total{kind="visual"} 192.0' in lines


def test_choices_without_a_seed_are_drawn_afresh(client):
    body = question(OPEN, temperature=2, n=4, max_tokens=16, logit_bias=FREE)
    texts = [choice.message.content for choice in client.chat.completions.create(**body).choices]
    assert len(set(texts)) > 1


def test_choices_count_as_so_many_requests(server, client):
    with pytest.raises(openai.BadRequestError, match="n: got 7, expected at most 6"):
        client.chat.completions.create(**question(OPEN, n=7))
    long = question(OPEN, n=6, max_tokens=300, logit_bias=FREE)
    with server.openai() as other, other.chat.completions.create(**long, stream=True) as stream:
        next(iter(stream))
        assert server.service.open_choices == 6
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**question(OPEN, n=3))
        assert server.service.open_choices == 6
        assert len(client.chat.completions.create(**question(OPEN, n=2)).choices) == 2
    wait_for(lambda: server.service.open_choices == 0 and server.service.batcher.running == 0)


def test_special_tokens_are_part_of_the_text_where_asked_for(client):
    fields = {"logit_bias": {str(IM_START): 100}, "max_tokens": 2}
    assert asked(client, OPEN, **fields)[0][0] == ""
    shown = asked(client, OPEN, **fields, logprobs=True, extra_body={"skip_special_tokens": False})[0]
    assert shown[0] == "<|im_start|>" * 2
    assert [token.token for token in shown[2]] == ["<|im_start|>"] * 2


@pytest.fixture(scope="module")
def sampling_pipe(sampling_bundle):
    with Pipeline.load(sampling_bundle, threads=1) as pipe:
        yield pipe


SAID = {"temperature": 30.0, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.8}


@pytest.mark.parametrize(
    ("settings", "fields", "expected"),
    [
        ({}, {}, SAID),
        ({}, {"temperature": 0}, {"repetition_penalty": 1.8}),
        ({}, {"temperature": 0.5, "top_p": 0.7, "top_k": 3}, SAID | {"temperature": 0.5, "top_p": 0.7, "top_k": 3}),
        ({}, {"top_k": 0, "repetition_penalty": 1, "top_p": 1}, {"temperature": 30.0}),
        ({"temperature": 0.5}, {}, SAID | {"temperature": 0.5}),
        ({"generation_config": "none"}, {}, {"temperature": 1.0}),
        ({"generation_config": "none", "temperature": 2.0}, {"top_k": 5}, {"temperature": 2.0, "top_k": 5}),
    ],
)
def test_what_a_request_does_not_say_of_sampling_the_checkpoint_says(sampling_pipe, settings, fields, expected):
    with serving(sampling_pipe, **settings) as server:
        body = question(OPEN, seed=4, max_tokens=12, logit_bias=FREE)
        del body["temperature"]
        sampling = SamplingConfig(**expected, seed=4, logit_bias=ids(FREE))
        got = server.http.post("/v1/chat/completions", json=body | fields).json()["choices"][0]["message"]["content"]
        assert got == offline(server, OPEN, max_new_tokens=12, sampling=sampling).text
