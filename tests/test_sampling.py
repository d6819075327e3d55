"""Tokens are drawn from the distribution asked for, and bad logits never become a token."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from hawk_trt.errors import BackendError, BundleError, InvalidInput
from hawk_trt.request import PruningConfig, Request, SamplingConfig
from hawk_trt.runtime.generation_config import checkpoint_sampling
from hawk_trt.runtime.sampler import Sampler

LOGITS = np.log(
    np.array([0.05, 0.4, 0.0, 0.2, 0.3, 0.05], np.float64), where=[1, 1, 0, 1, 1, 1], out=np.full(6, -np.inf)
)
LOGITS = LOGITS.astype(np.float32)
DRAWS = 4000


def frequencies(logits, **settings):
    sampler = Sampler(SamplingConfig(temperature=settings.pop("temperature", 1.0), seed=7, **settings))
    drawn = [sampler.next_token(logits) for _ in range(DRAWS)]
    return np.bincount(drawn, minlength=logits.size) / DRAWS


def test_greedy_takes_the_lower_index_on_a_tie():
    assert Sampler(SamplingConfig()).next_token(np.array([0.0, 2.0, 1.0, 2.0], np.float32)) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.05, 0.4, 0.0, 0.2, 0.3, 0.05]),
        ({"temperature": 0.5}, [0.0025, 0.16, 0.0, 0.04, 0.09, 0.0025]),
        ({"temperature": 2.0}, [0.05**0.5, 0.4**0.5, 0.0, 0.2**0.5, 0.3**0.5, 0.05**0.5]),
        ({"top_k": 3}, [0.0, 0.4, 0.0, 0.2, 0.3, 0.0]),
        ({"top_k": 4}, [0.05, 0.4, 0.0, 0.2, 0.3, 0.05]),  # 0 and 5 are equal: both stay, as in transformers
        ({"top_k": 99}, [0.05, 0.4, 0.0, 0.2, 0.3, 0.05]),
        ({"top_p": 0.69}, [0.0, 0.4, 0.0, 0.0, 0.3, 0.0]),
        ({"top_p": 0.71}, [0.0, 0.4, 0.0, 0.2, 0.3, 0.0]),
        ({"top_p": 0.93}, [0.05, 0.4, 0.0, 0.2, 0.3, 0.0]),
        ({"top_p": 1e-9}, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
        # Of the three that stay 0.4 and 0.3 make up 0.78 of the probability.
        ({"top_k": 3, "top_p": 0.77}, [0.0, 0.4, 0.0, 0.0, 0.3, 0.0]),
        ({"temperature": 1e-310}, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_tokens_come_as_often_as_their_probability_says(settings, expected):
    expected = np.array(expected) / sum(expected)
    found = frequencies(LOGITS, **settings)
    assert np.array_equal(found > 0, expected > 0)
    assert np.all(np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / DRAWS))  # 4 sigma


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    generator = np.random.default_rng(3)
    for top_p in (0.1, 0.5, 0.9, 0.999, 1 - 1e-12):
        logits = generator.normal(0, 4, 300).astype(np.float32)
        probability = np.exp(logits.astype(np.float64))
        order = np.argsort(-probability)
        size = int(np.argmax(np.cumsum(probability[order] / probability.sum()) >= top_p)) + 1
        sampler = Sampler(SamplingConfig(temperature=1.0, top_p=top_p, seed=0))
        drawn = {sampler.next_token(logits) for _ in range(3000)}
        assert drawn <= set(order[:size].tolist())
        assert len(drawn) >= min(size, 5)


def test_the_same_seed_draws_the_same_tokens_whatever_other_rows_do():
    logits = np.random.default_rng(0).normal(0, 3, (20, 100)).astype(np.float32)
    config = SamplingConfig(temperature=1.0, top_p=0.9, top_k=50, seed=5)
    alone = Sampler(config)
    answer = [alone.next_token(row) for row in logits]
    first, second = Sampler(config), Sampler(config)
    together = [(first.next_token(row), second.next_token(row[::-1])) for row in logits]
    assert [token for token, _ in together] == answer
    assert len(set(answer)) > 5


def test_another_seed_or_none_draws_others():
    logits = np.zeros(1000, np.float32)
    samplers = [Sampler(SamplingConfig(temperature=1.0, seed=seed)) for seed in (1, 2, None, None)]
    answers = {tuple(sampler.next_token(logits) for _ in range(8)) for sampler in samplers}
    assert len(answers) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([1.0, np.nan, np.nan, -np.inf], "2 NaN and 0 \\+inf among 4"),
        ([np.inf, 1.0, np.nan, 2.0], "1 NaN and 1 \\+inf"),
        ([-np.inf, -np.inf, -np.inf, -np.inf], "only -inf among 4"),
    ],
)
def test_logits_that_are_not_finite_are_an_error_not_a_token(temperature, values, found):
    sampler = Sampler(SamplingConfig(temperature=temperature, top_k=2))
    with pytest.raises(BackendError, match=f"non-finite logits: {found}"):
        sampler.next_token(np.array(values, np.float32))


@pytest.mark.parametrize(
    "settings",
    [
        {"min_p": 0.3},
        {"temperature": 1.5, "min_p": 0.2},
        {"top_k": 5, "top_p": 0.8, "min_p": 0.25},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "temperature": 0.8, "top_k": 4},
    ],
)
def test_the_tokens_that_may_come_are_those_of_transformers_processors(settings):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    warpers = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    prompt = [3, 3, 7, 11]
    for seed in range(4):
        logits = np.random.default_rng(seed).normal(0, 1.5, 16).astype(np.float32)
        scores = torch.tensor(logits)[None]
        for name, warper in warpers.items():  # in transformers' own order
            if name in settings:
                scores = warper(settings[name])(torch.tensor([prompt]), scores)
        expected = torch.softmax(scores, -1)[0].numpy()
        found = np.zeros(16)
        for draw in range(2000):
            config = SamplingConfig(**{"temperature": 1.0, **settings}, seed=draw)
            found[Sampler(config, prompt).next_token(logits)] += 1 / 2000
        assert not found[expected == 0].any()
        assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / 2000) + 1e-9)


def test_penalties_count_the_answer_alone_and_the_repetition_penalty_the_prompt_too():
    logits = np.array([1.0, 1.2, 1.1, -0.5], np.float32)
    repeated = Sampler(SamplingConfig(repetition_penalty=2.0), [1])
    assert [repeated.next_token(logits) for _ in range(3)] == [2, 0, 1]  # 1.2 / 2, then 1.1 / 2, then 1.0 / 2
    present = Sampler(SamplingConfig(presence_penalty=0.15), [1])
    assert [present.next_token(logits) for _ in range(4)] == [1, 2, 1, 1]
    frequent = Sampler(SamplingConfig(frequency_penalty=0.15), [1])
    assert [frequent.next_token(logits) for _ in range(5)] == [1, 2, 1, 0, 2]


def test_a_bias_forbids_or_forces_a_token_and_nan_is_still_found():
    logits = np.array([1.0, 1.2, 1.1, -0.5], np.float32)
    assert Sampler(SamplingConfig(logit_bias={1: -100})).next_token(logits) == 2
    assert Sampler(SamplingConfig(logit_bias=[(3, 100.0)], temperature=1.0, seed=0)).next_token(logits) == 3
    with pytest.raises(BackendError):
        Sampler(SamplingConfig(logit_bias={0: -100})).next_token(np.array([np.nan, 1.0], np.float32))


def test_a_bias_comes_before_the_repetition_penalty_as_in_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    for seed in range(8):
        logits = np.random.default_rng(seed).normal(0, 2, 16).astype(np.float32)
        bias, prompt = {0: 3.0, 1: -2.0, 2: 1.5}, [0, 1, 4]
        biased = transformers.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
        penalised = transformers.RepetitionPenaltyLogitsProcessor(1.7)
        ids, scores = torch.tensor([prompt]), torch.tensor(logits)[None]
        expected = int(penalised(ids, biased(ids, scores.clone())).argmax())
        assert Sampler(SamplingConfig(repetition_penalty=1.7, logit_bias=bias), prompt).next_token(logits) == expected


@pytest.mark.parametrize(
    "values",
    [
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e300},
        {"presence_penalty": 2.5},
        {"frequency_penalty": float("nan")},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {1: 1000.0}},
    ],
)
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(InvalidInput, match=next(iter(values))):
        SamplingConfig(**values)


def bundle_of(folder, said):
    """A bundle as far as checkpoint_sampling looks at one."""
    text = said if said is None or isinstance(said, str) else json.dumps(said)
    return SimpleNamespace(folder=folder, read_text=lambda name: text if name == "generation_config.json" else None)


@pytest.fixture(scope="module")
def tiny_model(tiny_checkpoint):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    return transformers.AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"do_sample": False},
        {"temperature": 0.3, "top_k": 5},
        {"repetition_penalty": 1.8},
        {"do_sample": False, "temperature": 0.3, "repetition_penalty": 1.8},
        {"do_sample": True, "temperature": 8.0},
        {"do_sample": True, "temperature": 8.0, "top_k": None},
        {"do_sample": True, "temperature": 8.0, "top_k": 0, "min_p": 0.4},
        {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05},
        {"do_sample": True, "temperature": 4.0, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
        {"do_sample": True, "top_p": 0.0},
    ],
    ids=json.dumps,
)
def test_generation_config_counts_as_in_transformers(said, tiny_model, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    tiny_model.generation_config = transformers.GenerationConfig.from_pretrained(tmp_path)
    prompt = [457, 30, 31, 30, 200, 201]
    out = tiny_model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=1,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits, scores = out.logits[0][0].numpy(), out.scores[0][0]
    sampling = checkpoint_sampling(bundle_of(tmp_path, said))
    assert sampling.greedy == (not said.get("do_sample"))
    if sampling.greedy:
        assert Sampler(sampling, prompt).next_token(logits) == int(scores.argmax())
        return
    expected = torch.softmax(scores.double(), -1).numpy()
    draws, generator = 1000, Sampler(sampling, prompt)._generator
    found = np.zeros(len(expected))
    for _ in range(draws):
        sampler = Sampler(sampling, prompt)  # one that has drawn nothing yet
        sampler._generator = generator
        found[sampler.next_token(logits)] += 1 / draws
    assert not found[expected == 0].any()
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-9)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (None, SamplingConfig(temperature=1.0)),
        ({"do_sample": False}, SamplingConfig(temperature=1.0)),
        ({"temperature": 0.3, "top_k": 5, "top_p": 0.9}, SamplingConfig(temperature=0.3, top_k=5, top_p=0.9)),
        ({"do_sample": True, "top_k": -1, "min_p": 0.1}, SamplingConfig(temperature=1.0, min_p=0.1)),
        ({"temperature": 0, "repetition_penalty": 1.05}, SamplingConfig(repetition_penalty=1.05)),
    ],
)
def test_a_server_takes_the_values_of_generation_config_whatever_do_sample_says(said, expected, tmp_path):
    assert checkpoint_sampling(bundle_of(tmp_path, said), served=True) == expected


@pytest.mark.parametrize(
    "said", [{"temperature": "hot"}, {"repetition_penalty": 0}, {"top_k": 2.5}, {"top_p": 3}, {"do_sample": 1}, [], "{"]
)
@pytest.mark.parametrize("served", [False, True])
def test_a_generation_config_that_cannot_be_used_is_one_error_that_names_it(said, served, tmp_path):
    if said == {"top_p": 3} and not served:
        return  # greedy: transformers does not look at it either
    with pytest.raises(BundleError, match=r"generation_config\.json: .*export again"):
        checkpoint_sampling(bundle_of(tmp_path, said), served=served)


def test_numpys_integers_are_integers():
    assert Request("hi", max_new_tokens=np.int64(3)).max_new_tokens == 3
    assert SamplingConfig(seed=np.int64(3)).seed == 3
    with pytest.raises(InvalidInput, match="at least 1"):
        Request("hi", max_new_tokens=np.int64(0))


def test_numpys_numbers_are_numbers():
    assert PruningConfig(np.float32(0.2)) == PruningConfig(0.2)  # as it is written, not a little more
    assert PruningConfig(np.int64(1), keep_mass=np.float16(0.5)) == PruningConfig(1, keep_mass=0.5)
    config = SamplingConfig(np.float32(0.7), logit_bias={3: np.float32(2.5)})
    assert (config.temperature, config.logit_bias) == (0.7, ((3, 2.5),))
    for wrong in (np.float32("nan"), np.float32(1.5), np.array(0.2), "0.2", True, 10**400):
        with pytest.raises(InvalidInput, match="keep_ratio: got"):
            PruningConfig(wrong)
