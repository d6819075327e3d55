"""The vision cache: an image asked about again costs no vision run, and answers stay as they are without it."""

import dataclasses

import numpy as np
import pytest

import golden
from examples.tiny_task import generate
from export.__main__ import main as export
from hawk_trt import ModelInputs, Pipeline, PruningConfig, Request
from hawk_trt.errors import InvalidInput
from hawk_trt.models.family import Patches
from hawk_trt.runtime.vision_cache import content_key, one_by_one
from hawk_trt.stages import VISION
from trt_machine import Machines, engine_folder

SAMPLES = list(generate(23, 6))
IMAGES = [SAMPLES[0].image, SAMPLES[1].image[:112, :140], SAMPLES[2].image]
VIDEO = np.stack([sample.image for sample in SAMPLES[:4]])
PRUNING = PruningConfig(keep_ratio=0.2)
EMBEDS_MB = 64 * 256 * 4 / 1e6  # of one 224 x 224 image of the tiny model


@pytest.fixture(scope="module")
def plain(tiny_bundle):
    with Pipeline.load(tiny_bundle, vision_cache_mb=0, threads=1) as pipe:
        yield pipe


@pytest.fixture
def caching(tiny_bundle):
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        yield pipe


class Foreign:
    """An array of another library, as JAX's are, whose dtype is numpy's."""

    def __init__(self, values):
        self.values, self.dtype, self.shape = values, values.dtype, values.shape

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


def test_arrays_of_other_libraries_are_read(caching):
    inputs = caching.prepare("Which?", IMAGES[:1])
    foreign = dataclasses.replace(inputs, pixel_values=Foreign(inputs.pixel_values))
    results = [caching.generate(given, max_new_tokens=2) for given in (inputs, foreign)]
    assert results[0].token_ids == results[1].token_ids and results[1].num_cached == 1


class Runs:
    """Counts the runs of the vision session."""

    def __init__(self, pipe, monkeypatch):
        self.count = 0
        stage = pipe.backend.stages[VISION]
        run = stage.run

        def counted(*arguments):
            self.count += 1
            return run(*arguments)

        monkeypatch.setattr(stage, "run", counted)

    def during(self, act):
        before = self.count
        return act(), self.count - before


@pytest.fixture
def runs(caching, monkeypatch):
    return Runs(caching, monkeypatch)


def ask(pipe, question, images=(), videos=(), **options):
    return pipe.generate(question, images, videos, PRUNING, 6, return_logits=True, **options)


def same(got, expected):
    assert (got.text, got.token_ids, got.num_visual, got.num_kept) == (
        expected.text,
        expected.token_ids,
        expected.num_visual,
        expected.num_kept,
    )
    np.testing.assert_array_equal(got.kept_indices, expected.kept_indices)
    np.testing.assert_allclose(got.scores, expected.scores, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got.logits, expected.logits, rtol=0, atol=1e-4)


def test_another_question_about_an_image_runs_no_vision_and_answers_as_without_the_cache(caching, plain, runs):
    for number, question in enumerate(("What colour is the ring?", "How many arrows are there?", "Where is it?")):
        got, ran = runs.during(lambda asked=question: ask(caching, asked, IMAGES[:1]))
        assert (ran, got.num_cached) == ((1, 0), (0, 1))[number > 0]
        expected = ask(plain, question, IMAGES[:1])
        assert expected.num_cached == 0
        same(got, expected)


def test_the_choice_of_tokens_is_made_anew_for_every_question(caching):
    one, other = (ask(caching, question, IMAGES[:1]) for question in ("What colour is the ring?", "How many arrows?"))
    assert other.num_cached == 1
    assert not np.allclose(one.scores, other.scores)


