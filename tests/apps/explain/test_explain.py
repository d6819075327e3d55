from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hawk_trt.apps.explain import picture
from hawk_trt.apps.explain.explanation import Explanation, Selection, VisualItem, explain
from hawk_trt.apps.explain.lettering import Lettering
from hawk_trt.apps.explain.picture import MAX_FRAMES, colours, heat_panel, kept_panel, render, save
from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import load_image
from hawk_trt.inputs.layout import prompt_layout
from hawk_trt.models.qwen2_vl import Qwen2VL
from hawk_trt.request import ModelInputs, Result
from pictures import NATURAL
from vision_configs import QWEN2_5_VL

IMAGE, VIDEO, TEXT = 7, 8, 1
TOKENS = SpecialTokens(
    image=IMAGE, video=VIDEO, vision_start=None, vision_end=None, im_start=None, im_end=None, pad=None, eos=()
)


def layout_of(input_ids, **inputs):
    return prompt_layout(
        ModelInputs(input_ids=np.array(input_ids), **inputs),
        Qwen2VL(QWEN2_5_VL),
        TOKENS,
        "paper",
        None,
    )


def result_of(num_visual, kept_indices, *, text="yes", num_kept=0):
    scores = np.arange(num_visual, dtype=np.float32)
    return Result(text, [3], "stop", num_visual, num_kept, np.array(kept_indices, np.int64), scores)


def explanation_of(*grids, kind="image", ratios=(0.5,), prompt="What is it?", selector="hawk"):
    rng = np.random.default_rng(0)
    items = tuple(VisualItem(kind, grid, rng.random(grid, np.float32)) for grid in grids)
    total = sum(item.scores.size for item in items)
    selections = tuple(
        Selection(ratio, round(total * ratio), f"answer at {ratio}", tuple(item.scores < ratio for item in items))
        for ratio in ratios
    )
    return Explanation(prompt, selector, total, items, selections)


def test_scores_and_kept_tokens_lie_on_the_grid_of_their_image():
    # 2 x 3 tokens of an image after two text tokens; positions 3 and 7 of it are kept.
    layout = layout_of([TEXT, TEXT, *[IMAGE] * 6, TEXT], image_grid_thw=[[1, 4, 6]])
    explained = explain("?", layout, [(0.3, result_of(6, [0, 1, 3, 7, 8], num_kept=2))], 2)
    assert explained.items[0].grid == (1, 2, 3)
    assert explained.items[0].scores.tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert explained.selections[0].kept[0].tolist() == [[[False, True, False], [False, False, True]]]
    assert (explained.selections[0].num_kept, explained.num_visual) == (2, 6)


def test_images_and_videos_in_any_order_get_their_own_scores():
    layout = layout_of(
        [*[VIDEO] * 2, TEXT, IMAGE, *[VIDEO] * 2],
        image_grid_thw=[[1, 2, 2]],
        video_grid_thw=[[2, 2, 2], [2, 2, 2]],
    )
    explained = explain("?", layout, [(0.4, result_of(5, [0, 2, 3]))], 2)
    assert [item.kind for item in explained.items] == ["image", "video", "video"]
    assert [item.scores.ravel().tolist() for item in explained.items] == [[2.0], [0.0, 1.0], [3.0, 4.0]]
    assert [kept.ravel().tolist() for kept in explained.selections[0].kept] == [[True], [True, False], [False, False]]


def test_positions_are_those_of_the_prompt_as_given_padding_included():
    layout = layout_of([TEXT, TEXT, IMAGE, IMAGE, TEXT], attention_mask=[0, 1, 1, 1, 1], image_grid_thw=[[1, 2, 4]])
    explained = explain("?", layout, [(0.5, result_of(2, [1, 3, 4]))], 2)
    assert explained.selections[0].kept[0].tolist() == [[[False, True]]]


