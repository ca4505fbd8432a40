"""The page in a browser: every function, by mouse and by keys, small and large, light and dark.

Needs Chromium; without it the tests are skipped.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: the page is not tried"),
    # One browser for all: it takes longer to start than any test.
    pytest.mark.xdist_group("page"),
]
WAIT_MS = 20_000
TEXTS = "red circle\nblue square"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-quic",
                                            "--disable-background-networking", "--disable-sync"]
        )  # fmt: skip
        yield browser
        browser.close()


class Watched:
    """What a page did that it should not: errors, refused scripts, requests to elsewhere."""

    def __init__(self, page: Page, url: str) -> None:
        self.problems: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("console", self._console)
        page.on("request", lambda request: self._request(request.url, url))

    def _console(self, message: Any) -> None:
        # An answer that is no good one is logged by the browser itself.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.problems.append(f"console: {message.text}")

    def _request(self, asked: str, url: str) -> None:
        if not asked.startswith((url, "data:", "blob:")):
            self.problems.append(f"request: {asked}")


@pytest.fixture
def page(browser: Browser, running: Any) -> Iterator[Page]:
    """Return an opened page; a test fails for what it does beside."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    watched = Watched(page, running.url)
    page.goto(running.url)
    page.wait_for_selector("html[data-state=ready]")
    yield page
    context.close()
    assert watched.problems == []


@pytest.fixture
def file(tmp_path: Path, picture: bytes) -> str:
    path = tmp_path / "a picture.jpg"
    path.write_bytes(picture)
    return str(path)


def choose(page: Page, file: str) -> None:
    """Choose a picture, and wait until its caption is there."""
    page.set_input_files("#file", file)
    page.wait_for_selector("#caption .legend")


def all_loaded(page: Page) -> None:
    """Wait until the pictures of the gallery are there."""
    for image in page.locator("#search .gallery img").all():
        expect(image).to_have_js_property("naturalWidth", 48)


def test_a_picture_that_is_chosen_gets_its_caption_word_by_word(
    page, file, engine, picture
) -> None:
    from openblip.generation import Decoding

    choose(page, file)
    [[expected]] = engine.caption([picture], decoding=Decoding("greedy"))
    words = page.locator("#caption .word")
    assert words.all_text_contents() == [word.text for word in expected.words]
    shown = float(words.first.get_attribute("data-probability") or "")
    assert shown == pytest.approx(expected.words[0].probability, abs=2e-3)
    assert "probability" in (words.first.get_attribute("aria-label") or "")
    expect(page.locator("#shown-name")).to_have_text("a picture.jpg")
    expect(page.locator("#shown-size")).to_have_text("48 × 48 px")


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_is_dropped_or_pasted(page, picture, way) -> None:
    page.evaluate(
        """([bytes, way]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], "given.jpg", {type: "image/jpeg"}));
          const event = way === "drop"
            ? new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true});
          document.querySelector("#drop").dispatchEvent(event);
        }""",
        [list(picture), way],
    )
    page.wait_for_selector("#caption .legend")
    expect(page.locator("#shown-name")).to_contain_text("given.jpg")


def test_other_ways_to_write_a_caption(page, file) -> None:
    choose(page, file)
    page.click("#caption summary")
    for way in ("beam", "nucleus"):
        page.select_option("#caption-method", way)
        with page.expect_response("**/v1/caption") as answer:
            page.click("#caption [type=submit]")
        assert answer.value.ok
        page.wait_for_selector("#caption .legend")
        assert page.locator("#caption .word").count() > 0


def test_texts_are_matched(page, file, engine, picture) -> None:
    choose(page, file)
    page.fill("#match-texts", TEXTS)
    page.click("#match [type=submit]")
    rows = page.locator("#match .result > li")
    expect(rows).to_have_count(2)
    [judged] = engine.match([picture], [TEXTS.splitlines()])
    for place, one in enumerate(judged):
        expect(rows.nth(place)).to_contain_text(f"{one.match_probability:.2f}")
    expect(page.locator("#match .badge")).to_have_text("best match")


def test_questions_are_answered_and_kept(page, file) -> None:
    choose(page, file)
    page.fill("#ask-question", "what is red?")
    page.click("#ask [type=submit]")
    expect(page.locator("#ask .question")).to_have_text(["what is red?"])
    page.fill("#ask-question", "which?")
    page.fill("#ask-answers", "red, blue")
    page.keyboard.press("Enter")
    expect(page.locator("#ask .question")).to_have_text(["which?", "what is red?"])
    first = page.locator("#ask .history > li").first.locator("li")
    expect(first).to_have_count(2)


@pytest.mark.parametrize("score", ["itc", "itm", "both"])
def test_labels_are_ordered(page, file, engine, picture, score) -> None:
    choose(page, file)
    page.fill("#classify-labels", "red, blue\ngreen")
    page.select_option("#classify-score", score)
    page.click("#classify [type=submit]")
    rows = page.locator("#classify .result > li")
    expect(rows).to_have_count(3)
    [guesses] = engine.classify([picture], engine.labels(["red", "blue", "green"]), score=score)
    for place, guess in enumerate(guesses):
        expect(rows.nth(place)).to_contain_text(guess.label)


