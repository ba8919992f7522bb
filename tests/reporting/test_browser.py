"""The report page in a real browser: Chromium, driven by playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aligndet.commands.report import report
from tests.reporting.test_report import EVIL, comparison_folder

sync_api = pytest.importorskip("playwright.sync_api", reason='needs pip install -e ".[browser]"')
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")]
OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    first, second = (comparison_folder(folder / name) for name in ("first", f"a<b>'\"&{'x' * 60}"))
    return report((first, second), output=folder / "page.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        yield chromium
        chromium.close()


def _open(browser: Any, html: Path, **options: Any) -> tuple[Any, list[str], list[str]]:
    """The page in a context without a network, what it complains about, and what it asks for."""
    complaints: list[str] = []
    requests: list[str] = []

    def refuse(dialog: Any) -> None:
        complaints.append(dialog.message)
        dialog.dismiss()

    page = browser.new_context(**{"offline": True, "viewport": WIDE, **options}).new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", refuse)
    page.on("request", lambda request: requests.append(request.url))
    page.goto(html.as_uri())
    return page, complaints, requests


def test_it_opens_without_network_and_complaints(browser: Any, html: Path) -> None:
    page, complaints, requests = _open(browser, html)
    widths = page.evaluate("[...document.images].map((image) => image.naturalWidth)")
    assert len(widths) >= 16
    assert min(widths) > 0
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [html.as_uri()]


def test_names_are_text(browser: Any, html: Path) -> None:
    page, complaints, _ = _open(browser, html)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true })")
    assert page.locator("td", has_text=EVIL).count() == 4  # the class at two numbers of labels, twice
    assert "a<b>'\"&" in page.locator("#section2 .subtitle").inner_text()
    assert page.locator("script").count() == 1
    assert complaints == []


def test_tables_sort_by_mouse_and_keyboard(browser: Any, html: Path) -> None:
    page, _, _ = _open(browser, html)
    table = page.locator("table").first

    def column(number: int) -> list[str]:
        return table.locator(f"tbody td:nth-child({number})").all_inner_texts()

    labels, ap, against = (table.locator("th button").nth(place) for place in (0, 5, 6))
    assert column(1) == ["10", "10", "100", "100"]
    labels.click()
    labels.click()
    assert column(1) == ["100", "100", "10", "10"]  # numbers, not text: "10" would be after "100"
    labels.focus()
    page.keyboard.press("Enter")
    assert column(1) == ["10", "10", "100", "100"]
    page.keyboard.press("Space")
    assert column(1) == ["100", "100", "10", "10"]
    assert table.locator("th").first.get_attribute("aria-sort") == "descending"
    ap.click()
    values = [float(text.split(" ")[0]) for text in column(6)]
    assert values == sorted(values)
    assert len(set(values)) == 4
    assert table.locator("th[aria-sort]").count() == 1
    for _ in range(2):
        against.click()
        assert column(7)[2:] == ["", ""]  # scratch has no difference to itself: last in both directions


def test_light_and_dark(browser: Any, html: Path) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page, _, _ = _open(browser, html, color_scheme=scheme)
        colours = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        ground, ink = (sum(map(int, colour[4:-1].split(","))) / 3 for colour in colours)
        assert abs(ground - ink) > 150
        # letters of a plot, drawn as the browser shows them
        plot = page.locator("figure img").first.screenshot(path=html.with_name(f"{scheme}.png"))
        grounds.append((ground, plot))
    assert grounds[0][0] > 200 > 60 > grounds[1][0]
    assert grounds[0][1] != grounds[1][1]


def test_paper_is_white_and_holds_every_picture(browser: Any, html: Path) -> None:
    page, _, _ = _open(browser, html, color_scheme="dark", viewport={"width": 794, "height": 1123})  # A4
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    edges = page.evaluate("[...document.images].map((image) => image.getBoundingClientRect().right)")
    edges += page.evaluate(
        "[...document.querySelectorAll('table')].map((t) => t.getBoundingClientRect().right)"
    )
    assert max(edges) <= 794


def test_a_phone_scrolls_down_alone(browser: Any, html: Path) -> None:
    page, _, _ = _open(browser, html, viewport=PHONE)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.evaluate("document.querySelector('.wide').scrollWidth") > PHONE["width"]  # within itself
