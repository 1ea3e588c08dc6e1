"""The page docs/explore.md in a browser: its curves are Python's, its knobs turn, its links restore.

It needs Chromium, Playwright, mkdocs and node_modules/; `.ci/run` brings them. What the page is told is
tested without any of these in tests/schedule/test_page.py.
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import tolerances
from kit import ROOT

import fusedlr
from fusedlr.schedule import CONSTRUCTORS, page, spec

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("mkdocs", reason="needs mkdocs: make docs")
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
if BROWSER is None:
    pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on PATH", allow_module_level=True)
if not (ROOT / "node_modules" / "pyodide").exists():
    pytest.skip("needs node_modules/: make docs", allow_module_level=True)

pytestmark = pytest.mark.slow
# their rates take a sine, which the C library beneath Python computes: another one in the browser
CALLS_SINE = (
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)
# milliseconds: Pyodide starts in 4 s on 2 cores, and other tests may share them
PATIENCE = 40_000


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the site, built afresh and served from its folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/explore.html"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # a container's root has no sandbox to run a browser in; it opens nothing but the site above
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


class Explorer:
    """The page as a person has it before them."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.address = address
        self.errors: list[str] = []
        self.page = browser.new_context(**context).new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        # every answer of the package, as the page got it
        self.page.add_init_script(
            """
            window.answers = [];
            const Stock = window.Worker;
            window.Worker = class extends Stock {
              constructor(...given) {
                super(...given);
                this.addEventListener("message", ({data}) => data.shown && window.answers.push(data.shown));
              }
            };
            """
        )

    def open(self, fragment: str = "") -> Explorer:
        self.page.goto(f"{self.address}#{fragment}")
        self.page.wait_for_selector("[data-part=body][data-fragment]")
        return self

    def go(self, fragment: str) -> dict[str, Any]:
        """Another address in the same page, and the package's answer."""
        before = self.page.evaluate("window.answers.length")
        self.page.evaluate("fragment => { location.hash = fragment }", fragment)
        self.page.wait_for_function("before => window.answers.length > before", arg=before)
        return self.answer

    @property
    def answer(self) -> dict[str, Any]:
        return self.page.evaluate("window.answers.at(-1)")

    def fill(self, name: str, text: str) -> None:
        self.page.fill(f"#explore-{name}", text)

    def choose(self, name: str, value: str) -> None:
        """Select an option, and wait for the package's answer: it draws the form anew."""
        before = self.page.evaluate("window.answers.length")
        self.page.select_option(f"#explore-{name}", value)
        self.page.wait_for_function("before => window.answers.length > before", arg=before)
        self.page.wait_for_function("id => document.querySelector(id) !== null", arg=f"#explore-{name}")

    def text(self, part: str) -> str:
        return self.page.inner_text(f"#explore [data-part={part}]")

    def wait(self, part: str, text: str) -> None:
        found = self.page.locator(f"#explore [data-part={part}]", has_text=text)
        found.wait_for()


@pytest.fixture(scope="module")
def explorer(site: str, browser: Any) -> Iterator[Explorer]:
    opened = Explorer(browser, site, viewport={"width": 1280, "height": 900}).open()
    yield opened
    assert not opened.errors


def call(name: str) -> str:
    """A call of the constructor, with arguments of odd values; short enough that every step is drawn."""
    given = {
        "warmup_steps": 37,
        "total_steps": 611,
        "decay_steps": 171,
        "fn": [1.0, 1 / 3, 0.1],
        "num_cycles": 2,
    }
    one = spec.parse(name)
    takes = {*one.takes} - ({"total_steps"} if name == "table" else set())
    given = {key: value for key, value in given.items() if key in takes}
    return one.filled({**spec.Defaults().of(one), **given}).text


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_step_has_pythons_rate(name, explorer):
    peak, text = 3e-4, call(name)
    answer = explorer.go(urlencode({"schedule": text, "peak": peak}))
    schedule = spec.parse(text).build()
    (curve,) = answer["curves"]
    length = schedule.total_steps or 1000
    assert answer["steps"] == list(range(length + 1))
    expected = [schedule.lr_at(k, peak) for k in answer["steps"]]
    if name in CALLS_SINE:
        assert curve["rates"] == pytest.approx(expected, rel=0, abs=tolerances.OTHER_SINE * peak)
    else:
        # JSON and JavaScript keep every bit of a double
        assert curve["rates"] == expected
    assert answer["schedules"][0]["words"] == schedule.describe(peak).splitlines()
    # and what is shown is what was answered
    for line in schedule.describe(peak).splitlines():
        explorer.wait("words", line)
    rows = page.show(urlencode({"schedule": text, "peak": peak}))["rows"]
    cells = [cell for row in rows for cell in row["cells"]]
    assert explorer.page.locator("[data-part=table] td").all_inner_texts() == cells


