"""The HTML report in a real headless Chromium: it draws, it sorts, it loads nothing, and hostile names stay names."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
import report_fixtures as fixtures

from bf16prof.reports import html
from bf16prof.runs import Run, replace

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on this machine"),
    pytest.mark.xdist_group("browser"),
]

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--force-prefers-reduced-motion", "--window-size=1280,900",
)  # fmt: skip
BLANK = "data:text/html,<title>blank</title>"
PLOTS = ("figure-components", "figure-phases", "figure-timeline", "figure-times", "figure-losses")


class Browser:
    """A Chromium that keeps what happened since the page was opened."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver = driver
        self._page = folder / "report.html"

    def open(self, runs: list[Run]) -> None:
        self._page.write_text(html.render(runs), encoding="utf-8")
        self.driver.get(BLANK)
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(self._page.as_uri())

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def shows(self, expected: object, read: str | Callable[[], object], *arguments: object) -> None:
        """Assert what a script or a reading comes to: an event is answered when the page gets to it, within ten seconds."""
        deadline = time.monotonic() + 10
        while (found := read() if callable(read) else self.run(read, *arguments)) != expected and time.monotonic() < deadline:
            time.sleep(0.05)
        assert found == expected

    def complaints(self) -> list[str]:
        """Console messages: errors, warnings and violations of the page's own policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Every URL that was asked for, but for the page itself."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert self._page.as_uri() in urls, "the log saw nothing"
        return [url for url in urls if url != self._page.as_uri()]

    def column(self, table: str, index: int) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].map(r => r.cells[arguments[1]].textContent.trim())"
        return list(self.run(script, table, index))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Browser(driver, tmp_path_factory.mktemp("report"))
    finally:
        driver.quit()


@pytest.mark.parametrize("which", ["usual", "failed", "extreme", "estimate", "simulated", "two", "empty"])
def test_every_kind_of_run_opens_in_silence(browser: Browser, which: str) -> None:
    runs = {
        "usual": [fixtures.run()],
        "failed": [fixtures.failed_run()],
        "extreme": [fixtures.extreme_run()],
        "estimate": [fixtures.run([fixtures.estimate(fixtures.case())])],
        "simulated": [fixtures.simulated_run()],
        "two": [fixtures.run(), fixtures.run(name="again")],
        "empty": [fixtures.run([])],
    }
    browser.open(runs[which])
    assert browser.complaints() == []
    assert browser.requests() == []
    assert browser.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_all_plots_are_drawn(browser: Browser) -> None:
    browser.open([fixtures.run()])
    for plot in PLOTS:
        marks = browser.run(
            "return document.querySelectorAll(`#${arguments[0]} svg.main-svg :is(.point, .points path, .textpoint)`).length", plot
        )
        assert marks >= 6, plot
    assert browser.run("return document.querySelectorAll('#figure-losses .scatterlayer .trace').length") == 6
    assert browser.run("return document.querySelectorAll('#figure-components .barlayer .trace').length") == 7


def test_the_logs_would_show_a_violation(browser: Browser) -> None:
    """The proof that the silence of the other tests means something."""
    browser.open([fixtures.run([])])
    browser.run("const i = new Image(); i.src = 'https://example.invalid/x.png'; document.body.append(i)")
    browser.run("try { eval('1') } catch (error) {}")
    browser.shows(True, lambda: any("Content Security Policy" in message for message in browser.complaints()))


def test_nothing_offers_to_send_the_data_away(browser: Browser) -> None:
    browser.open([fixtures.run()])
    titles = browser.run("return [...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title || '')")
    assert not [title for title in titles if any(word in title.lower() for word in ("cloud", "upload", "chart studio", "edit", "plotly"))]
    assert browser.run("return [...document.querySelectorAll('a[href]')].every(a => a.getAttribute('href').startsWith('#'))")


def test_saving_a_figure_works_under_the_policy(browser: Browser) -> None:
    browser.open([fixtures.run()])
    script = "const done = arguments[0]; Plotly.toImage('figure-losses', {format: 'svg'}).then(done, error => done(String(error)))"
    assert browser.driver.execute_async_script(script).startswith("data:image/svg+xml")
    assert browser.complaints() == []


def test_tables_sort_by_mouse_and_by_keyboard(browser: Browser) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.open([fixtures.failed_run()])
    buttons = browser.driver.find_elements(By.CSS_SELECTOR, "#summary th button")
    titles = [button.text.strip() for button in buttons]
    estimate = titles.index("estimate")
    buttons[estimate].click()
    ascending = ["7.35 GiB", "8.80 GiB", "10.25 GiB", "11.70 GiB", "13.15 GiB", "14.60 GiB"]
    browser.shows(ascending, lambda: browser.column("#summary", estimate))
    buttons[estimate].send_keys(Keys.ENTER)
    browser.shows("14.60 GiB", lambda: browser.column("#summary", estimate)[0])
    states = ["descending" if index == estimate else "none" for index in range(len(titles))]
    browser.shows(states, "return [...document.querySelectorAll('#summary th')].map(h => h.getAttribute('aria-sort'))")
    measured = titles.index("measured")
    for _ in range(2):
        buttons[measured].click()
        browser.shows(["14.60 GiB"] + ["–"] * 5, lambda: browser.column("#summary", measured))  # noqa: RUF001


def test_a_case_can_be_hidden_and_a_link_opens_its_details(browser: Browser) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.open([fixtures.run()])
    visible = "return document.querySelectorAll('#figure-losses .scatterlayer .trace').length"
    browser.shows(6, visible)
    browser.run("document.querySelector('#losses .chips button').click()")
    browser.shows(5, visible)
    browser.shows("false", "return document.querySelector('#phases .chips button').getAttribute('aria-pressed')")
    link = browser.driver.find_element(By.LINK_TEXT, "zero2-w2-bf16-full")
    for _ in range(2):  # the second time, the page's address already names the case
        browser.run("document.querySelector('#case-3').open = false")
        link.send_keys(Keys.ENTER)
        browser.shows(True, "return document.querySelector('#case-3').open")
    assert "reduce bucket" in browser.driver.find_element(By.ID, "case-3").text


SHOWN = "return [...document.querySelectorAll('.panel')].filter(p => p.getClientRects().length).map(p => p.id)"


def test_one_step_is_shown_for_one_case_at_a_time(browser: Browser) -> None:
    browser.open([fixtures.simulated_run()])
    browser.shows(["step-0"], SHOWN)
    browser.run("document.querySelectorAll('.choice button')[2].click()")
    browser.shows(["step-2"], SHOWN)
    pressed = "return [...document.querySelectorAll('.choice button')].map(b => b.getAttribute('aria-pressed') === 'true')"
    browser.shows([False, False, True, False, False, False], pressed)
    assert "runs out of memory" in browser.run("return document.querySelector('#step-2 .verdict.warn').textContent")
    assert browser.complaints() == []


def test_the_areas_of_a_step_are_drawn_as_wide_as_the_page(browser: Browser) -> None:
    browser.open([fixtures.simulated_run()])
    for index in (0, 3):
        browser.run("document.querySelectorAll('.choice button')[arguments[0]].click()", index)
        areas = "return document.querySelectorAll(`#figure-step-${arguments[0]} .scatterlayer .fills path`).length"
        assert browser.run(areas, index) >= 8
        names = "return [...document.querySelectorAll(`#figure-step-${arguments[0]} .annotation-text`)].map(t => t.textContent)"
        assert browser.run(names, index)[:3] == ["forward", "backward", "step"]
        gap = (
            "const [svg, box] = [`#figure-step-${arguments[0]} .main-svg`, '.panel:not([hidden]) figure']"
            ".map(q => document.querySelector(q).getBoundingClientRect().width); return Math.abs(svg - box)"
        )
        browser.shows(True, f"{gap} < 1", index)


def test_choosing_a_case_leaves_the_legends_of_the_others_alone(browser: Browser) -> None:
    browser.open([fixtures.run(list(fixtures.simulated_run().records) + list(fixtures.run().records[1::2]))])
    browser.run("document.querySelectorAll('.choice button')[1].click()")
    browser.shows(6, "return document.querySelectorAll('#figure-losses .scatterlayer .trace').length")
    browser.run("document.querySelector('#losses .chips button').click()")
    browser.shows(5, "return document.querySelectorAll('#figure-losses .scatterlayer .trace').length")
    browser.shows(["step-1"], SHOWN)


def test_labels_of_losses_stay_on_one_line_and_every_column_is_seen(browser: Browser) -> None:
    seeds = [{"workload": {"seed": seed}} for seed in (1, 2)]
    cases = [fixtures.case(stage, recipe) for stage in (1, 3) for recipe in ("fp32", "bf16-stochastic-rounding")]
    records = [dataclasses.replace(fixtures.measure(case), quality=(fixtures.watched(),)) for case in cases]
    browser.open([replace(fixtures.run(records), profile=profile) for profile in seeds])

    assert browser.run("return Math.max(...[...document.querySelectorAll('#losses tbody tr')].map(r => r.offsetHeight))") < 40
    for section in ("losses", "price"):
        script = "const box = document.querySelector(arguments[0] + ' .scroll'); return box.scrollWidth <= box.clientWidth"
        assert browser.run(script, f"#{section}"), section
    assert browser.run("return document.querySelectorAll('#figure-price .textpoint').length") == 0, "a legend tells the points"


def test_hostile_names_are_shown_and_do_nothing(browser: Browser) -> None:
    browser.open([fixtures.hostile_run()])  # an alert would make the next call fail
    assert browser.complaints() == []
    assert browser.driver.title == "bf16prof: <script>alert(1)</script>"
    assert browser.run("return document.querySelectorAll('img, #summary b b, .main-svg a, section script[src]').length") == 0
    assert browser.run("return document.querySelector('h1').textContent") == "<script>alert(1)</script>"
    headings = browser.run("return [...document.querySelectorAll('#figure-components .annotation-text')].map(t => t.textContent)")
    assert headings[0] == "<script>alert(1)</script>: zero2-w2-<script>alert(1)</script>"
    assert headings[6].startswith("<b>bold</b><a href='javascript:alert(2)'>%{x}</a>")
    assert browser.requests() == []

    browser.run("Plotly.Fx.hover('figure-losses', [{curveNumber: 6, pointNumber: 3}])")
    hover = browser.run("return document.querySelector('#figure-losses .hoverlayer').textContent")
    assert "<b>bold</b><a href='javascript:alert(2)'>%{x}</a>" in hover
    assert browser.run("return document.querySelectorAll('.hoverlayer a').length") == 0


def test_it_reads_in_the_dark_and_on_a_phone(browser: Browser) -> None:
    browser.open([fixtures.run()])
    ink = "return getComputedStyle(document.querySelector('#figure-losses .xtick text')).fill"
    light = browser.run(ink)
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    browser.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 420, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        assert browser.run(ink) != light
        browser.open([fixtures.simulated_run()])
        ground = "return getComputedStyle(document.querySelector('#figure-step-0 .annotation rect.bg')).fill"
        assert browser.run(ground) == browser.run("return getComputedStyle(document.querySelector('section')).backgroundColor")
        assert browser.run("return document.documentElement.scrollWidth") <= 420
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
