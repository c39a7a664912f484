"""The HTML report in a real headless Chromium: it draws, it sorts, it loads nothing, and hostile
names stay names."""

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

from bf16prof.reports import html, pictures
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
PLOTS = ("figure-memory", "figure-phases", "figure-timeline", "figure-times", "figure-losses")


class Browser:
    """A Chromium that keeps what happened since the page was opened."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver = driver
        self._page = folder / "report.html"

    def open(self, runs: list[Run], anchor: str = "") -> None:
        self._page.write_text(html.render(runs), encoding="utf-8")
        self.driver.get(BLANK)
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(self._page.as_uri() + anchor)
        self.shows("all", "return document.documentElement.dataset.drawn")

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def shows(self, expected: object, read: str | Callable[[], object], *arguments: object) -> None:
        """Assert what a script or a reading comes to: an event is answered when the page gets to
        it, on a busy machine late."""
        deadline = time.monotonic() + 60
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
    assert browser.run("return document.querySelectorAll('#figure-memory .barlayer .trace').length") == 8


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
        browser.run("document.querySelector('#zero2-w2-bf16-full').open = false")
        link.send_keys(Keys.ENTER)
        browser.shows(True, "return document.querySelector('#zero2-w2-bf16-full').open")
    assert "reduce bucket" in browser.driver.find_element(By.ID, "zero2-w2-bf16-full").text


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


def test_words_in_a_map_stay_in_their_areas_on_a_phone(browser: Browser) -> None:
    browser.open([fixtures.simulated_run()])
    shown = (
        "return [...document.querySelectorAll('#figure-map-step-0 .annotation tspan.line, #figure-map-step-0 .annotation text')]"
        ".filter(t => !t.querySelector('tspan') && t.style.visibility !== 'hidden').length"
    )
    browser.shows(True, shown.replace("return ", "return 4 < "))
    wide = browser.run(shown)
    browser.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        browser.shows(True, shown.replace("return ", f"return {wide} > "))
        assert browser.run(shown) > 0
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


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
    headings = browser.run("return [...document.querySelectorAll('#figure-memory .annotation-text')].map(t => t.textContent)")
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


AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text(encoding="utf-8")


def barriers(browser: Browser) -> list[str]:
    """What axe-core finds that keeps people out."""
    browser.run(AXE)
    browser.driver.set_script_timeout(60)
    script = """
        const done = arguments[0];
        axe.run(document, { resultTypes: ["violations"] }).then(found => done(found.violations), error => done([{ id: String(error) }]));
    """
    found = browser.driver.execute_async_script(script)
    return [f"{one['id']}: {one.get('help')}: {[node['html'][:120] for node in one.get('nodes', [])[:3]]}" for one in found]


def grid_run() -> Run:
    """A grid of 30 cases that name their GPU."""
    places = [(stage, recipe, world) for stage in (1, 2, 3) for recipe in fixtures.RECIPES for world in (1, 2, 4, 8, 16)]
    cases = [fixtures.case(*place) for place in places]
    return fixtures.run([dataclasses.replace(fixtures.simulate(case, 8), timeline=None) for case in cases], name="grid")


def one_case_of_all() -> Run:
    """A case that every source knows, with every figure and table."""
    case = fixtures.case()
    learned = dataclasses.replace(fixtures.measure(case), quality=(fixtures.watched(),))
    return fixtures.run([fixtures.estimate(case, 1200), fixtures.simulate(case, 2000), learned])


@pytest.mark.parametrize(("scheme", "made"), [("light", grid_run), ("dark", one_case_of_all)])
def test_nothing_keeps_people_out(browser: Browser, scheme: str, made: Callable[[], Run]) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        browser.open([made()])
        assert barriers(browser) == []
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_axe_would_find_a_barrier(browser: Browser) -> None:
    browser.open([fixtures.run([])])
    browser.run("document.querySelector('main').innerHTML += '<img src=\"data:,\"><p style=\"color:#ccc;background:#fff\">faint</p>'")
    assert {text.partition(":")[0] for text in barriers(browser)} >= {"image-alt", "color-contrast"}


CASES = "return [...document.querySelectorAll('#summary tbody tr')].filter(r => r.getClientRects().length).map(r => r.cells[0].textContent)"
OPEN = "return [...document.querySelectorAll('#cases > .demand > details')].filter(r => r.getClientRects().length).length"


def test_a_grid_is_searched_filtered_and_shown_on_demand(browser: Browser) -> None:
    browser.open([grid_run()])
    assert len(browser.run(CASES)) == 24
    assert browser.run(OPEN) == 24
    assert browser.run("return document.querySelectorAll('#map table').length") == 2
    type_into(browser, "find", "zero3 FULL")
    names = [f"zero3-w{world}-bf16-full" for world in (1, 2, 4, 8, 16)]
    browser.shows(names, CASES)
    browser.shows("5 of 30", "return document.querySelector('.filters output').textContent")
    type_into(browser, "gpus", "16")
    browser.shows(["zero3-w16-bf16-full"], CASES)
    type_into(browser, "find", "")
    type_into(browser, "gpus", "")
    browser.run("document.querySelector('#summary button.all').click()")
    assert len(browser.run(CASES)) == 30


def type_into(browser: Browser, name: str, value: str) -> None:
    script = """
        const element = document.querySelector(`.filters [name=${arguments[0]}]`);
        element.value = arguments[1];
        element.dispatchEvent(new Event("input", { bubbles: true }));
    """
    browser.run(script, name, value)


def test_a_case_of_a_grid_is_made_when_it_is_opened(browser: Browser) -> None:
    browser.open([grid_run()], "#zero3-w16-bf16-full")
    opened = "return document.querySelectorAll('#cases details[open] table').length"
    assert browser.run(opened) == 1, "the table of its quantities, and no table of another case"
    browser.run("document.querySelector('#map td a').click()")
    browser.shows(True, "return document.getElementById('zero1-w1-bf16-fp32-master').open")


def test_the_address_keeps_what_was_chosen(browser: Browser) -> None:
    browser.open([grid_run()])
    type_into(browser, "recipe", "bf16-full")
    browser.run("document.querySelectorAll('#summary th button')[2].click(); document.querySelectorAll('#summary th button')[2].click()")
    seen = browser.run(CASES)
    anchor = browser.run("return location.hash")
    assert seen[0] == "zero1-w16-bf16-full"
    browser.open([grid_run()], anchor)
    assert browser.run(CASES) == seen

    browser.open([fixtures.run()], "#losses?hidden=0.2")
    assert browser.run("return document.querySelectorAll('#figure-losses .scatterlayer .trace').length") == 4
    browser.open([fixtures.simulated_run()], "#inside?step=step-3")
    browser.shows(["step-3"], SHOWN)
    browser.run("document.querySelectorAll('.choice button')[1].click()")
    browser.shows("#inside?step=step-1", "return location.hash")


def test_tables_copy_as_markdown_and_csv(browser: Browser) -> None:
    browser.open([fixtures.failed_run()])
    browser.run("navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve(); }")
    browser.run("document.querySelector('#summary-table [data-copy=markdown]').click()")
    browser.shows(True, "return 'copied' in window")
    lines = browser.run("return window.copied").splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("| case | measured | estimate |")
    assert lines[2].startswith("| zero1-w2-bf16-fp32-master | 14.60 GiB | 14.60 GiB | exact |")
    browser.run("document.querySelector('#summary-table [data-copy=csv]').click()")
    browser.shows(True, "return window.copied.startsWith('case,measured,')")


def test_hostile_names_are_inert_in_what_is_copied(browser: Browser) -> None:
    browser.open([fixtures.hostile_run()])
    browser.run("navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve(); }")
    browser.run("document.querySelector('#runs [data-copy=csv]').click()")
    browser.shows(True, "return 'copied' in window")
    cells = browser.run("return window.copied")
    assert "\n=1+1" not in cells
    assert ",=1+1" not in cells
    assert "'=1+1" in cells


def test_paper_shows_everything(browser: Browser, tmp_path: Path) -> None:
    import base64

    from pypdf import PdfReader

    browser.open([fixtures.simulated_run(list(fixtures.simulated_run().records[:4]))])
    printed = browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"]
    paper = tmp_path / "page.pdf"
    paper.write_bytes(base64.b64decode(printed))
    text = "".join("".join(page.extract_text() for page in PdfReader(paper).pages).split())

    for case in fixtures.cases()[:2]:
        assert text.count(case.label) >= 4, "in the figures, the tables, the panels and the details"
    assert text.count("allocationsandfreessincethestepbegan") == 2, "every step is drawn, those that were hidden as well"
    assert "showall" not in text
    browser.shows(["step-0"], SHOWN)


def test_figures_are_as_wide_as_paper_is(browser: Browser) -> None:
    browser.open([fixtures.run()])
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        browser.run("dispatchEvent(new Event('beforeprint'))")
        widths = "return [...document.querySelectorAll('.js-plotly-plot .main-svg')].map(s => s.getBoundingClientRect().width)"
        assert max(browser.run(widths)) <= 720, "letter and A4 have more between their margins"
        browser.run("dispatchEvent(new Event('afterprint'))")
        browser.shows(True, "return document.querySelector('#figure-losses .main-svg').getBoundingClientRect().width > 1000")
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_figures_say_in_words_what_they_draw(browser: Browser) -> None:
    browser.open([fixtures.simulated_run()])
    words = browser.run("return [...document.querySelectorAll('figure.plot')].map(f => f.querySelector('.words').textContent)")
    assert len(words) >= 12
    assert all(len(text) > 30 for text in words)


def test_a_page_of_one_case_is_small() -> None:
    assert len(html.render([one_case_of_all()]).encode()) < 2_000_000


def test_a_figure_is_a_picture_file() -> None:
    """A browser of its own: kaleido starts what `-o loss.svg` has."""
    drawn = pictures.picture([one_case_of_all()], "losses", ".svg").decode()
    assert drawn.startswith("<svg")
    assert "Loss by step" in drawn