def test_a_slider_changes_the_curve_by_keyboard_alone(explorer):
    explorer.go("schedule=linear(100,1000)")
    slider = explorer.page.locator("[aria-label='warmup_steps, slider']")
    # from the field before it
    explorer.page.focus("#explore-warmup_steps")
    explorer.page.keyboard.press("Tab")
    assert slider.evaluate("slider => slider === document.activeElement")
    explorer.page.keyboard.press("ArrowRight")
    explorer.wait("words", "linear(warmup_steps=101, total_steps=1000)")
    assert explorer.page.input_value("#explore-warmup_steps") == "101"
    schedule = fusedlr.linear(101, 1000)
    answer = explorer.answer
    assert answer["curves"][0]["rates"] == [schedule.lr_at(k, 2e-4) for k in answer["steps"]]
    # the address follows
    explorer.page.wait_for_url(
        "**/explore.html#schedule=linear(warmup_steps=101,+total_steps=1000)&peak=0.0002"
    )


def test_what_a_new_user_asks(explorer):
    """What do updates 1, 200 and 4,000 get, and what if the run were half as long?"""
    explorer.go("")
    explorer.wait("table", "update k = 200")
    explorer.page.click("text=half as long")
    explorer.wait("words", "cosine(warmup_steps=200, total_steps=2000)")
    rows = explorer.page.locator("[data-part=table] tr").all_inner_texts()
    assert "update k = 1\t1e-06 (0.5 %)\t1e-06 (0.5 %)" in rows
    # the size of a run gives its number of updates, which becomes the schedule's
    explorer.fill("examples", "5000")
    explorer.wait("run", "471 updates")
    explorer.page.click("text=use as total_steps")
    explorer.wait("words", "cosine(warmup_steps=200, total_steps=471)")


def test_a_link_restores_everything(explorer, site, browser):
    explorer.go("")
    explorer.choose("name", "warmup_stable_decay")
    explorer.choose("decay_type", "'1-sqrt'")
    explorer.page.wait_for_url("**1-sqrt**")
    explorer.fill("peak", "1e-3")
    explorer.fill("updates", "5 3000")
    explorer.page.click("text=compare")
    explorer.page.select_option("#explore-name", "cosine")
    explorer.page.check("#explore-reading-literal")
    explorer.fill("epochs", "2.5")
    explorer.wait("run", "783 updates")
    explorer.page.wait_for_url("**epochs=2.5**")
    fragment = explorer.page.url.partition("#")[2]
    other = Explorer(browser, site).open(fragment)
    assert other.answer == explorer.answer
    expected = page.show(fragment)
    for key in expected.keys() - {"curves"}:
        assert other.answer[key] == expected[key], key
    assert other.page.input_value("#explore-peak") == "1e-3"
    assert other.page.input_value("#explore-decay_type") == "'1-sqrt'"
    assert other.page.is_checked("#explore-reading-literal")
    assert len(other.answer["curves"]) == 3 and not other.errors
    other.page.context.close()


def test_a_mistake_shows_the_packages_message(explorer):
    explorer.go("schedule=linear(10,100)")
    problem = explorer.page.locator("[data-part=form] [role=alert]")
    explorer.fill("min_lr", "1")
    explorer.page.locator("text=min_lr=1.0 is above the peak lr=0.0002").first.wait_for()
    assert problem.is_visible()
    explorer.fill("min_lr", "abc")
    explorer.page.locator("[data-part=form] >> text=abc is not a plain value").wait_for()
    # what was typed stays, to be corrected
    assert explorer.page.input_value("#explore-min_lr") == "abc"
    explorer.fill("min_lr", "")
    problem.wait_for(state="hidden")
    explorer.fill("warmup_steps", "200")
    explorer.wait("words", "the warm-up is as long as the run: the peak is never reached")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(scheme, site, browser):
    size = {"width": 360, "height": 740}
    phone = Explorer(browser, site, viewport=size, color_scheme=scheme, is_mobile=True, has_touch=True)
    phone.open("schedule=cosine(400,4000)&schedule=linear(400,4000)&reading=literal")
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert phone.page.locator(".explore-chart canvas").bounding_box()["width"] > 250
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(x => x > 127)"
    assert phone.page.evaluate(light) is (scheme == "light")
    if folder := os.environ.get("FUSEDLR_SCREENSHOTS"):
        phone.page.screenshot(path=Path(folder) / f"phone-{scheme}.png", full_page=True)
    phone.page.context.close()
    assert not phone.errors
