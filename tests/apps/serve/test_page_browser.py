"""The page in headless Chromium: `make check-page`. Screenshots go to artifacts/page-*.png, to be looked at."""

import base64
import re
import shutil
import time
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from hawk_trt.pruning.hawk import num_kept
from hawk_trt.request import PruningConfig
from serving import SAMPLES, serving, wait_for

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup")

ASK = "Count the circles."
PICTURE = SAMPLES / "2-count.png"
DROP = """async ([data, name, type]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  for (const kind of ["dragover", "drop"]) {
    document.getElementById("drop").dispatchEvent(
      new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: transfer }));
  }
}"""
_REFUSED = "the server responded with a status of 4"
_READING = "Multiple readback operations"  # what CELLS does, not the page
# the alpha in the middle of every cell of the overlay: 0 where the image shows as it is
CELLS = """([columns, rows]) => {
  const canvas = document.getElementById("overlay");
  const context = canvas.getContext("2d");
  return Array.from({ length: columns * rows }, (_, cell) => context.getImageData(
    ((cell % columns) + 0.5) * canvas.width / columns,
    (Math.floor(cell / columns) + 0.5) * canvas.height / rows, 1, 1).data[3]);
}"""


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "no Chromium on this machine: apt-get install chromium"
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def server(tiny_bundle):
    with serving(tiny_bundle) as running:
        yield running