def test_a_word_shows_its_heat_map_on_hover_focus_and_tap(page, file) -> None:
    choose(page, file)
    page.fill("#match-texts", TEXTS)
    page.click("#match [type=submit]")
    word = page.locator("#match .word").first
    heat = page.locator("#heat")
    word.hover()
    expect(heat).to_be_visible()
    expect(page.locator("#heat-line")).to_contain_text("“red”")
    page.mouse.move(0, 0)
    expect(heat).to_be_hidden()
    word.focus()
    expect(heat).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#heat-line")).to_contain_text("“circle”")
    expect(page.locator("#announcer")).to_contain_text("Heat map of circle: strongest")
    page.keyboard.press("Escape")
    expect(heat).to_be_hidden()
    word.click()
    assert word.get_attribute("aria-pressed") == "true"
    page.mouse.move(0, 0)
    page.locator("#match-texts").focus()
    expect(heat).to_be_visible()
    word.click()
    expect(heat).to_be_hidden()


def test_the_index_is_searched_by_text_by_picture_and_by_both(page, file) -> None:
    expect(page.locator("#search-title")).to_have_text("Search 8 pictures")
    page.fill("#search-text", "red circle")
    page.click("#search [type=submit]")
    found = page.locator("#search .gallery > li")
    expect(found).to_have_count(8)
    expect(page.locator("#search .status")).to_contain_text("re-ranked by ITM")
    images = page.locator("#search .gallery img")
    all_loaded(page)
    shapes = images.evaluate_all("all => all.map(one => one.clientWidth / one.clientHeight)")
    assert shapes == pytest.approx([1.0] * 8, abs=0.05)
    choose(page, file)
    page.check("#search-picture")
    page.uncheck("#search-rerank")
    page.click("#search [type=submit]")
    expect(page.locator("#search .status")).to_contain_text("mean of picture and text")
    page.fill("#search-text", "")
    page.fill("#search-where", "caption~caption 0; width>=48")
    page.click("#search [type=submit]")
    expect(found).to_have_count(1)
    expect(page.locator("#search .status")).to_contain_text("picture by ITC")
    page.fill("#search-where", "colour=red")
    page.click("#search [type=submit]")
    expect(page.locator("#search .status")).to_contain_text("no image has a field 'colour'")


def test_a_found_picture_opens_larger_and_can_be_searched_with(page) -> None:
    page.fill("#search-text", "red circle")
    page.click("#search [type=submit]")
    page.locator("#search .gallery button, #search .gallery a").first.click()
    viewer = page.locator("#viewer")
    expect(viewer).to_be_visible()
    expect(page.locator("#viewer-facts")).to_contain_text("1 of 8")
    expect(page.locator("#viewer-image")).to_have_js_property("naturalWidth", 48)
    page.keyboard.press("ArrowRight")
    expect(page.locator("#viewer-facts")).to_contain_text("2 of 8")
    page.click("#viewer-search")
    expect(viewer).to_be_hidden()
    expect(page.locator("#search .status")).to_contain_text("picture by ITC")
    page.locator("#search .gallery button, #search .gallery a").first.click()
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()


def test_runs_are_shown_in_a_frame_that_may_do_nothing(page) -> None:
    page.click("#tab-runs")
    frame = page.locator("#run-frame iframe")
    expect(frame).to_have_attribute("sandbox", "")
    page.select_option("#run-page", label="report.html")
    expect(page.frame_locator("#run-frame iframe").locator("h1")).to_have_text("report")
    page.select_option("#run-page", label="logs/curves.html")
    expect(page.frame_locator("#run-frame iframe").locator("h1")).to_have_text("curves")


def test_all_is_reached_by_keys(page, file) -> None:
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#tab-pictures")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-runs")).to_be_focused()
    expect(page.locator("#view-runs")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#view-pictures")).to_be_visible()
    choose(page, file)
    wanted = {"theme", "file", "remove", "caption-prompt", "match-texts", "classify-labels",
              "classify-score", "ask-question", "ask-answers", "search-text", "search-where",
              "search-rerank"}  # fmt: skip
    page.click("#caption summary")
    page.locator("#tab-pictures").focus()
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id"))
    assert wanted <= seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280, 1600])
def test_it_fits_every_width_and_is_readable(page, file, width, scheme) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.wait_for_load_state()
    choose(page, file)
    page.fill("#search-text", "red")
    page.click("#search [type=submit]")
    expect(page.locator("#search .gallery > li")).to_have_count(8)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for contrast, text in page.evaluate(CONTRASTS):
        assert contrast >= 4.5, text


