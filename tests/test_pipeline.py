"""The pipeline on the tiny model: answers, batches, streams, quotas, queries and bad input."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from examples.tiny_task import generate
from export.__main__ import main as export
from hawk_trt import ModelInputs, Pipeline, PruningConfig, Request, SamplingConfig
from hawk_trt.errors import InvalidInput
from hawk_trt.runtime.trace import traced
from targets import IN_ONNX_RUNTIME, ON_CPU

SAMPLES = list(generate(11, 10))
PRUNING = PruningConfig(keep_ratio=0.2)
TEXT_THEN_IMAGE = [{"type": "text", "text": "What is red?"}, {"type": "image"}]


@pytest.fixture(scope="module", params=ON_CPU)
def pipe(request, tiny_bundle):
    with Pipeline.load(tiny_bundle, target=request.param, threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def inplace(tiny_bundle):
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        assert pipe.backend.target == "cpu"
        yield pipe


def same(one, other, *, logits=False):
    assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
    np.testing.assert_array_equal(one.kept_indices, other.kept_indices)
    np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=1e-6)
    if logits:
        np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=1e-4)


def test_a_batch_of_unlike_prompts_equals_its_rows_one_by_one(pipe):
    requests = [
        Request(SAMPLES[0].question, [SAMPLES[0].image]),
        Request("Hello?"),
        Request(SAMPLES[1].question, [SAMPLES[1].image, SAMPLES[2].image[:112, :140]]),
        Request([{"role": "user", "content": TEXT_THEN_IMAGE}], [SAMPLES[3].image]),
    ]
    for pruning in (PRUNING, PruningConfig(keep_ratio=1.0), PruningConfig(keep_ratio=0.5, quota="per-image")):
        batch = pipe.generate_batch(requests, pruning=pruning, max_new_tokens=6, return_logits=True)
        for request, result in zip(requests, batch, strict=True):
            alone = pipe.generate(request.prompt, request.images, pruning=pruning, max_new_tokens=6, return_logits=True)
            same(alone, result, logits=True)


def test_sampled_rows_of_a_batch_equal_the_same_seed_alone(inplace):
    sampling = SamplingConfig(temperature=30.0, top_p=0.95, seed=5)
    options = {"pruning": PRUNING, "max_new_tokens": 8, "sampling": sampling, "ignore_eos": True}
    requests = [Request(s.question, [s.image]) for s in SAMPLES[:3]]
    for request, result in zip(requests, inplace.generate_batch(requests, **options), strict=True):
        same(inplace.generate(request.prompt, request.images, **options), result)
    other = dataclasses.replace(sampling, seed=6)
    alone = inplace.generate(SAMPLES[0].question, [SAMPLES[0].image], **{**options, "sampling": other})
    assert alone.token_ids != inplace.generate(SAMPLES[0].question, [SAMPLES[0].image], **options).token_ids


def test_a_prompts_layout_and_the_tokenizer_can_be_asked_for(inplace):
    inputs = inplace.prepare(SAMPLES[0].question, [SAMPLES[0].image])
    layout, tokenizer = inplace.layout(inputs, "last"), inplace.chat_tokenizer()
    assert (layout.num_visual, layout.query) == (64, "last")
    assert SAMPLES[0].question in tokenizer.decode(layout.input_ids.tolist(), skip_special_tokens=False)


def test_the_stream_is_the_answer_in_pieces(inplace):
    sample = SAMPLES[0]
    stream = inplace.stream(sample.question, [sample.image], (), PRUNING, max_new_tokens=12)
    pieces = list(stream)
    whole = inplace.generate(sample.question, [sample.image], pruning=PRUNING, max_new_tokens=12)
    assert "".join(pieces) == stream.result.text == whole.text
    same(stream.result, whole)


def test_kept_tokens_are_text_and_the_best_visual_ones(inplace):
    sample = SAMPLES[0]
    inputs = inplace.prepare(sample.question, [sample.image])
    result = inplace.generate(inputs, pruning=PRUNING, max_new_tokens=1)
    visual = np.flatnonzero(inputs.input_ids == inplace.bundle.manifest.special_tokens.image)
    assert result.num_visual == len(visual) == len(result.scores) == 64
    assert result.num_kept == 13
    best = visual[np.sort(np.argsort(-result.scores, kind="stable")[:13])]
    text = np.setdiff1d(np.arange(len(inputs.input_ids)), visual)
    np.testing.assert_array_equal(result.kept_indices, np.union1d(text, best))


def test_a_quota_per_image_keeps_its_share_of_each_and_reports_the_joint_scores(inplace):
    images = [SAMPLES[0].image, SAMPLES[1].image[:112]]
    joint = inplace.generate("What is red?", images, pruning=PruningConfig(keep_ratio=0.25), max_new_tokens=1)
    each = inplace.generate(
        "What is red?", images, pruning=PruningConfig(keep_ratio=0.25, quota="per-image"), max_new_tokens=1
    )
    np.testing.assert_allclose(each.scores, joint.scores, rtol=0, atol=1e-6)
    inputs = inplace.prepare("What is red?", images)
    visual = np.flatnonzero(inputs.input_ids == inplace.bundle.manifest.special_tokens.image)
    kept = np.isin(visual, each.kept_indices)
    assert (kept[:64].sum(), kept[64:].sum()) == (16, 8)
    for part in (slice(0, 64), slice(64, 96)):
        worst, best = each.scores[part][kept[part]].min(), each.scores[part][~kept[part]].max()
        assert worst >= best


def test_the_turn_query_hears_a_question_before_the_image(inplace):
    sample = SAMPLES[0]

    def scores(question, query):
        content = [{"type": "text", "text": question}, {"type": "image", "image": sample.image}]
        pruning = PruningConfig(query=query)
        return inplace.generate([{"role": "user", "content": content}], pruning=pruning, max_new_tokens=1).scores

    one, other = "What colour is the ring?", "How many arrows are there?"
    with pytest.warns(UserWarning, match="the question does not choose the visual tokens"):
        np.testing.assert_allclose(scores(one, "paper"), scores(other, "paper"), atol=1e-5)
    for question in (one, other):
        np.testing.assert_array_equal(scores(question, None), scores(question, "turn"))
    assert np.corrcoef(scores(one, "turn"), scores(other, "turn"))[0, 1] < 0.9


IMAGE_ITEM, QUESTION = {"type": "image", "image": SAMPLES[0].image}, {"type": "text", "text": "Count the circles."}
ASKED = {
    "image first": ([("user", [IMAGE_ITEM, QUESTION])], "paper", "Count the circles."),
    "text first": ([("user", [QUESTION, IMAGE_ITEM])], "turn", "Count the circles."),
    "text around": ([("user", [QUESTION, IMAGE_ITEM, {"type": "text", "text": "Now."}])], "paper", "Now."),
    "blank behind": (
        [("user", [QUESTION, IMAGE_ITEM, {"type": "text", "text": " \n"}])],
        "turn",
        "Count the circles. \n",
    ),
    "question in the next turn": (
        [("user", [IMAGE_ITEM]), ("assistant", "ok"), ("user", "Count the circles.")],
        "paper",
        "<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n<|im_start|>user\nCount the circles.",
    ),
    "image in the next turn": (
        [("user", [QUESTION]), ("assistant", "of what?"), ("user", [IMAGE_ITEM])],
        "turn",
        "Count the circles.",
    ),
    "image from a tool": ([("user", [QUESTION]), ("tool", [IMAGE_ITEM])], "turn", "Count the circles."),
    "nothing asked": ([("user", [IMAGE_ITEM])], "paper", "<|im_end|>\n<|im_start|>assistant\n"),
}


@pytest.mark.parametrize("case", ASKED)
def test_the_question_chooses_the_tokens_wherever_it_stands(inplace, case):
    turns, query, text = ASKED[case]
    messages = [{"role": role, "content": content} for role, content in turns]
    layout = inplace.processor.layout(inplace.prepare(messages))
    asked = layout.input_ids[layout.query_weights > 0].tolist()
    assert inplace.processor.chat.tokenizer.decode(asked, skip_special_tokens=False) == text
    assert inplace.generate(messages, max_new_tokens=1).query == layout.query == query


def test_head_weights_need_no_export_and_are_used_as_given(inplace):
    sample = SAMPLES[0]
    heads = inplace.bundle.manifest.language.num_attention_heads
    one = tuple(float(i == 2) for i in range(heads))

    def scores(weights):
        pruning = PruningConfig(head_weights=weights)
        return inplace.generate(sample.question, [sample.image], pruning=pruning, max_new_tokens=1).scores

    np.testing.assert_allclose(scores(tuple(3 * w for w in one)), 3 * scores(one), rtol=1e-5)
    assert np.linalg.norm(scores(one)) == pytest.approx(1.0, rel=1e-5)  # the norm of a single head is 1
    assert not np.allclose(scores(one), scores(None))


def test_no_image_prunes_nothing_and_is_no_error(pipe):
    result = pipe.generate("Hello?", pruning=PRUNING, max_new_tokens=3)
    assert (result.num_visual, result.num_kept, len(result.scores)) == (0, 0, 0)
    assert len(result.kept_indices) == len(pipe.prepare("Hello?").input_ids)


def test_frames_of_one_image_twice_are_a_video_with_its_own_positions(inplace):
    frames = np.stack([SAMPLES[0].image] * 4)
    special = inplace.bundle.manifest.special_tokens
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "What is red?"}]
    inputs = inplace.prepare([{"role": "user", "content": content}])
    assert inputs.video_grid_thw.tolist() == [[2, 16, 16]]
    assert (inputs.input_ids == special.video).sum() == 128
    layout = inplace.processor.layout(inputs)
    times = np.unique(layout.position_ids[0, layout.visual_rows >= 0])
    assert len(times) == 2
    result = inplace.generate(inputs, pruning=PRUNING, max_new_tokens=4)
    assert (result.num_visual, result.num_kept) == (128, 26)


def test_an_answer_ends_at_a_stop_string_a_stop_token_or_its_length(inplace):
    sample = next(s for s in SAMPLES if s.kind == "where")
    ask = {"prompt": sample.question, "images": [sample.image], "pruning": PruningConfig(keep_ratio=1.0)}
    whole = inplace.generate(**ask, max_new_tokens=16)
    assert whole.finish_reason == "stop"
    assert whole.token_ids[-1] in inplace.bundle.manifest.special_tokens.eos
    first = whole.text.split()[0]
    for stop in ([whole.text[len(first) :]], iter([whole.text[len(first) :]])):
        stopped = inplace.generate(**ask, max_new_tokens=16, stop=stop)
        assert (stopped.text, stopped.finish_reason) == (first, "stop")
    cut = inplace.generate(**ask, max_new_tokens=1)
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 1)
    on = inplace.generate(**ask, max_new_tokens=10, ignore_eos=True)
    assert len(on.token_ids) == 10
    assert on.token_ids[: len(whole.token_ids)] == whole.token_ids


def test_logits_row_i_is_what_token_i_was_chosen_from(pipe):
    sample = SAMPLES[2]
    result = pipe.generate(
        sample.question, [sample.image], pruning=PRUNING, max_new_tokens=6, ignore_eos=True, return_logits=True
    )
    assert result.logits.shape == (6, pipe.bundle.manifest.language.vocab_size)
    assert result.logits.argmax(axis=-1).tolist() == result.token_ids


def test_a_trace_with_the_generated_tokens_forced_gives_the_same_logits(inplace):
    sample = SAMPLES[2]
    inputs = inplace.prepare(sample.question, [sample.image])
    result = inplace.generate(inputs, pruning=PRUNING, max_new_tokens=5, ignore_eos=True, return_logits=True)
    trace = traced(inplace, inputs, PRUNING, result.token_ids[:-1])
    np.testing.assert_array_equal(trace.logits, result.logits)
    np.testing.assert_array_equal(trace.kept_indices, result.kept_indices)
    hidden = inplace.bundle.manifest.language.hidden_size
    assert trace.visual_embeds.shape == (64, hidden)
    assert trace.hidden_states.shape == (len(result.kept_indices), hidden)


def test_timings_add_up_to_no_more_than_the_whole(inplace):
    timings = inplace.generate(SAMPLES[0].question, [SAMPLES[0].image], pruning=PRUNING).timings
    parts = [timings.preprocess, timings.vision, timings.first_layer, timings.decoder, timings.decode]
    assert all(part > 0 for part in parts)
    assert sum(parts) <= timings.total


def test_the_answer_ends_where_the_context_is_full(tiny_checkpoint, tmp_path):
    context, folder = 200, shutil.copytree(tiny_checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = context
    (folder / "config.json").write_text(json.dumps(config))
    assert export([str(folder), "--out", str(tmp_path / "b"), "--target", "cpu"]) == 0
    with Pipeline.load(tmp_path / "b", threads=1) as pipe:
        result = pipe.generate(ModelInputs(np.full(context - 3, 300)), max_new_tokens=50, ignore_eos=True)
        assert (len(result.token_ids), result.finish_reason) == (3, "length")
        with pytest.raises(InvalidInput, match=f"got {context} positions, expected fewer than {context}"):
            pipe.generate(ModelInputs(np.full(context, 300)))


def test_a_special_token_spelled_out_by_a_user_is_text(inplace):
    special = inplace.bundle.manifest.special_tokens
    prompt = "What is <|image_pad|><|im_end|> red?"
    ids = inplace.prepare(prompt, [SAMPLES[0].image]).input_ids
    plain = inplace.prepare("What is red?", [SAMPLES[0].image]).input_ids
    for token in (special.image, special.im_end, special.im_start):
        assert (ids == token).sum() == (plain == token).sum()


@pytest.mark.parametrize("target", IN_ONNX_RUNTIME)
def test_float16_keeps_nearly_the_same_tokens_and_answers(tiny_checkpoint, tiny_bundle, tmp_path, target):
    assert export([str(tiny_checkpoint), "--out", str(tmp_path / "b"), "--dtype", "float16"]) == 0
    answers = 0
    with (
        Pipeline.load(tmp_path / "b", target=target, threads=1) as half,
        Pipeline.load(tiny_bundle, target=target, threads=1) as full,
    ):
        for sample in SAMPLES:
            ask = {"prompt": sample.question, "images": [sample.image], "pruning": PRUNING, "return_logits": True}
            one, other = half.generate(**ask, max_new_tokens=1), full.generate(**ask, max_new_tokens=1)
            np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=2e-3)  # 6e-4 seen
            overlap = len(np.intersect1d(one.kept_indices, other.kept_indices)) / len(other.kept_indices)
            assert overlap > 0.95
            answers += one.text == other.text
            if overlap == 1.0:
                np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=0.15)
    assert answers >= len(SAMPLES) - 1


def test_neither_torch_nor_transformers_is_imported_by_a_run(tiny_bundle, tmp_path):
    Image.fromarray(SAMPLES[0].image).save(tmp_path / "scene.png")
    program = (
        "import sys; from hawk_trt import Pipeline; "
        f"Pipeline.load({str(tiny_bundle)!r}).generate('What is red?', [{str(tmp_path / 'scene.png')!r}]); "
        "print(sorted({'torch', 'transformers', 'onnx', 'av'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_threads_are_those_of_every_session(tiny_bundle):
    with Pipeline.load(tiny_bundle, threads=1) as one, Pipeline.load(tiny_bundle) as many:
        got, expected = (
            {stage.session.get_session_options().intra_op_num_threads for stage in pipe.backend.stages.values()}
            for pipe in (one, many)
        )
    assert (got, expected) == ({1}, {0})
    for threads in (0, 1.5, True):
        with pytest.raises(InvalidInput, match="threads: got"):
            Pipeline.load(tiny_bundle, threads=threads)


def test_log_probabilities_are_those_of_the_logits(inplace):
    sample = SAMPLES[0]
    options = {"pruning": PRUNING, "max_new_tokens": 4, "return_logits": True}
    sampling = SamplingConfig(temperature=2.0, seed=3, logit_bias={5: 4.0})
    result = inplace.generate(sample.question, [sample.image], sampling=sampling, logprobs=3, **options)
    for logits, step, token in zip(result.logits, result.logprobs, result.token_ids, strict=True):
        expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
        assert step.token_id == token
        assert step.logprob == pytest.approx(expected[token], abs=1e-5)
        assert [token for token, _ in step.top] == np.argsort(-expected, kind="stable")[:3].tolist()
        np.testing.assert_allclose([value for _, value in step.top], np.sort(expected)[::-1][:3], atol=1e-5)
    one, other = (inplace.generate(sample.question, [sample.image], logprobs=n, **options) for n in (0, None))
    assert all(step.top == () for step in one.logprobs)
    assert other.logprobs is None


def test_greedy_tokens_with_a_repetition_penalty_are_those_of_transformers(inplace, tiny_checkpoint):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    inputs = inplace.prepare("Count the circles.", [SAMPLES[0].image])
    ids = torch.tensor(np.asarray(inputs.input_ids))[None]
    types = (ids == inplace.bundle.manifest.special_tokens.image).int()
    visual = {name: torch.tensor(np.asarray(getattr(inputs, name))) for name in ("pixel_values", "image_grid_thw")}
    with torch.inference_mode():
        theirs = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=types,
            **visual,
            max_new_tokens=10,
            min_new_tokens=10,
            do_sample=False,
            repetition_penalty=1.8,
        )[0, ids.shape[1] :].tolist()
    eos = set(inplace.bundle.manifest.special_tokens.eos)
    sampling = SamplingConfig(repetition_penalty=1.8, logit_bias=dict.fromkeys(eos, -100.0))  # min_new_tokens
    tensors = ModelInputs(ids, **visual)  # of torch
    ours = inplace.generate(
        tensors, pruning=PruningConfig(1.0), max_new_tokens=10, ignore_eos=True, sampling=sampling
    ).token_ids
    assert ours == theirs
    assert ours != inplace.generate(inputs, pruning=PruningConfig(1.0), max_new_tokens=10, ignore_eos=True).token_ids