@pytest.mark.parametrize(
    ("selector", "scores", "detail"),
    [
        ("hawk", "HAWK scores", "5 of 10 kept (50.0 %)"),
        ("uniform", "Scores of uniform", "5 of 10 kept by uniform (50.0 %)"),
        ("divprune", "HAWK scores, not used by divprune", "5 of 10 kept by divprune (50.0 %)"),
    ],
)
def test_the_picture_names_who_chose(selector, scores, detail, monkeypatch):
    drawn = []
    draw = Lettering.draw
    monkeypatch.setattr(picture.Lettering, "draw", lambda self, *given: (drawn.extend(given[2]), draw(self, *given))[1])
    render(explanation_of((1, 2, 5), selector=selector), [[Image.new("RGB", (140, 56))]])
    assert drawn.count(scores) == 1 and detail in drawn
    assert sum("HAWK" in text for text in drawn) == (selector != "uniform")


def test_the_picture_tells_that_the_last_token_asked(monkeypatch):
    layout = layout_of([IMAGE, IMAGE, TEXT], image_grid_thw=[[1, 2, 4]])
    explained = explain("?", layout, [(0.5, replace(result_of(2, [0, 2]), query="last"))], 2)
    drawn = []
    draw = Lettering.draw
    monkeypatch.setattr(picture.Lettering, "draw", lambda self, *given: (drawn.extend(given[2]), draw(self, *given))[1])
    render(explained, [[Image.new("RGB", (56, 28))]])
    assert "to do with the prompt's last token" in " ".join(drawn) and explained.query == "last"


def test_kept_tokens_keep_their_colours_and_dropped_ones_lose_them():
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    pixels = np.asarray(kept_panel(image, np.array([[True, False]])))
    assert pixels[10, 5].tolist() == [255, 0, 0]
    red, green, blue = pixels[10, 35].astype(int)
    assert red - green < 20 and blue > 100


