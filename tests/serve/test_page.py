"""The page in a real browser: it searches, classifies, fits, by keyboard too, and asks nobody else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serve.client import Client, picture

playwright = pytest.importorskip("playwright.sync_api")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SHOTS = os.environ.get("CLIPWORKS_SCREENSHOTS")  # a folder, to look at the tabs


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium: CLIPWORKS_CHROMIUM, one on the path, or that of playwright; skips without."""
    named = os.environ.get("CLIPWORKS_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as engine:
        if named is None and not Path(engine.chromium.executable_path).exists():
            pytest.skip("no Chromium here (CLIPWORKS_CHROMIUM names one)")
        started = engine.chromium.launch(executable_path=named, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, client: Client) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    opened = context.new_page()
    opened.set_default_timeout(30_000)
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    elsewhere: list[str] = []
    home = f"http://127.0.0.1:{client.port}/"
    ours = (home, f"blob:{home}", "data:")
    opened.on("request", lambda asked: None if asked.url.startswith(ours) else elsewhere.append(asked.url))
    opened.goto(home)
    opened.get_by_role("tab", name="Classify").wait_for()
    yield opened
    context.close()
    # That a request was refused is no fault of the page.
    assert [text for text in said if "status of 400" not in text] == []
    assert not elsewhere


def file(seed: int, name: str = "photo.png") -> dict[str, Any]:
    return {"name": name, "mimeType": "image/png", "buffer": picture(seed)}


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


def test_words_and_a_picture_find_pictures_with_scores(page: Any, index: Any) -> None:
    page.get_by_label("Words").fill("a cat")
    page.keyboard.press("Enter")
    expected = index.query("a cat", k=24)
    hits = page.get_by_role("list", name="Hits").get_by_role("listitem")
    playwright.expect(hits).to_have_count(len(expected))
    assert expected[0].path.endswith(hits.first.inner_text().split()[1])
    assert f"{expected[0].score:.3f}" in hits.first.inner_text()
    page.evaluate("() => Promise.all([...document.querySelectorAll('#hits img')].map((one) => one.decode()))")
    shot(page, "search")
    page.locator("#search-image").set_input_files(file(3))
    playwright.expect(page.locator("#search-status")).to_contain_text("hit")
    playwright.expect(hits.first).to_contain_text(
        Path(index.query("a cat", picture=picture(3), k=1)[0].path).name
    )


def test_filters_narrow_what_is_found_and_a_wrong_one_is_explained(page: Any) -> None:
    page.get_by_text("Filters").click()
    page.get_by_label("Words").fill("a cat")
    page.get_by_label("Condition in SQL").fill("width > 44")
    page.keyboard.press("Enter")
    hits = page.get_by_role("list", name="Hits").get_by_role("listitem")
    playwright.expect(hits).to_have_count(3)
    page.get_by_label("Least score").fill("1")
    playwright.expect(hits).to_have_count(0)
    page.get_by_label("Condition in SQL").fill("nonsense >")
    page.get_by_role("button", name="Search", exact=True).click()
    playwright.expect(page.locator("#search-status")).to_contain_text("cannot be applied")


def test_pictures_are_classified_by_labels_of_ones_own(page: Any, clip: Any) -> None:
    page.get_by_role("tab", name="Classify").click()
    page.get_by_label("Labels, one a line").fill("a cat\na dog\nan owl")
    page.locator("#classify-images").set_input_files([file(1, "one.png"), file(2, "two.png")])
    rows = page.get_by_role("list", name="Answers", exact=True).get_by_role("listitem")
    playwright.expect(rows).to_have_count(2)
    best = clip.classify([picture(1)], ["a cat", "a dog", "an owl"], ["a photo of {}."]).top(1)[0][0]
    first = rows.first.get_by_role("row").first.inner_text()
    assert best[0].split()[-1] in first
    assert f"{100 * best[1]:.1f} %" in first
    shot(page, "classify")


def test_a_picture_is_segmented_and_its_colors_fade(page: Any) -> None:
    page.get_by_role("tab", name="Segment").click()
    page.get_by_label("What may be where").fill("a cat\na dog\nan owl")
    page.get_by_text("What is none of them").click()
    page.get_by_label("none of the others").select_option("an owl")
    page.locator("#segment-image").set_input_files(file(1, "one.png"))
    legend = page.get_by_role("list", name="Labels and their shares").get_by_role("listitem")
    playwright.expect(legend).to_have_count(3)
    shares = [float(text.split()[-2]) for text in legend.all_inner_texts()]
    assert abs(sum(shares) - 100) < 0.2
    assert shares == sorted(shares, reverse=True)
    colors = page.locator("#label-map")
    playwright.expect(colors).to_have_css("opacity", "0.55")
    page.get_by_label("Opacity").focus()
    page.keyboard.press("Home")
    playwright.expect(colors).to_have_css("opacity", "0")
    assert "Where it shows" in str(colors.get_attribute("alt"))
    page.keyboard.press("End")
    boxes = [page.locator(f"#layers img >> nth={place}").bounding_box() for place in (0, 1)]
    assert boxes[0] == boxes[1]
    shot(page, "segment")


def test_a_classifier_is_fitted_to_a_few_pictures_and_tried(page: Any, clip: Any) -> None:
    pytest.importorskip("sklearn")
    from clipworks.methods.adapt.gda import GDA

    four, labels = [picture(seed) for seed in (1, 2, 3, 4)], ["first", "first", "second", "second"]
    expected = GDA(clip=clip, progress=False).fit(four, labels).predict([picture(1), picture(3)])
    page.get_by_role("tab", name="Few shots").click()
    for place, (name, seeds) in enumerate((("first", (1, 2)), ("second", (3, 4)))):
        group = page.get_by_role("group", name=f"Class {place + 1}")
        group.get_by_label("Name").fill(name)
        group.locator("input[type=file]").set_input_files([file(seed, f"{seed}.png") for seed in seeds])
        playwright.expect(group.get_by_role("listitem")).to_have_count(2)
    page.get_by_role("button", name="Fit").click()
    playwright.expect(page.locator("#fit-status")).to_contain_text("Fitted to 4 pictures of 2 classes")
    page.locator("#try-images").set_input_files([file(1), file(3)])
    answers = page.get_by_role("list", name="Answers of the fitted classifier").get_by_role("listitem")
    playwright.expect(answers).to_have_count(2)
    for place, label in enumerate(expected):
        assert label in answers.nth(place).get_by_role("row").first.inner_text()
    shot(page, "fewshot")


def test_a_picture_can_be_dropped(page: Any) -> None:
    import base64

    page.get_by_role("tab", name="Classify").click()
    data = base64.b64encode(picture(1)).decode()
    page.evaluate(
        """async (data) => {
            const bytes = Uint8Array.from(atob(data), (sign) => sign.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
            const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
            document.getElementById("classify-drop").dispatchEvent(event);
        }""",
        data,
    )
    playwright.expect(page.get_by_role("list", name="Answers", exact=True)).to_contain_text("dropped.png")


def test_tabs_work_by_keyboard_and_say_which_is_open(page: Any) -> None:
    page.get_by_role("tab", name="Search").focus()
    for key, name in (
        ("ArrowRight", "Classify"),
        ("End", "Few shots"),
        ("ArrowRight", "Search"),
        ("ArrowLeft", "Few shots"),
    ):
        page.keyboard.press(key)
        tab = page.get_by_role("tab", name=name)
        playwright.expect(tab).to_be_focused()
        assert tab.get_attribute("aria-selected") == "true"
        assert page.get_by_role("tabpanel", name=name).is_visible()
        assert page.locator("[role=tabpanel]:visible").count() == 1
    page.keyboard.press("Tab")  # from the tab into its panel
    assert page.evaluate("document.activeElement.closest('[role=tabpanel]')?.id") == "fewshot"


def test_everything_that_can_be_used_has_a_name(page: Any) -> None:
    for name in ("Search", "Classify", "Few shots"):
        page.get_by_role("tab", name=name).click()
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("input, textarea, select, button, [role=tab]")]
                .filter((one) => one.offsetParent !== null)
                .filter((one) => !(one.labels?.length || one.textContent.trim() || one.ariaLabel))
                .map((one) => one.outerHTML)"""
        )
        assert nameless == []


def test_without_an_index_there_is_no_search_tab_and_a_token_is_asked_for(
    browser: Any, serving: Callable[..., Any]
) -> None:
    with serving(token="sesame") as client:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{client.port}/")
        page.get_by_label("Token").fill("sesame")
        page.keyboard.press("Enter")
        page.get_by_role("tab", name="Classify").wait_for()
        assert not page.get_by_role("tab", name="Search").is_visible()
        assert not page.get_by_label("Token").is_visible()
        page.close()
