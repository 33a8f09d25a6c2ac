"""The page of the service, in a headless Chromium."""

import json
import re

import numpy as np
import pytest
from browser import PROGRAM, Browser
from model_utils import ROOT
from PIL import Image
from usage_utils import picture

pytest.importorskip("fastapi", reason="the service needs FastAPI: pip install 'reldn_d2[serve]'")

from serving import running

from reldn_d2.predictor import RelationPredictor

PAGE = (ROOT / "reldn_d2/serve/page.html").read_text()
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on PATH")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def service(predictor):
    with running(predictor, max_bytes=200_000) as service:
        yield service


@pytest.fixture
def page(browser, service):
    """Open the page; after the test it must have logged nothing."""
    browser.messages.clear()
    browser.resize(1300, 800)
    browser.open(service.url)
    browser.wait("about !== null")
    yield browser
    assert browser.messages == []


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def listed(browser) -> list[str]:
    return browser.run("[...document.querySelectorAll('#list button')].map(x => x.innerText)")


def error(browser) -> str:
    browser.wait("el('error').textContent !== ''")
    return browser.run("el('error').textContent")


def predicted(browser, path) -> None:
    """Choose an image and wait for its relations."""
    browser.choose_file("#file", path)
    browser.wait("answer !== null")


def test_page_loads_nothing_from_elsewhere():
    addresses = re.findall(r"https?://[^\"'\s)]+", PAGE)
    assert addresses == ["http://www.w3.org/2000/svg"]  # a name, which is not loaded
    assert not re.search(r"@import|url\(|<script src|<link rel=.stylesheet|innerHTML", PAGE)


