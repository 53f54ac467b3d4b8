"""The page of `sa3dist serve` in a real browser: a dropped zip trains, another job is cancelled, a report opened.

Also writes the pictures of docs/: SA3DIST_PICTURES=docs python -m pytest tests/serve/test_page_browser.py
"""

import base64
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.clips import captioned, write_zip
from tests.helpers.program import ENVIRONMENT
from tests.helpers.web_server import SETTINGS, WebServer

CHROMIUM = shutil.which("chromium")
WIDTHS = {"desktop": (1280, 900, "light"), "phone": (400, 800, "dark")}
# How long the page and a training of a few steps may take; a busy machine is no property of the page.
READY_SECONDS = 120
STEPS = 200
PICTURES = os.environ.get("SA3DIST_PICTURES")
# What a caption and a file's name must never become.
HOSTILE = "<img src=x onerror=window.pwned=1>"

if (CHROMIUM is None or find_spec("playwright") is None) and not os.environ.get("SA3_REQUIRE_TOOLS"):
    pytest.skip("needs chromium and playwright: make test-services", allow_module_level=True)

from playwright.sync_api import expect, sync_playwright  # noqa: E402

pytestmark = pytest.mark.slow
expect.set_options(timeout=1000 * READY_SECONDS)


@pytest.fixture(scope="module")
def server(tmp_path_factory, demo_base):
    """A server of one slot, with the settings of short trainings, a preview and a report at every save."""
    settings = (*SETTINGS, "save_every=100", "preview_every=200", "preview_steps=2", "preview_seconds=1")
    settings += ("report_audio=beside",)
    started = WebServer(tmp_path_factory.mktemp("page"), demo_base, settings=settings)
    started.start()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # Tests run as root in containers, where its sandbox does not.
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM or "chromium", args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        )
        yield opened
        opened.close()


@pytest.fixture
def context(browser, request):
    """A window of a width, by the test's parameter; what it says and asks for is in .said and .asked."""
    wide, high, scheme = WIDTHS[getattr(request, "param", "desktop")]
    made = browser.new_context(viewport={"width": wide, "height": high}, color_scheme=scheme)
    made.said, made.asked = [], []
    made.set_default_timeout(1000 * READY_SECONDS)
    made.on("console", lambda message: made.said.append(message.text))
    made.on("weberror", lambda error: made.said.append(str(error.error)))
    made.on("request", lambda asked: made.asked.append(asked.url))
    made.on("dialog", lambda dialog: dialog.accept())
    yield made
    made.close()


def drop(page, name: str, data: bytes) -> None:
    page.evaluate(
        """([name, text]) => {
            const data = new DataTransfer();
            data.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name));
            document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
        }""",
        [name, base64.b64encode(data).decode()],
    )


def start(page, steps: int, **more) -> str:
    """Fill the form and send it; the id of the job that then is open."""
    for name, value in {"number_of_steps": steps, "rank": 4, **more}.items():
        page.locator(f"#field-{name}").fill(str(value))
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url(lambda address: len(address.partition("#")[2]) == 32)
    return page.url.partition("#")[2]


def picture(page, name: str, width: str) -> None:
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / f"{name}-{width}.png")


def fits(page, width: str) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width][0]