def test_a_pixel_a_size_or_a_grid_that_differs_is_another_image(caching, runs):
    inputs = caching.prepare("What is red?", IMAGES[:1])
    caching.generate(inputs, max_new_tokens=1)
    changed = inputs.pixel_values.copy()
    changed[-1, -1] = np.nextafter(changed[-1, -1], np.float32(9))
    for pixels, expected in ((inputs.pixel_values.copy(), 0), (changed, 1), (changed, 0)):
        other = dataclasses.replace(inputs, pixel_values=pixels)
        _, ran = runs.during(lambda given=other: caching.generate(given, max_new_tokens=1))
        assert ran == expected
    pixels = np.zeros((16, 6), np.float32)
    keys = {content_key(Patches(pixels, np.array([grid]))) for grid in ((1, 4, 4), (1, 2, 8), (4, 2, 2))}
    assert len(keys | {content_key(Patches(pixels.reshape(8, 12), np.array([[1, 4, 4]])))}) == 4


def test_of_several_images_only_the_unknown_ones_are_run(caching, plain, runs):
    ask(caching, "What is red?", IMAGES[1:2])
    got, ran = runs.during(lambda: ask(caching, "What is red?", [*IMAGES, IMAGES[0]]))
    assert (ran, got.num_cached) == (2, 2)  # one known, one twice in the prompt
    same(got, ask(plain, "What is red?", [*IMAGES, IMAGES[0]]))
    again, ran = runs.during(lambda: ask(caching, "And what is blue?", IMAGES[::-1]))
    assert (ran, again.num_cached) == (0, 3)
    same(again, ask(plain, "And what is blue?", IMAGES[::-1]))


def test_videos_and_images_side_by_side_are_known_apart(caching, plain, runs):
    first, ran = runs.during(lambda: ask(caching, "What is red?", IMAGES[:1], [VIDEO]))
    assert (ran, first.num_cached) == (2, 0)
    got, ran = runs.during(lambda: ask(caching, "What is blue?", IMAGES[1:2], [VIDEO]))
    assert (ran, got.num_cached) == (1, 1)
    same(got, ask(plain, "What is blue?", IMAGES[1:2], [VIDEO]))


def test_a_batch_counts_for_each_of_its_rows(caching, plain, runs):
    requests = [Request("What is red?", IMAGES[:2]), Request("Hello?"), Request("Where?", IMAGES[1:3])]
    ask(caching, "What?", IMAGES[:1])
    got, ran = runs.during(lambda: caching.generate_batch(requests, PRUNING, 6, return_logits=True))
    assert (ran, [result.num_cached for result in got]) == (2, [1, 0, 1])
    for result, expected in zip(got, plain.generate_batch(requests, PRUNING, 6, return_logits=True), strict=True):
        same(result, expected)


def test_a_stream_and_a_next_turn_use_it(caching, runs):
    turns = [{"role": "user", "content": [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "Colour?"}]}]
    first = caching.stream(turns, pruning=PRUNING, max_new_tokens=4)
    answer = "".join(first)
    turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Where is it?"}]
    second, ran = runs.during(lambda: caching.generate(turns, pruning=PRUNING, max_new_tokens=4))
    assert (first.result.num_cached, second.num_cached, ran) == (0, 1, 0)


def test_the_longest_unused_goes_first_and_the_bound_holds(tiny_bundle, monkeypatch):
    images = [sample.image for sample in SAMPLES[:3]]
    with Pipeline.load(tiny_bundle, vision_cache_mb=2.5 * EMBEDS_MB, threads=1) as pipe:
        runs = Runs(pipe, monkeypatch)

        def ran(number):
            count = runs.during(lambda: ask(pipe, "What is red?", [images[number]]))[1]
            assert pipe.vision_cache.size_bytes <= pipe.vision_cache.max_bytes
            return count

        assert [ran(number) for number in (0, 1, 0, 2)] == [1, 1, 0, 1]  # 2 puts out 1
        assert pipe.vision_cache.size_bytes == pytest.approx(2e6 * EMBEDS_MB)
        assert [ran(number) for number in (0, 2, 1, 2, 0)] == [0, 0, 1, 0, 1]  # 1 puts out 0
        ask(pipe, "What is red?", images)  # more than fits at once
        assert ran(2) == 0


def test_an_image_larger_than_the_cache_is_not_kept(tiny_bundle, monkeypatch):
    with Pipeline.load(tiny_bundle, vision_cache_mb=0.9 * EMBEDS_MB, threads=1) as pipe:
        runs = Runs(pipe, monkeypatch)
        for _ in range(2):
            result, ran = runs.during(lambda: ask(pipe, "What is red?", [IMAGES[0], IMAGES[0]]))
            assert (ran, result.num_cached, pipe.vision_cache.size_bytes) == (1, 1, 0)