def test_page_forbids_everything_but_its_own_script(service):
    policy = service.request("GET", "/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "unsafe-inline" not in policy.split("style-src")[0]


@needs_browser
def test_page_lists_and_draws_the_relations_of_an_image(page, photo, predictor):
    page.run("el('threshold').value = 0; el('count').value = 7")
    predicted(page, photo)
    graph = predictor(photo).best(7)
    assert len(listed(page)) == 7
    for text, triplet in zip(listed(page), graph.triplets()):
        assert triplet.predicate in text and triplet.subject in text and triplet.object in text
    pairs = {tuple(x) for x in graph.pairs.tolist()}
    assert page.run("document.querySelectorAll('#overlay line').length") == 2 * len(pairs)
    entities = page.run("document.querySelectorAll('#overlay g:first-child rect').length")
    assert entities == 2 * len(np.unique(graph.pairs))
    assert page.run("el('status').textContent").startswith("7 of ")


@needs_browser
def test_page_highlights_a_relation_by_mouse_and_keyboard(page, photo):
    page.run("el('threshold').value = 0")
    predicted(page, photo)
    arrows = "document.querySelectorAll('#overlay polygon').length"
    many = page.run(arrows)
    page.run("document.querySelectorAll('#list button')[1].click()")
    assert page.run(arrows) == 1 < many
    pressed = (
        "[...document.querySelectorAll('#list button')].map(x => x.ariaPressed).indexOf('true')"
    )
    assert page.run(pressed) == 1
    page.press("Escape", 27)
    assert page.run(arrows) == many and page.run(pressed) == -1
    page.run("document.querySelector('#list button').focus()")
    page.press("ArrowDown", 40)
    page.press("ArrowDown", 40)
    page.press("Enter", 13, "\r")
    assert page.run(pressed) == 2 and page.run(arrows) == 1
    assert page.run("document.activeElement.dataset.row") == "2"  # the focus is kept
    page.run("el('all').click()")
    assert page.run(arrows) == many


@needs_browser
def test_page_every_control_is_reached_by_tab(page, photo):
    predicted(page, photo)
    page.run("el('entities').open = true; document.activeElement.blur()")
    seen = []
    for _ in range(14):
        page.press("Tab", 9)
        seen.append(page.run("document.activeElement.id || document.activeElement.dataset.row"))
    for name in ("file", "find", "className", "draw", "clear", "boxes", "threshold", "count"):
        assert name in seen, seen
    assert "download" in seen and "0" in seen


@needs_browser
def test_page_threshold_and_number_choose_what_is_listed_and_saved(page, photo, predictor):
    predicted(page, photo)
    page.run("el('count').value = 500; el('count').oninput()")
    page.run("el('threshold').value = 30; el('threshold').oninput()")
    graph = predictor(photo).best(500, 0.3**3)
    assert 0 < len(graph.scores) == len(listed(page))
    saved = page.run("shownRecord()")
    expected = json.loads(graph.to_json())
    assert saved["file_name"] == "photo.png"
    assert saved["relations"]["pairs"] == expected["relations"]["pairs"]
    assert saved["instances"].keys() == expected["instances"].keys()
    page.run("HTMLAnchorElement.prototype.click = function () { window.saved = this.download }")
    page.run("el('download').click()")
    assert page.run("saved") == "photo.json"


@needs_browser
def test_page_takes_a_dropped_image_and_its_boxes(page, photo, predictor):
    boxes = {
        "photo.png": {"boxes": [[5, 5, 40, 50], [30, 20, 80, 55]], "classes": ["person", "cup"]}
    }
    data = list(photo.read_bytes())
    page.run(f"const text = {json.dumps(json.dumps(boxes))}, bytes = new Uint8Array({data})")
    page.run("""
        const transfer = new DataTransfer();
        transfer.items.add(new File([text], "boxes.json"));
        transfer.items.add(new File([bytes], "photo.png", { type: "image/png" }));
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
    """)
    page.wait("el('boxes').value !== '' && answer === null")
    page.run("el('find').click()")
    page.wait("answer !== null")
    expected = predictor(photo, **boxes["photo.png"])
    assert page.run("answer.instances.boxes") == expected.boxes.tolist()
    assert page.run("answer.relations.pairs") == expected.pairs.tolist()


@needs_browser
def test_page_says_errors_in_words(browser, service, tmp_path, photo):
    browser.open(service.url)
    browser.wait("about !== null")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    browser.choose_file("#file", bad)
    assert error(browser).startswith("image: the content is not an image")
    bad.write_bytes(b"x" * 200_001)
    browser.choose_file("#file", bad)
    browser.wait("el('error').textContent.includes('bad.png has 0.2 MB')")
    predicted(browser, photo)
    assert browser.run("el('error').textContent") == ""
    for text, message in (
        ("[1, ", "not JSON"),
        ("{}", "lack a list"),
        ("[[1, 2]]", "shape (1, 2)"),
    ):
        browser.run(f"el('boxes').value = {json.dumps(text)}; el('find').click()")
        browser.wait(f"el('error').textContent.includes({json.dumps(message)})")
    browser.run("el('boxes').value = ''; window.fetch = () => Promise.reject(new TypeError())")
    browser.run("el('find').click()")
    assert error(browser).startswith("The service cannot be reached")


@needs_browser
def test_page_shows_markup_in_names_as_text(browser, predictor, tmp_path, monkeypatch):
    evil = "<img src=x onerror=stolen=1>"
    names = [f"{evil} {i}" for i in range(200)]
    monkeypatch.setattr(predictor, "thing_classes", names[: len(predictor.thing_classes)])
    monkeypatch.setattr(predictor, "predicate_classes", names[: len(predictor.predicate_classes)])
    Image.fromarray(picture()).save(tmp_path / f"{evil}.png")
    (tmp_path / f"{evil}.jpg").write_bytes(b"x" * 200_001)
    browser.messages.clear()
    with running(predictor, max_bytes=200_000) as service:
        browser.open(service.url)
        browser.wait("about !== null")
        assert browser.run("el('classes').options[3].value") == names[3]
        browser.choose_file("#file", tmp_path / f"{evil}.jpg")
        assert error(browser).startswith(f"{evil}.jpg has 0.2 MB")
        browser.run("el('threshold').value = 0")
        predicted(browser, tmp_path / f"{evil}.png")
        assert listed(browser)[0].count(evil) == 3  # subject, predicate, object
        assert evil in browser.run("el('overlay').textContent")
        given = {"boxes": [[5, 5, 40, 50]], "classes": [evil]}
        browser.run(f"el('boxes').value = {json.dumps(json.dumps(given))}; boxesChanged()")
        assert evil in browser.run("el('overlay').textContent")
        browser.run("el('find').click()")
        browser.wait("answer !== null")
        assert evil in browser.run("el('status').textContent")  # a class that was left out
        assert browser.run("[...document.images].map(x => x.id)") == ["picture"]
        assert browser.run("typeof stolen") == "undefined"
    assert browser.messages == []


@needs_browser
def test_page_draws_boxes_for_a_model_without_a_detector(browser, tmp_path):
    Image.fromarray(picture(300, 400)).save(tmp_path / "photo.jpg")
    with running(RelationPredictor.from_pretrained("vrd_boxes", "cpu")) as service:
        browser.resize(1300, 800)
        browser.open(service.url)
        browser.wait("about !== null")
        browser.choose_file("#file", tmp_path / "photo.jpg")
        browser.wait("el('status').textContent.includes('This model has no detector')")
        browser.run("el('find').click()")
        assert "draw boxes" in error(browser)
        browser.run("el('draw').click(); window.scrollTo(0, 0)")
        frame = browser.run(
            "(r => [r.x, r.y, r.width, r.height])(el('picture').getBoundingClientRect())"
        )
        scale = min(frame[2] / 400, frame[3] / 300)
        left = frame[0] + (frame[2] - 400 * scale) / 2
        drawn = {"person": (50, 40, 200, 250), "horse": (150, 100, 350, 280)}
        for name, (x0, y0, x1, y1) in drawn.items():
            browser.run(f"el('className').value = '{name}'")
            corners = [(left + x * scale, frame[1] + y * scale) for x, y in ((x1, y1), (x0, y0))]
            browser.drag(*corners)
        given = browser.run("entities()")
        assert given["classes"] == list(drawn)
        np.testing.assert_allclose(given["boxes"], list(drawn.values()), atol=1)
        browser.run("el('find').click()")
        browser.wait("answer !== null")
        assert any("person" in x and "horse" in x for x in listed(browser))


@needs_browser
@pytest.mark.parametrize("width", [400, 1300])
def test_page_fits_the_window(page, photo, tmp_path, width):
    page.resize(width, 800)
    page.run("el('entities').open = true; el('threshold').value = 0")
    predicted(page, photo)
    assert page.run("document.documentElement.scrollWidth") <= width
    outside = page.run(
        """[...document.querySelectorAll("button, input, textarea, figure, ol")].filter(x =>
        x.getBoundingClientRect().right > innerWidth + 1).map(x => x.id || x.innerText)"""
    )
    assert outside == []
    # The picture is in sight while the last relation is read.
    page.run("[...document.querySelectorAll('#list button')].at(-1).scrollIntoView()")
    assert page.run("el('picture').getBoundingClientRect().bottom") > 100
    page.screenshot(tmp_path / "page.png")
    assert Image.open(tmp_path / "page.png").width == width