def test_the_switch_between_light_and_dark_is_remembered(page) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.click("#theme")
    dark = page.evaluate(background)
    assert dark != light
    page.reload()
    page.wait_for_selector("html[data-state=ready]")
    assert page.evaluate(background) == dark
    expect(page.locator("#theme")).to_have_attribute("aria-checked", "true")


def test_every_control_has_a_name_and_every_picture_a_description(page, file) -> None:
    choose(page, file)
    page.fill("#search-text", "red")
    page.click("#search [type=submit]")
    expect(page.locator("#search .gallery > li")).to_have_count(8)
    assert page.evaluate(NAMELESS) == []
    assert (
        page.evaluate(
            "[...document.images].filter(one => !one.hasAttribute('alt')).map(one => one.outerHTML)"
        )
        == []
    )
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("main, header, form[role=search]").count() == 3


def test_what_goes_wrong_is_said(page, file, tmp_path, running) -> None:
    letter = tmp_path / "letter.png"
    letter.write_text("no picture")
    page.set_input_files("#file", str(letter))
    expect(page.locator("#picture-status")).to_contain_text("is not a picture")
    page.fill("#match-texts", "red")
    page.click("#match [type=submit]")
    expect(page.locator("#match .status")).to_contain_text("Choose a picture first")
    choose(page, file)
    page.fill("#match-texts", "x" * 501)
    page.click("#match [type=submit]")
    expect(page.locator("#match .status")).to_contain_text("longer than 500 characters")
    expect(page.locator("#match .status")).to_contain_text("request")


def test_a_busy_server_is_asked_again(page, file) -> None:
    asked = []

    def answer(route: Route) -> None:
        asked.append(route.request.url)
        if len(asked) == 1:
            error = {"code": "busy", "message": "the server is busy", "request_id": "x"}
            route.fulfill(
                status=429, headers={"Retry-After": "1"}, body=json.dumps({"error": error})
            )
        else:
            route.continue_()

    choose(page, file)
    page.route("**/v1/match", answer)
    page.fill("#match-texts", "red")
    page.click("#match [type=submit]")
    expect(page.locator("#match .result > li")).to_have_count(1)
    assert len(asked) == 2


def test_a_server_that_is_gone_is_said_and_found_again(page) -> None:
    page.route("**/*", lambda route: route.abort())
    page.fill("#search-text", "red")
    page.click("#search [type=submit]")
    expect(page.locator("#server-notice")).to_contain_text("cannot be reached")
    page.unroute("**/*")
    expect(page.locator("#server-notice")).to_be_hidden()


def test_a_token_is_asked_for(browser, serve) -> None:
    token = "a-token-of-more-than-sixteen"
    server = serve(tokens=(token,))
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(server.url)
    page.fill("#token", "a wrong one of sixteen letters")
    page.keyboard.press("Enter")
    expect(page.locator("#token-form label")).to_contain_text("does not know this token")
    page.fill("#token", token)
    page.keyboard.press("Enter")
    page.wait_for_selector("html[data-state=ready]")
    page.fill("#search-text", "red")
    page.click("#search [type=submit]")
    expect(page.locator("#search .gallery > li")).to_have_count(8)
    all_loaded(page)
    context.close()


def test_what_no_model_can_do_is_explained(browser, engine) -> None:
    from tests.serve.conftest import RunningServer, alone

    server: RunningServer = alone(engine)
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(server.url)
    page.wait_for_selector("html[data-state=ready]")
    expect(page.locator("#ask .missing")).to_contain_text("openblip finetune vqa")
    expect(page.locator("#search .missing")).to_contain_text("openblip index FOLDER INDEX")
    page.click("#tab-runs")
    expect(page.locator("#view-runs .missing")).to_contain_text("--run FOLDER")
    context.close()
    server.close()


NAMELESS = """
[...document.querySelectorAll('button, a, input, select, textarea, [role=tab], iframe')]
  .filter(one => one.checkVisibility())
  .filter(one => !(one.ariaLabel || one.textContent.trim() || one.title || one.alt
    || one.querySelector('img[alt]:not([alt=""])')
    || [...(one.labels ?? [])].some(label => label.textContent.trim())))
  .map(one => one.outerHTML)
"""

CONTRASTS = """
(() => {
  const rgb = text => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const backgroundOf = one => {
    for (; one; one = one.parentElement) {
      const color = rgb(getComputedStyle(one).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  const texts = 'h1, h2, p, label, button, summary, dt, dd, li, span';
  for (const one of document.querySelectorAll(texts)) {
    const own = [...one.childNodes].filter(node => node.nodeType === 3 && node.textContent.trim());
    if (!own.length || !one.checkVisibility()) continue;
    if (one.matches(':disabled, .word, .hidden-text')) continue;
    const color = getComputedStyle(one).color;
    if (!color.startsWith('rgb')) continue;
    const [high, low] = [light(rgb(color)), light(backgroundOf(one))].sort((a, b) => b - a);
    found.push([(high + 0.05) / (low + 0.05), `${one.tagName} ${own[0].textContent.trim()}`]);
  }
  return found;
})()
"""
