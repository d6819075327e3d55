"""The small files of a checkpoint: tokens, chat template, preprocessors, and what is refused of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from checkpoints import (
    make_checkpoint,
    write_json,
)
from export.checkpoint_files import read_small_files, stop_tokens
from export.writer import ExportOptions, export
from hawk_trt.errors import CheckpointError, InvalidInput
from hawk_trt.inputs.tokenizer import spelling


def test_the_two_flags_give_a_checkpoint_without_tokenizer_its_query_bounds(tmp_path, checkpoint):
    options = ExportOptions(im_end_token_id=7, vision_end_token_id=0)
    tokens = export(checkpoint, tmp_path / "out", options).manifest.special_tokens
    assert (tokens.im_end, tokens.vision_end) == (7, 0)
    with pytest.raises(InvalidInput, match=r"im_end_token_id: got 320, expected 0 to 319"):
        export(checkpoint, tmp_path / "other", ExportOptions(im_end_token_id=320))


def test_the_tokenizers_added_tokens_are_found(tmp_path, tensors):
    folder = make_checkpoint(tmp_path / "model", tensors)
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(11)}))
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert export(folder, tmp_path / "out").manifest.special_tokens.im_end == 11
    write_json(folder / "tokenizer.json", {"added_tokens": [{"content": "<|im_end|>"}]})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: its added_tokens"):
        export(folder, tmp_path / "out")


def test_a_preprocessor_nested_by_newer_saves_is_written_on_its_own(tmp_path, tensors):
    folder = make_checkpoint(tmp_path / "model", tensors)
    write_json(folder / "processor_config.json", {"image_processor": {"min_pixels": 3136}})
    made = export(folder, tmp_path / "out")
    assert json.loads(made.read_text("preprocessor_config.json")) == {"min_pixels": 3136}


@pytest.mark.parametrize("head", ["v_head.summary.weight", "score.weight"])
def test_a_head_of_training_is_left_out_with_a_note(tmp_path, tensors, head):
    folder = make_checkpoint(tmp_path / "model", {**tensors, head: np.zeros((1, 4), np.float32)})
    notes = []
    export(folder, tmp_path / "out", note=notes.append)
    assert any(head in note and "left out" in note for note in notes)


def changed_tiny(tmp_path, **changes):
    """The tiny checkpoint with other texts or keys in some of its small files."""
    folder = tmp_path / "tiny"
    source = Path(__file__).parents[2] / "examples" / "tiny-vlm"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("samples", "README.md"))
    for stem, change in changes.items():
        path = next(folder.glob(f"{stem}.*"))
        if isinstance(change, str):
            path.write_text(change, encoding="utf-8")
        else:
            write_json(path, json.loads(path.read_text(encoding="utf-8")) | change)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": "{% for %}"}, "no prompt can be made.*chat template"),
        ({"chat_template": "{{ messages[0].nothing.at_all }}"}, "no prompt can be made"),
        ({"chat_template": "{% for m in messages %}{{ m.role }}{% endfor %}"}, "makes no image and no video of it"),
        ({"chat_template": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"}, "without an end"),
        ({"tokenizer": "{}"}, "tokenizer.json: the installed tokenizers package cannot read it"),
        ({"preprocessor_config": {"rescale_factor": "x"}}, "preprocessor_config.json: rescale_factor: got 'x'"),
        ({"preprocessor_config": {"size": [1]}}, r"preprocessor_config.json: size: got \[1\]"),
        ({"preprocessor_config": {"image_mean": "x"}}, "preprocessor_config.json: image_mean"),
        ({"preprocessor_config": {"image_std": [0, 0, 1e-30]}}, "preprocessor_config.json: image_std"),
        ({"preprocessor_config": {"resample": True}}, "preprocessor_config.json: resample: got True"),
        ({"preprocessor_config": {"max_pixels": 1.5}}, "preprocessor_config.json: max_pixels: got 1.5"),
    ],
)
def test_what_no_prompt_could_use_is_refused_by_the_export(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        export(changed_tiny(tmp_path, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), [("fps", "x"), ("num_frames", 1.5), ("max_frames", 0)])
def test_a_rule_for_videos_that_cannot_be_used_is_refused_by_the_export(tmp_path, key, value):
    folder = changed_tiny(tmp_path)
    write_json(folder / "video_preprocessor_config.json", {key: value})
    with pytest.raises(CheckpointError, match=rf"video_preprocessor_config\.json: .*\$\.{key}"):
        export(folder, tmp_path / "out")


def test_settings_that_are_null_count_as_not_there(tmp_path):
    nothing = dict.fromkeys(("size", "rescale_factor", "resample", "image_mean", "image_std", "min_pixels"))
    made = export(changed_tiny(tmp_path, preprocessor_config=nothing | {"max_pixels": 50176.0}), tmp_path / "out")
    assert json.loads(made.read_text("preprocessor_config.json"))["size"] is None


def test_all_stop_tokens_end_an_answer_and_a_note_says_when_none_ends_a_chat(tmp_path):
    def exported(name, **changes):
        notes = []
        made = export(changed_tiny(tmp_path / name, **changes), tmp_path / name / "out", note=notes.append)
        return made.manifest.special_tokens.eos, [note for note in notes if "ends a chat" in note]

    eos, notes = exported("all", generation_config={"eos_token_id": [456, 1]})
    assert (eos, notes) == ((456, 1, 458), [])
    source = Path(__file__).parents[2] / "examples" / "tiny-vlm" / "chat_template.jinja"
    template = source.read_text(encoding="utf-8").replace("<|im_end|>", "<|vision_pad|>")
    eos, (note,) = exported("none", chat_template=template)
    assert eos == (458,)
    assert "ends an answer with <|vision_pad|>, the checkpoint's stop tokens are <|im_end|>" in note


@pytest.mark.parametrize("newer", [False, True])
def test_special_tokens_map_counts_where_it_counts_in_transformers(tmp_path, newer):
    folder = changed_tiny(tmp_path, tokenizer_config={"added_tokens_decoder": {}} if newer else {})
    write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "<|vision_pad|>"}, "bos_token": "<|x|>"})
    found = read_small_files(folder)
    config = json.loads(found.contents["tokenizer_config.json"])
    theirs = AutoTokenizer.from_pretrained(folder).special_tokens_map
    assert {name: spelling(value) for name, value in config.items() if name in theirs} == theirs
    told = "special tokens: special_tokens_map.json counts, as in transformers; tokenizer_config.json differs"
    assert [note.removesuffix(" and is left out") for note in found.notes] == ([] if newer else [told])
    assert "special_tokens_map.json" not in found.contents
    assert stop_tokens(folder, (458,), {"<|vision_pad|>": 461}) == ((458,) if newer else (458, 461))


def test_a_note_says_that_the_sampling_of_generation_config_cannot_be_used(tmp_path):
    notes = []
    export(changed_tiny(tmp_path, generation_config={"temperature": "hot"}), tmp_path / "out", note=notes.append)
    (note,) = [note for note in notes if "generation_config" in note]
    assert note.startswith("generation_config.json: damaged (Expected `float | null`, got `str` - at `$.temperature`)")
    assert note.endswith("Correct it in the checkpoint and export again, or serve with --generation-config none")


def test_a_note_names_what_generation_config_asks_of_transformers_alone(tmp_path):
    def notes(**said):
        told = []
        folder = changed_tiny(tmp_path / str(len(said)), generation_config=said)
        export(folder, tmp_path / "out", ExportOptions(targets=("cpu",), force=True), note=told.append)
        return [note for note in told if "generation_config" in note]

    assert notes(num_beams=1, typical_p=1.0, min_length=0) == []
    (note,) = notes(num_beams=4, no_repeat_ngram_size=3, suppress_tokens=None, typical_p=1.0)
    assert note == "generation_config.json: num_beams, no_repeat_ngram_size: not followed here, unlike in transformers"
