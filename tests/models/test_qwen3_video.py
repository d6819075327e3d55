"""Videos as Qwen3-VL takes them: frames, sizes and times against transformers, and the prompt that tells them."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest

from hawk_trt.bundle import Bundle, SpecialTokens
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import resize
from hawk_trt.inputs.tokenizer import ChatTokenizer
from hawk_trt.models import load_family
from hawk_trt.models.family import Patches, TokenRun
from random_models import IM_END, IMAGE, VIDEO, VISION_END, VISION_START
from vision_configs import QWEN3_VL

pytest.importorskip("torch")
pytest.importorskip("transformers")

FAMILY = load_family(QWEN3_VL)
PREPROCESSOR = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def their_video_processor():
    """The functions of transformers' video processor that need no torchvision."""
    return importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")


@pytest.mark.parametrize("fps", [None, 0.5, 8.0])
@pytest.mark.parametrize(("total", "video_fps"), [(1, 25.0), (3, 30.0), (100, 25.0), (301, 29.97), (50_000, 24.0)])
def test_frames_of_a_file_are_those_that_transformers_takes(total, video_fps, fps):
    theirs = their_video_processor().Qwen3VLVideoProcessor.sample_frames
    settings = SimpleNamespace(fps=2, min_frames=4, max_frames=768)
    expected = theirs(settings, SimpleNamespace(total_num_frames=total, fps=video_fps), fps=fps)
    np.testing.assert_array_equal(FAMILY.frame_numbers(total, video_fps, fps, 768), expected)


@pytest.mark.parametrize("bounds", [(4096, 25165824), (131072, 786432)], ids=["released", "default"])
@pytest.mark.parametrize("frames", [2, 3, 5, 64, 768])
@pytest.mark.parametrize("size", [(20, 30), (31, 500), (360, 640), (1080, 1920), (17, 33)], ids=str)
def test_frames_are_resized_as_transformers_does(frames, size, bounds):
    expected = their_video_processor().smart_resize(frames, *size, 2, 32, *bounds)
    settings = FAMILY.image_settings({"min_pixels": bounds[0], "max_pixels": bounds[1]})
    assert FAMILY.frame_size(frames, *size, settings) == expected


def test_a_video_of_frames_is_cut_by_the_volume_of_all_of_them():
    settings = FAMILY.image_settings(PREPROCESSOR | {"size": {"longest_edge": 98304, "shortest_edge": 4096}})
    frames = np.random.default_rng(0).integers(0, 256, (7, 160, 224, 3), dtype=np.uint8)
    patches = FAMILY.video_to_patches(list(frames), settings)
    tall, wide = their_video_processor().smart_resize(7, 160, 224, 2, 32, 4096, 98304)
    assert patches.grid_thw.tolist() == [[4, tall // 16, wide // 16]]
    last = resize(frames[6], tall, wide, settings.resample)  # of an odd number, so it is shown twice
    image = FAMILY.images_to_patches([last], settings)
    np.testing.assert_array_equal(patches.pixel_values[-len(image.pixel_values) :], image.pixel_values)
    with pytest.raises(InvalidInput, match="1 to 200"):
        FAMILY.video_to_patches([np.zeros((40, 9000, 3), np.uint8)], settings)


def video_of(grid, times):
    return Patches(np.empty((0, 0), np.float32), np.array([grid]), "video", times)


@pytest.mark.parametrize("frames", [1, 2, 5, 6])
def test_a_video_is_told_with_the_times_of_its_frames(frames):
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    special = SpecialTokens(IMAGE, VIDEO, VISION_START, VISION_END, None, IM_END, None, ())
    numbers = [7 * n for n in range(frames)]
    expected = Qwen3VLProcessor._calculate_timestamps(None, list(numbers), 25.0, 2)
    parts = FAMILY.placeholder(video_of([len(expected), 4, 6], [number / 25.0 for number in numbers]), special)
    marks = (TokenRun(VISION_START), TokenRun(VIDEO, 6), TokenRun(VISION_END))
    assert parts == tuple(part for time in expected for part in (f"<{time:.1f} seconds>", *marks))


def test_a_video_takes_the_place_of_its_placeholder_and_of_the_tokens_around_it(tiny_bundle):
    """As one string, since text before the first time joins it: the tokens that encoding the whole string gives."""
    from tokenizers import Tokenizer

    bundle = Bundle.load(tiny_bundle)
    special = bundle.manifest.special_tokens
    chat = ChatTokenizer.from_bundle(bundle)
    content = [{"type": "text", "text": "Look:"}, {"type": "video", "video": [np.zeros((56, 56, 3), np.uint8)] * 4}]
    encoded = chat.encode([{"role": "user", "content": [*content, {"type": "text", "text": "What is red?"}]}])
    ids = chat.expand(encoded, [FAMILY.placeholder(video_of([2, 4, 4], [0.0, 0.5, 1.0, 1.5]), special)])
    start, video, end = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"
    plain = chat.expand(encoded, [[TokenRun(special.video)]])
    text = chat.tokenizer.decode(plain.tolist(), skip_special_tokens=False)
    assert f"Look:{start}{video}{end}What is red?" in text
    told = "".join(f"<{time} seconds>{start}{4 * video}{end}" for time in (0.2, 1.2))
    plain = Tokenizer.from_str(bundle.read_text("tokenizer.json"))
    assert ids.tolist() == plain.encode(text.replace(start + video + end, told)).ids