@pytest.mark.parametrize("size", [-1, float("nan"), float("inf"), "64", True])
def test_a_size_that_is_none_is_refused(tiny_bundle, size):
    with pytest.raises(InvalidInput, match="vision_cache_mb: got"):
        Pipeline.load(tiny_bundle, vision_cache_mb=size)


def test_pixel_values_that_do_not_fit_are_refused_as_without_the_cache(caching, plain):
    inputs = caching.prepare("What is red?", IMAGES[:2])
    for rows in (100, 2 * len(inputs.pixel_values)):
        wrong = dataclasses.replace(inputs, pixel_values=np.resize(inputs.pixel_values, (rows, 1176)))
        for pipe in (caching, plain):
            with pytest.raises(InvalidInput, match="pixel_values: got"):
                pipe.generate(wrong, max_new_tokens=1)
    assert caching.vision_cache.size_bytes == 0


def test_items_are_cut_where_their_grids_say():
    grid = np.array([[1, 4, 4], [3, 2, 4], [2, 4, 8]])
    pixels = np.arange(16 + 24 + 64)[:, None].astype(np.float32)
    items = list(one_by_one(Patches(pixels, grid)))
    assert [(int(item.pixel_values[0, 0]), len(item.pixel_values)) for item in items] == [(0, 16), (16, 24), (40, 64)]
    tiles = np.arange(5)[:, None, None, None].astype(np.float32)  # a row a tile, as InternVL has them
    items = list(one_by_one(Patches(tiles, np.array([[2, 32, 32], [3, 32, 32]]))))
    assert [len(item.pixel_values) for item in items] == [2, 3]


def test_without_a_tokenizer_tensors_alone_are_known(tmp_path, monkeypatch):
    assert export([str(golden.MODEL), "--out", str(tmp_path / "b"), "--im-end-token-id", str(golden.IM_END)]) == 0
    case = golden.load_case(next(name for name in golden.CASES if "pixel_values" in golden.load_case(name).inputs))
    inputs = ModelInputs(**case.inputs)
    with Pipeline.load(tmp_path / "b", threads=1) as pipe:
        runs = Runs(pipe, monkeypatch)
        first, ran = runs.during(lambda: pipe.generate(inputs, pruning=PRUNING, max_new_tokens=3))
        assert ran > 0
        second, ran = runs.during(lambda: pipe.generate(inputs, pruning=PRUNING, max_new_tokens=3))
    assert ran == 0
    np.testing.assert_array_equal(first.kept_indices, second.kept_indices)


def test_tensorrt_reads_known_images_from_the_host_and_moves_nothing_for_the_last_one(tiny_bundle, tmp_path, plain):
    out = engine_folder(tiny_bundle, tmp_path / "engines", "tensorrt")
    with Machines() as machines, Pipeline.load(out) as pipe:

        def asked(question, images):
            """Runs of vision, and copies to the GPU."""
            runs, copies = machines.trt.enqueues.count((VISION, 0)), machines.driver.calls["cuMemcpyHtoDAsync"]
            result = ask(pipe, question, images)
            copies = machines.driver.calls["cuMemcpyHtoDAsync"] - copies
            same(result, ask(plain, question, images))
            return machines.trt.enqueues.count((VISION, 0)) - runs, copies

        assert asked("What is red?", IMAGES[:1])[0] == 1
        asked("What is blue?", IMAGES[:1])  # also uploads the decode step's constants
        runs, least = asked("What is blue?", IMAGES[:1])
        assert runs == 0
        assert asked("What is blue?", IMAGES[1:3])[0] == 2
        assert asked("What is blue?", IMAGES[:1]) == (0, least + 1)
        assert asked("What is blue?", IMAGES[:1]) == (0, least)
        assert asked("Which?", [IMAGES[2], IMAGES[0], IMAGES[1]])[0] == 0
        assert machines.driver.faults == []
