"""The page in a real browser, opened as a file: silent, without a request; clips play, charts have their points.

Also writes the pictures of docs/: SA3DIST_PICTURES=docs python -m pytest tests/report/test_browser.py
"""

import os
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from sa3dist.report.page import write_report
from tests.helpers.run_folders import make_run

CHROMIUM = shutil.which("chromium")
WIDTHS = {"desktop": (1280, 900, "light"), "phone": (400, 800, "dark")}
# How long a page may take until it answers; a busy machine is no property of the page, so this is far above.
READY_SECONDS = 60

if (CHROMIUM is None or find_spec("playwright") is None) and not os.environ.get("SA3_REQUIRE_TOOLS"):
    pytest.skip("needs chromium and playwright: make test-services", allow_module_level=True)

from playwright.sync_api import sync_playwright  # noqa: E402


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # Tests run as root in containers, where its sandbox does not.
        arguments = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        opened = playwright.chromium.launch(executable_path=CHROMIUM or "chromium", args=arguments)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    rows = make_run(folder, steps=500, preview_steps=(0, 250, 500), prompts=10, seconds=2.0)
    write_report([folder], folder / "report.html")
    return folder, rows


def opened(browser, path, width="desktop"):
    wide, high, scheme = WIDTHS[width]
    page = browser.new_page(viewport={"width": wide, "height": high}, color_scheme=scheme)
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(path.as_uri(), timeout=1000 * READY_SECONDS)
    return page


def until(page, expression):
    """Wait for it; the page's own policy forbids the client's way of waiting."""
    deadline = time.monotonic() + READY_SECONDS
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_opens_from_a_file_in_silence_and_fits(browser, run, width):
    page = opened(browser, run[0] / "report.html", width)
    assert page.said == []
    assert [address for address in page.asked if not address.startswith("data:")] == [page.url]
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width][0]
    if pictures := os.environ.get("SA3DIST_PICTURES"):
        page.screenshot(path=Path(pictures) / f"report-{width}.png")
    page.close()


def test_charts_have_the_points_of_the_metrics(browser, run):
    page = opened(browser, run[0] / "report.html")
    steps, logged, _ = page.evaluate("sa3distCharts().loss")
    assert list(zip(steps, logged, strict=True)) == [(row["step"], row["loss"]) for row in run[1] if "loss" in row]
    assert page.locator(".uplot canvas").count() == len(page.evaluate("Object.keys(sa3distCharts())"))
    page.close()


def test_another_clip_of_a_row_goes_on_at_the_moment_of_the_first(browser, run):
    page = opened(browser, run[0] / "report.html")
    row = page.locator("[data-row]").first
    buttons = row.locator(".cell > .controls [data-play]")
    assert buttons.count() == 3
    buttons.nth(0).click()
    until(page, "document.querySelector('[data-row] .cell audio').currentTime > 0.3")
    moment = row.locator(".cell > audio").nth(0).evaluate("audio => audio.currentTime")
    row.locator("[data-ab]").click()
    last = "[...document.querySelector('[data-row]').querySelectorAll('.cell > audio')][2]"
    until(page, f"!{last}.paused && {last}.readyState > 1")
    assert page.evaluate(f"{last}.duration") == pytest.approx(2.0, abs=0.15)
    assert page.evaluate(f"{last}.currentTime") >= moment
    assert row.locator(".cell > audio").nth(0).evaluate("audio => audio.paused")
    assert page.said == []
    page.close()


def test_keys_move_between_the_clips_and_along_a_chart(browser, run):
    page = opened(browser, run[0] / "report.html")
    first = page.locator("[data-row] .cell.base [data-play]").first
    first.focus()
    page.keyboard.press("ArrowRight")
    assert "step 250" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.locator("[data-chart=loss] .plot").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("[data-chart=loss] .u-legend .u-value").first.inner_text() == "2"
    page.close()


def test_clips_beside_the_page_play_too(browser, run):
    folder, _ = run
    write_report([folder], folder / "beside.html", inside=False)
    page = opened(browser, folder / "beside.html")
    page.locator("[data-row] .cell.base [data-play]").first.click()
    until(page, "document.querySelector('[data-row] .cell audio').currentTime > 0.1")
    assert all(address.startswith(("file:", "data:")) for address in page.asked)
    assert page.said == []
    page.close()