@pytest.mark.parametrize("path", NATURAL, ids=lambda path: path.name)
def test_of_a_photograph_or_page_kept_tokens_stay_as_they_are_and_dropped_ones_do_not(path, tmp_path):
    image = Image.fromarray(load_image(path))
    kept = np.random.default_rng(0).random((image.height // 28, image.width // 28)) < 0.3
    panel = np.asarray(kept_panel(image, kept))
    own = np.asarray(image)
    for row, column in np.ndindex(*kept.shape):
        y, x = (
            int((at + 0.5) * size / count)
            for at, size, count in zip((row, column), own.shape, kept.shape, strict=False)
        )
        middle = np.s_[y - 4 : y + 4, x - 4 : x + 4]
        assert np.array_equal(panel[middle], own[middle]) == kept[row, column]
    scores = kept.astype(np.float32)[None]
    explained = Explanation(
        "What is it?",
        "hawk",
        kept.size,
        (VisualItem("image", (1, *kept.shape), scores),),
        (Selection(0.3, int(kept.sum()), "answer", (kept[None],)),),
    )
    save(render(explained, [[image]]), tmp_path / "kept.png")
    with Image.open(tmp_path / "kept.png") as drawn:
        assert drawn.format == "PNG" and drawn.width > 450


@pytest.mark.parametrize("grey", [0, 255])
def test_dropped_tokens_differ_from_kept_ones_on_black_and_on_white(grey):
    image = Image.new("RGB", (400, 200), (grey, grey, grey))
    pixels = np.asarray(kept_panel(image, np.array([[True, False]]))).astype(int)
    assert abs(pixels[100, 350] - grey).min() > 25


def test_a_line_divides_large_cells_and_spares_small_ones():
    mask = np.zeros((10, 10), np.bool_)
    mask[4:6, 4:6] = True
    white = {(255, 255, 255)}
    for size, lined in ((200, True), (40, False)):
        pixels = np.asarray(kept_panel(Image.new("RGB", (size, size), "white"), mask))
        inside = pixels[int(size * 0.4) : int(size * 0.6), int(size * 0.4) : int(size * 0.6)]
        assert ({tuple(pixel) for pixel in inside.reshape(-1, 3).tolist()} != white) is lined


def test_the_ramp_grows_lighter_with_the_score():
    luminance = colours(np.linspace(0.0, 1.0, 50)) @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(luminance) > 0).all()


def test_a_heat_panel_is_lightest_where_the_score_is_highest():
    panel = heat_panel(Image.new("RGB", (30, 10)), np.array([[0.0, 1.0, 0.5]], np.float32), (0.0, 1.0))
    greys = np.asarray(panel.convert("L"))[5, [5, 15, 25]]
    assert greys[1] > greys[2] > greys[0]


def test_equal_scores_can_be_drawn():
    heat_panel(Image.new("RGB", (30, 10)), np.ones((1, 3), np.float32), (1.0, 1.0))


@pytest.mark.parametrize("size", [(224, 224), (3840, 2160), (28, 2800), (1, 1)])
@pytest.mark.parametrize("ratios", [(0.2,), (0.1, 0.2, 0.4), tuple(np.linspace(0.05, 1.0, 12).tolist())])
def test_a_picture_is_neither_tiny_nor_huge(size, ratios):
    grid = (1, max(1, size[1] // 28), max(1, size[0] // 28))
    picture = render(explanation_of(grid, ratios=ratios), [[Image.new("RGB", size, "orange")]], note="a model")
    bands = -(-(2 + len(ratios)) // 4)  # the original, the scores and the ratios, at most four beside each other
    assert picture.mode == "RGB"
    assert 450 <= picture.width <= 3200
    assert 80 <= picture.height <= 1150 * bands


def test_small_images_stay_sharp():
    """Black and white pixels in turn: none turns grey."""
    board = (np.indices((56, 56)).sum(0) % 2 * 255).astype(np.uint8)
    sheet = np.asarray(render(explanation_of((1, 2, 2)), [[Image.fromarray(board)]]).convert("RGB"))
    panel = next(sheet[y : y + 200, 30:230] for y in range(100, 300) if (sheet[y, 30:230] == 0).all(-1).any())
    assert {tuple(pixel) for pixel in panel[20:].reshape(-1, 3).tolist()} == {(0, 0, 0), (255, 255, 255)}


def test_every_image_and_at_most_some_frames_of_a_video_are_drawn():
    image = Image.new("RGB", (280, 140), "orange")
    one = render(explanation_of((1, 5, 10)), [[image]]).height
    assert render(explanation_of((1, 5, 10), (1, 5, 10)), [[image], [image]]).height > one + 140
    few = render(explanation_of((MAX_FRAMES, 5, 10), kind="video"), [[image] * MAX_FRAMES]).height
    assert render(explanation_of((40, 5, 10), kind="video"), [[image] * MAX_FRAMES]).height == few


@pytest.mark.parametrize(
    "text",
    ["one two three " * 60, "x" * 900, "数一数图中有多少只猫。" * 40, "a\n\nb", "", "line\n" * 30],
)
def test_text_is_wrapped_to_its_width(text):
    lettering = Lettering.of_size(16, text)
    lines = lettering.wrap(text, 300, 5)
    assert len(lines) <= 5
    assert all(lettering.width_px(line) <= 300 for line in lines)
    if len(text) > 100:
        assert lines[-1].endswith("...")


def test_no_word_is_lost_in_wrapping():
    text = "The quick brown fox jumps over incomprehensibilities of 1234567890123456789012345678901234567890 dogs"
    lines = Lettering.of_size(16).wrap(text, 200, 50)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    target = tmp_path / "kept.png"
    target.mkdir()
    with pytest.raises(InvalidInput, match=r"kept\.png"):
        save(Image.new("RGB", (4, 4)), target)
    assert list(tmp_path.iterdir()) == [target]


def test_a_picture_replaces_an_older_one(tmp_path):
    target = tmp_path / "new folder" / "kept.png"
    save(Image.new("RGB", (4, 4)), target)
    save(Image.new("RGB", (8, 4)), target)
    with Image.open(target) as written:
        assert written.size == (8, 4)
    assert [path.name for path in target.parent.iterdir()] == ["kept.png"]