def test_a_training_starts_from_a_dropped_zip_and_is_watched_while_another_is_cancelled(server, context, tmp_path):
    clips = {name: HOSTILE.encode() if name.endswith("txt") else data for name, data in captioned(6).items()}
    archive = write_zip(tmp_path / "clips.zip", clips).read_bytes()
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#none")).to_be_visible()
    name = "kicks.zip" if PICTURES else f"{HOSTILE}.zip"
    drop(page, name, archive)
    expect(page.locator("#chosen")).to_contain_text(name)
    page.get_by_text("More settings").click()
    page.locator("#field-base_precision").select_option("fp32")
    first = start(page, STEPS)
    expect(page.locator("#job .state")).to_have_text("running")

    # Another one of the same data waits, with its place, and is cancelled.
    page.get_by_role("button", name="Change and run again").click()
    expect(page.locator("#field-number_of_steps")).to_have_value(str(STEPS))
    second = start(page, 5000)
    assert second != first
    expect(page.locator("#job-said")).to_contain_text("next")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#job .state")).to_have_text("cancelled")
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#list li")).to_have_count(1)

    page.locator("#list a").click()
    expect(page.locator("#log")).to_contain_text("step", use_inner_text=True)
    if PICTURES:
        expect(page.locator("#job-said")).to_contain_text(re.compile(r"step [2-9]\d .* left"))
        picture(page, "serve", "desktop")
    expect(page.locator("#job .state")).to_have_text("done")
    expect(page.locator("#plot canvas")).to_be_visible()
    expect(page.locator("#loss-said")).to_contain_text(f"at step {STEPS}")
    with page.expect_download() as download:
        page.locator("#files a", has_text="safetensors").click()
    assert Path(download.value.path()).stat().st_size > 0

    with context.expect_page() as opened:
        page.get_by_role("link", name="Report").click()
    report = opened.value
    expect(report.locator("[data-chart=loss] canvas")).to_be_visible()
    expect(report.locator("body")).to_contain_text(HOSTILE)
    assert str(server.data) not in report.content()
    assert report.evaluate("origin") == "null"
    report.locator("[data-play]").first.click()
    # The page's own policy forbids the client's way of waiting.
    deadline = time.monotonic() + READY_SECONDS
    while not report.evaluate("document.querySelector('.cell audio').currentTime > 0.1"):
        assert time.monotonic() < deadline
        report.wait_for_timeout(20)
    with report.expect_download() as flac:
        report.get_by_role("link", name="FLAC").first.click()
    assert Path(flac.value.path()).stat().st_size > 0
    for opened_page in (page, report):
        assert opened_page.evaluate("window.pwned") is None
        fits(opened_page, "desktop")
    assert context.said == []
    assert [url for url in context.asked if not url.startswith((f"{server.url}/", "data:", "blob:"))] == []


@pytest.mark.parametrize("context", ["phone"], indirect=True)
def test_on_a_phone_a_key_is_asked_for_and_the_keyboard_leads_through_a_training(context, tmp_path, demo_base):
    words = ["add", "anna", "--data-dir", str(tmp_path / "data")]
    command = [sys.executable, "-m", "sa3dist.cli", "serve", "keys", *words]
    key = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True).stdout.strip()
    server = WebServer(tmp_path, demo_base)
    server.start()
    try:
        page = context.new_page()
        page.goto(server.url)
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type("0:0")
        page.keyboard.press("Enter")
        expect(page.locator("#notice")).to_have_text("This key is not valid.")
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        expect(page.locator("#who")).to_have_text("anna")
        fits(page, "phone")
        page.get_by_role("link", name="New training").press("Enter")
        expect(page.locator("#new-title")).to_be_focused()
        expect(page.locator("#jobs")).not_to_be_visible()
        fits(page, "phone")
        archive = write_zip(tmp_path / "clips.zip", captioned(6))
        page.locator("#file").set_input_files(archive)
        page.locator("#field-number_of_steps").fill("20000")
        page.locator("#field-rank").fill("4")
        assert context.said == []
        page.locator("#field-learning_rate").fill("-1")
        page.keyboard.press("Enter")
        expect(page.locator("#problems")).to_contain_text("learning_rate: ")
        expect(page.locator("#field-learning_rate")).to_be_focused()
        # That the server has refused it is the one thing a browser complains of.
        assert [text for text in context.said if "422" not in text] == []
        page.locator("#field-learning_rate").fill("1e-4")
        page.keyboard.press("Enter")
        expect(page.locator("#job-title")).to_be_focused()
        expect(page.locator("#job .state")).to_have_text("running")
        expect(page.locator("#plot canvas")).to_be_visible()
        expect(page.locator("#job-said")).to_contain_text(re.compile(r"step [2-9]\d .* left"))
        fits(page, "phone")
        picture(page, "serve", "phone")
        page.get_by_role("button", name="Cancel").press("Enter")
        expect(page.locator("#job .state")).to_have_text("cancelled")
        page.reload()
        expect(page.locator("#job .state")).to_have_text("cancelled")
        page.get_by_role("button", name="Forget the key").click()
        assert page.evaluate("sessionStorage.length") == 0
        expect(page.locator("main")).not_to_be_visible()
        assert [text for text in context.said if "422" not in text] == []
    finally:
        server.stop()
