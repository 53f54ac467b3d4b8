"""Pages of runs and data sets in a real browser, opened as files: silent, and asking for nothing; clips play.

Also writes the pictures of docs/: SA3DIST_PICTURES=docs python -m pytest tests/report/test_browser.py
"""

import os
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from sa3dist import config
from sa3dist.inspection.html import write_html
from sa3dist.inspection.report import inspect_source
from sa3dist.report.page import write_report
from tests.helpers.clips import encode, tone, write_folder
from tests.helpers.run_folders import make_run

CHROMIUM = shutil.which("chromium")
WIDTHS = {"desktop": (1280, 900, "light"), "phone": (400, 800, "dark")}
# How long a page may take until it answers; a busy machine is no property of the page, so this is far above.
READY_SECONDS = 60
FRAMING = (380.0, 44100, 4096)
CAPTION = "</script><script>alert(1)</script> " + " ".join(f"word{n}" for n in range(900))

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


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """500 logged steps, and 10 previews of 20 s at the base and at every 50th step."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    rows = make_run(folder, steps=500, preview_steps=range(0, 501, 50), prompts=10, seconds=20.0, linked=True)
    write_report([folder], folder / "report.html")
    return folder, rows


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """The page of 12 clips, one of them with a long and hostile caption, and one that cannot be used."""
    folder = tmp_path_factory.mktemp("sets")
    members = {"junk.wav": b"junk", "junk.txt": b"junk"}
    for number in range(12):
        name = f"a take of drums, close microphones, number {number:02d}"
        # By length in another order than by name.
        members[f"{name}.wav"] = encode(tone(0.5 + 0.25 * (5 * number % 12), peak=0.1 + 0.05 * number))
        members[f"{name}.txt"] = CAPTION.encode() if number == 3 else b"drums"
    source = str(write_folder(folder / "in", members))
    settings = config.build({"audio_data_url": source, "work_dir": str(folder / "work")})
    write_html(inspect_source(settings, FRAMING, page_bytes=20e6), folder / "set.html")
    return folder / "set.html"


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


def picture(page, name, part):
    """For docs/, where it is asked for: the window with a part of the page at its top."""
    if folder := os.environ.get("SA3DIST_PICTURES"):
        page.locator(part).evaluate("part => part.scrollIntoView()")
        page.screenshot(path=Path(folder) / name)


def in_silence(page, width="desktop"):
    """Nothing was said, nothing is asked for but previews beside the page, and nothing is wider than the window."""
    assert page.said == []
    beside = page.url.rpartition("/")[0] + "/previews/"
    assert [address for address in page.asked if not address.startswith(("data:", beside))] == [page.url]
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width][0]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_opens_from_a_file_in_silence_and_fits(browser, run, width):
    page = opened(browser, run[0] / "report.html", width)
    in_silence(page, width)
    picture(page, f"report-{width}.png", ".grid" if width == "phone" else "header")
    page.close()


def test_500_rows_and_10_previews_of_11_steps_are_below_20_mb_and_usable_before_a_clip_is_decoded(browser, long_run):
    path = long_run[0] / "report.html"
    assert 15e6 < path.stat().st_size < 20e6
    page = opened(browser, path)
    until(page, "performance.getEntriesByName('usable').length")
    # Until charts are drawn and controls answer. Said, not held: a busy machine is no property of the page.
    milliseconds = page.evaluate("performance.getEntriesByName('usable')[0].startTime")
    print(f"usable after {milliseconds / 1000:.2f} s")
    in_silence(page)
    audio = "[...document.querySelectorAll('audio')]"
    assert page.evaluate(f"{audio}.length") == 111
    assert page.evaluate(f"{audio}.filter(clip => clip.src.startsWith('data:')).length") > 30
    assert page.evaluate(f"{audio}.every(clip => clip.readyState === 0 && clip.networkState !== clip.NETWORK_LOADING)")
    for chart, key in (("loss", "loss"), ("grad_norm", "grad_norm"), ("lr", "lr"), ("validation", "val/loss")):
        steps, values, *_ = page.evaluate(f"sa3distCharts().{chart}")
        assert list(zip(steps, values, strict=True)) == [(row["step"], row[key]) for row in long_run[1] if key in row]
    assert page.locator(".uplot canvas").count() == len(page.evaluate("Object.keys(sa3distCharts())"))
    page.locator("[data-row] .cell.base [data-play]").first.click()
    until(page, "document.querySelector('[data-row] .cell audio').currentTime > 0.1")
    assert page.evaluate("document.querySelector('[data-row] .cell audio').duration") == pytest.approx(20, rel=0.2)
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
    # A player that gets too little of the processor runs on past the end of its clip.
    assert 1.95 < page.evaluate(f"{last}.duration") < 3
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


@pytest.mark.parametrize("width", WIDTHS)
def test_a_data_set_has_a_line_for_each_clip_and_shows_all_of_it_on_a_click(browser, data_set, width):
    page = opened(browser, data_set, width)
    in_silence(page, width)
    picture(page, f"inspect-{width}.png", "#clips" if width == "phone" else "#spread")
    heights = page.evaluate(
        "[...document.querySelectorAll('.clips tbody tr:not(.skipped)')].map(row => row.clientHeight)"
    )
    assert len(heights) == 12
    assert len(set(heights)) == 1
    row = page.locator("tr", has_text="word899")
    button = row.locator("[data-open]")
    assert button.evaluate("button => button.textContent") == "a take of drums, close microphones, number 03"
    button.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    assert row.locator("td[data-label=caption]").inner_text().endswith(CAPTION)
    assert row.evaluate("row => row.clientHeight") > 3 * heights[0]
    button.press("Enter")
    assert row.evaluate("row => row.clientHeight") == heights[0]
    page.close()


def test_clips_of_a_data_set_play_and_its_columns_sort(browser, data_set):
    page = opened(browser, data_set)
    head, seconds = page.locator(".clips th.n button").first, page.locator("td[data-label=s]")
    for falling in (False, True):
        head.press("Enter")
        found = [float(text) for text in seconds.all_inner_texts() if text]
        assert len(found) == 12
        assert found == sorted(found, reverse=falling)
    page.locator("[data-play]").first.click()
    until(page, "[...document.querySelectorAll('audio')].some(clip => clip.currentTime > 0.1)")
    length = float(page.locator("tr:has(.playing) td[data-label=s]").inner_text())
    assert length - 0.05 < page.locator(".playing audio").evaluate("audio => audio.duration") < length + 1
    assert page.evaluate("sa3distCharts().lengths[1].reduce((all, count) => all + count)") == 12
    assert page.said == []
    page.close()