@contextmanager
def opened(browser, server, width=1280, height=860, *, refusals=False, **options):
    """The page in a window of its own; what it logs, or fails to load, fails the test."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    page = context.new_page()
    page.set_default_timeout(30_000)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
    page.on(
        "request", lambda request: request.url.startswith((server.url, "blob:", "data:")) or wrong.append(request.url)
    )
    page.goto(server.url)
    until(page, "document.getElementById('selector').length || !document.getElementById('key-form').hidden")
    yield page
    context.close()
    assert not [text for text in wrong if not (_READING in text or (refusals and _REFUSED in text))]


def until(page, condition):
    """Wait as a person does; Playwright's own way would need eval, which the page's policy forbids."""
    wait_for(lambda: page.evaluate(condition))


def drop(page, picture, name=None, kind="image/png"):
    page.evaluate(DROP, [base64.b64encode(picture.read_bytes()).decode(), name or picture.name, kind])


def ask(page, text):
    page.get_by_label("Question", exact=True).fill(text)
    page.get_by_role("button", name=re.compile("^Ask")).click()
    until(page, "!document.getElementById('ask').disabled && !document.getElementById('times').hidden")


def slide(page, percent):
    page.get_by_role("slider", name="Visual tokens kept").fill(str(percent))


def kept_cells(page, columns=8, rows=8):
    return [cell for cell, alpha in enumerate(page.evaluate(CELLS, [columns, rows])) if alpha == 0]


def requests(server):
    return sum(
        float(line.split()[-1])
        for line in server.http.get("/metrics").text.splitlines()
        if line.startswith('hawk_requests_total{route="/v1/chat/completions"')
    )


def expected(server, picture, text, keep_ratio, selector="hawk"):
    return server.pipe.generate(
        text, [picture], pruning=PruningConfig(keep_ratio=keep_ratio, selector=selector), max_new_tokens=64
    )


def visual_indices(result):
    """The kept visual tokens, counted among the visual ones, as the best scores say."""
    order = np.argsort(-result.scores.astype(np.float64), kind="stable")[: result.num_kept]
    return sorted(order.tolist())


def test_a_dropped_image_is_answered_as_offline_and_its_kept_tokens_are_shown(browser, server, repository):
    with opened(browser, server) as page:
        drop(page, PICTURE)
        ask(page, ASK)
        result = expected(server, PICTURE, ASK, 0.2)
        assert page.locator("#answer").text_content() == result.text
        assert "13 of 64 visual tokens kept (20.3 %)" in page.locator("#count").text_content()
        assert kept_cells(page) == visual_indices(result)
        labels, times = (page.locator(f"#stages {cell}").all_inner_texts() for cell in ("th", "td:last-child"))
        assert labels == [
            "Image and prompt", "Vision", "First layer", "Decoder", "Decode steps", "Waiting and the rest", "Total"
        ]  # fmt: skip
        assert all(re.fullmatch(r"[\d.]+ (ms|s)", time) for time in times)
        assert page.get_by_text("Take photo").is_hidden()
        page.screenshot(path=repository / "artifacts" / "page-desktop.png", full_page=True)
        assert "visual tokens" not in page.locator("#usage").text_content(), "the count is told once"
        assert page.locator("#asked td").all_inner_texts()[0] == ASK
        assert page.locator("#legend").is_hidden()
        page.get_by_label("Scores").check()
        assert page.locator("#legend").is_visible()
        page.screenshot(path=repository / "artifacts" / "page-scores.png", full_page=True)


def test_the_slider_shows_what_every_ratio_keeps_without_asking(browser, server):
    with opened(browser, server) as page:
        drop(page, PICTURE)
        ask(page, ASK)
        before = requests(server)
        for percent in (1, 2, 7, 10, 29, 30, 55, 57, 58, 99, 100):
            slide(page, percent)
            result = expected(server, PICTURE, ASK, percent / 100)
            assert result.num_kept == num_kept(64, percent / 100, 1)
            assert kept_cells(page) == visual_indices(result), percent
            assert page.locator("#count").text_content().startswith(f"{result.num_kept} of 64 "), percent
        assert requests(server) == before
        slide(page, 5)
        button = page.get_by_role("button", name="Ask again, 5 % kept")
        button.click()
        until(page, "document.querySelectorAll('#asked tr').length === 2")
        assert page.locator("#answer").text_content() == expected(server, PICTURE, ASK, 0.05).text
        assert requests(server) == before + 1


def test_num_kept_is_the_projects_own_for_many_sizes_and_ratios(browser, server):
    sizes, percents = [1, 2, 50, 64, 99, 100, 1369, 16384], list(range(1, 101))
    with opened(browser, server) as page:
        got = page.evaluate(
            """async ([sizes, percents]) => {
              const { numKept } = await import("/page/kept.js");
              return sizes.map((size) => percents.map((percent) => numKept(size, percent / 100, 3)));
            }""",
            [sizes, percents],
        )
    assert got == [[num_kept(size, percent / 100, 3) for percent in percents] for size in sizes]


def test_equal_scores_go_to_the_lower_index_and_tiles_lie_where_they_were_cut(browser, server):
    with opened(browser, server) as page:
        kept, panels = page.evaluate(
            """async () => {
              const { best } = await import("/page/kept.js");
              const { panelsOf } = await import("/page/overlay.js");
              return [[...best([0, 1, 1, -0, 1, 0], 4)].sort(), panelsOf({ grid: [3, 1, 2], tiles: [1, 2] })];
            }"""
        )
    assert kept == [0, 1, 2, 4]
    assert panels == [
        {"columns": 2, "rows": 2, "tokens": [0, 1, 2, 3]},
        {"columns": 2, "rows": 1, "tokens": [4, 5]},
    ]


def test_a_selector_that_does_not_rank_by_scores_is_shown_as_asked_and_says_so(browser, server):
    with opened(browser, server) as page:
        drop(page, PICTURE)
        page.get_by_label("Selector").select_option("divprune")
        ask(page, ASK)
        result = expected(server, PICTURE, ASK, 0.2, "divprune")
        first = kept_cells(page)
        assert (page.locator("#answer").text_content(), len(first)) == (result.text, result.num_kept)
        slide(page, 50)
        assert kept_cells(page) == first
        assert "only the server can tell: ask again" in page.locator("#count").text_content()


@pytest.mark.parametrize("selector", ["uniform", "fastv-input"])
def test_selectors_that_rank_by_scores_follow_the_slider(browser, server, selector):
    with opened(browser, server) as page:
        drop(page, PICTURE)
        page.get_by_label("Selector").select_option(selector)
        ask(page, ASK)
        slide(page, 40)
        shown = kept_cells(page)
        page.get_by_role("button", name=re.compile("^Ask")).click()
        until(page, "document.querySelectorAll('#asked tr').length === 2")
        assert kept_cells(page) == shown
        assert len(shown) == num_kept(64, 0.4, 1)


def test_a_sample_is_asked_about_compared_with_all_tokens_and_asked_again_in_a_second_turn(browser, server):
    with opened(browser, server, 1280, 900) as page:
        page.get_by_role("button", name="Try a sample").click()
        until(page, "document.getElementById('question').value")
        page.get_by_role("button", name="Ask", exact=True).click()
        until(page, "document.querySelectorAll('#asked tr').length === 1")
        assert page.locator("#answer").text_content() == "cyan"
        page.get_by_role("button", name="Compare with 100 %").click()
        until(page, "document.querySelectorAll('#asked tr').length === 2")
        assert [row.split("\t")[1] for row in page.locator("#asked tr").all_inner_texts()] == ["64 of 64", "13 of 64"]
        assert page.get_by_role("button", name="Compare with 100 %").is_hidden()
        sent = []
        page.on("request", lambda request: request.method == "POST" and sent.append(request.post_data_json))
        page.get_by_label("Follow-up").check()
        ask(page, "And the circle?")
        until(page, "document.querySelectorAll('#asked tr').length === 3")
        assert [message["role"] for message in sent[0]["messages"]] == ["user", "assistant", "user"]
        assert sent[0]["messages"][1]["content"] == "cyan"
        assert sent[0]["pruning"]["query"] == "turn"


@pytest.mark.parametrize("quota", ["global", "per-image"])
def test_several_images_are_asked_about_and_each_is_shown_with_its_tokens(browser, tiny_bundle, repository, quota):
    pictures = [SAMPLES / "0-colour.png", PICTURE, SAMPLES / "1-where.png"]
    pruning = PruningConfig(keep_ratio=0.2, quota=quota)
    with serving(tiny_bundle, pruning=pruning) as server, opened(browser, server) as page:
        page.set_input_files("#choose", pictures[:2])
        until(page, "document.querySelectorAll('#strip button').length === 2")
        page.set_input_files("#add", pictures[2])
        until(page, "document.querySelectorAll('#strip button').length === 3")
        ask(page, ASK)
        for ratio in (0.2, 0.35, 1.0):
            slide(page, round(100 * ratio))
            asked = PruningConfig(keep_ratio=ratio, quota=quota)
            result = server.pipe.generate(ASK, pictures, pruning=asked, max_new_tokens=64)
            if ratio == 0.2:
                assert page.locator("#answer").text_content() == result.text
            layout = server.pipe.processor.layout(server.pipe.prepare(ASK, pictures))
            kept = np.isin(layout.source_index[layout.visual_rows >= 0], result.kept_indices).reshape(3, 64)
            for number in range(3):
                page.get_by_role("button", name=f"Image {number + 1}").click()
                assert kept_cells(page) == np.flatnonzero(kept[number]).tolist()
                count = page.locator("#count").text_content()
                assert count.startswith(f"{result.num_kept} of 192 visual tokens kept"), count
                assert count.endswith(f"of this image {kept[number].sum()} of 64"), count
        slide(page, 20)
        page.screenshot(path=repository / "artifacts" / f"page-several-{quota}.png", full_page=True)
        page.get_by_role("button", name="Remove this one").click()
        until(page, "document.querySelectorAll('#strip button').length === 2")
        page.get_by_role("button", name="Remove this one").click()
        until(page, "document.getElementById('strip').hidden")
        ask(page, ASK)
        assert page.locator("#answer").text_content() == expected(server, pictures[0], ASK, 0.2).text


def test_an_image_that_is_too_large_to_send_is_made_smaller(browser, tiny_bundle, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    with serving(tiny_bundle, max_body_mb=0.5) as small, opened(browser, small) as page:
        page.set_input_files("#choose", tmp_path / "noise.png")
        until(page, "document.getElementById('picture').naturalWidth")
        ask(page, ASK)
        assert page.locator("#alert").is_hidden()


def test_errors_of_the_server_speak_of_the_page(browser, tiny_bundle):
    with serving(tiny_bundle, max_prompt_tokens=20) as small, opened(browser, small, refusals=True) as page:
        drop(page, PICTURE)
        page.get_by_label("Question", exact=True).fill(ASK)
        page.get_by_role("button", name="Ask").click()
        page.wait_for_selector("#alert:not([hidden])")
        assert page.locator("#alert").inner_text().startswith("The question: got a prompt of ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_sideways(browser, server, repository, scheme):
    phone = {"color_scheme": scheme, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    with opened(browser, server, 390, 740, **phone) as page:
        page.set_input_files("#choose", PICTURE)
        ask(page, ASK)
        sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert sizes == [390, 390]
        place = page.locator("#answer").bounding_box()
        assert place["y"] >= 0 and place["y"] + place["height"] <= 740, "the answer is out of view"
        assert page.get_by_text("Take photo").is_visible()
        small = page.evaluate(
            """[...document.querySelectorAll("button, .button, select, textarea, input[type=range]")]
               .map((one) => [one.id, one.getBoundingClientRect().height])
               .filter(([, height]) => height && height < 36)"""
        )
        assert small == []
        page.screenshot(path=repository / "artifacts" / f"page-phone-{scheme}.png", full_page=True)


def test_it_works_with_the_keyboard_alone(browser, server):
    with opened(browser, server) as page:
        page.set_input_files("#choose", PICTURE)
        until(page, "document.activeElement.id === 'question'")
        page.keyboard.type(ASK)
        page.keyboard.press("Enter")
        page.wait_for_selector("#stages tr")
        page.get_by_role("slider", name="Visual tokens kept").focus()
        before = len(kept_cells(page))
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert len(kept_cells(page)) == num_kept(64, 0.22, 1) > before
        unnamed = page.evaluate(
            """[...document.querySelectorAll("button, input, select, textarea")]
               .filter((one) => !one.textContent.trim() && !one.labels?.length).map((one) => one.id)"""
        )
        assert unnamed == []


def test_errors_of_the_server_are_shown_as_text(browser, server):
    with opened(browser, server, refusals=True) as page:
        drop(page, SAMPLES / "samples.json", "<img src=x onerror=alert(1)>.svg", "image/svg+xml")
        assert page.locator("#alert").inner_text().startswith("<img src=x onerror=alert(1)>.svg: got image/svg+xml")
        assert page.locator("#alert img").count() == 0
        message = "pruning.keep_ratio: <b>no</b>"
        page.route(
            "**/v1/chat/completions", lambda route: route.fulfill(status=429, json={"error": {"message": message}})
        )
        page.get_by_label("Question", exact=True).fill(ASK)
        page.get_by_role("button", name="Ask").click()
        page.wait_for_selector("#alert:not([hidden])")
        assert page.locator("#alert").inner_text() == message
        page.unroute("**/v1/chat/completions")
        ask(page, ASK)
        assert page.locator("#alert").is_hidden()


def test_a_key_is_asked_for_and_kept_in_memory_alone(browser, tiny_bundle):
    with serving(tiny_bundle, api_keys=("secret",)) as server, opened(browser, server, refusals=True) as page:
        field = page.get_by_label("API key of this server")
        field.fill("wrong")
        page.get_by_role("button", name="Use key").click()
        page.wait_for_selector("#alert:not([hidden])")
        assert page.locator("#alert").inner_text() == "The server does not know this key."
        field.fill("secret")
        page.get_by_role("button", name="Use key").click()
        until(page, "document.getElementById('model').textContent.startsWith('tiny-vlm')")
        assert field.is_hidden()
        ask(page, "Say anything.")
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_stopping_cancels_the_work_on_the_server(browser, server, monkeypatch):
    batcher = server.service.batcher
    step = batcher._scheduler._decode
    monkeypatch.setattr(batcher._scheduler, "_decode", lambda: (time.sleep(0.5), step())[1])
    before = batcher.counters.cancelled
    with opened(browser, server) as page:
        drop(page, SAMPLES / "1-where.png")
        page.get_by_label("Question", exact=True).fill("In which corner is the circle?")
        page.evaluate(
            """async () => {
              document.getElementById("form").requestSubmit();
              while (!document.getElementById("answer").textContent) await new Promise(requestAnimationFrame);
              document.getElementById("stop").click();
            }"""
        )
        until(page, "document.getElementById('usage').textContent === 'Stopped.'")
        wait_for(lambda: server.service.open_requests == 0 and batcher.counters.cancelled == before + 1)
