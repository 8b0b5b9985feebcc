"""The report in a real browser: no errors, every image there, no sideways scrolling on a phone."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.datasets import write_spoilt
from support.generated import Brightness, make_folder, make_run, read_rows, write_rows

from diffpref.data.check import check
from diffpref.evaluate.alarms import Alarm
from diffpref.evaluate.compare import Comparison, compare
from diffpref.evaluate.features import Pixels
from diffpref.report.data import write_check
from diffpref.report.page import write_report
from diffpref.scorers.base import load_scorer

pytestmark = pytest.mark.browser
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)
SCHEMES = ("light", "dark")
WIDTHS = {"desktop": 1280, "phone": 360}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The kinds of page, with one prompt and one setting of unbroken text as hard to wrap as it gets."""
    folder = tmp_path_factory.mktemp("pages")
    long = "red " + "unbroken" * 40 + ' <script>document.title = "run"</script>'
    for name, clutter in (("base", 0.7), ("tuned", 0.3)):
        made = make_folder(folder / name, clutter, prompts=30)
        write_rows(made, [{**row, "prompt": long} if not place else row for place, row in enumerate(read_rows(made))])
    run = make_run(folder / "run")
    with (run / "config.yaml").open("a") as config:
        config.write("long: " + "x" * 400 + "\n")
    comparison = compare([folder / "base", folder / "tuned"], [load_scorer("embedded-judge")], Pixels())
    kinds = {"full": (run, comparison), "train": (run, None), "compare": (None, comparison)}
    for name, (shown_run, shown_comparison) in kinds.items():
        write_report(
            folder / f"{name}.html",
            title=f"The {name} report",
            run=shown_run,
            comparison=shown_comparison,
            reproduce=["diffpref demo " + "y" * 200],
            each=30,
        )
    several = _several(folder, long)
    for name in ("several", "folder"):
        output = folder / f"{name}.html" if name == "several" else folder / name
        write_report(output, title=f"The {name} report", run=None, comparison=several, reproduce=["diffpref compare"])
    dataset = write_spoilt(folder / "data", long)
    write_check(folder / "check.html", check(dataset), ["diffpref data check " + "y" * 200])
    found = {name: folder / f"{name}.html" for name in (*kinds, "several", "check")}
    return {**found, "folder": folder / "folder" / "index.html"}


def _several(folder: Path, long: str) -> Comparison:
    """Two tuned models against the base by two scorers, in three categories, with an alarm."""
    make_folder(folder / "third", 0.9, prompts=30)
    categories = ["anime", "<b>photo</b>", long[:60]]
    for name in ("base", "tuned", "third"):
        rows = read_rows(folder / name)
        kept = {"prompt": long, "category": None}
        rows = [{**row, "category": categories[place % 3]} for place, row in enumerate(rows)]
        write_rows(folder / name, [{**rows[0], **kept}, *rows[1:]])
    folders = [folder / name for name in ("base", "tuned", "third")]
    comparison = compare(folders, [load_scorer("embedded-judge"), Brightness()], Pixels())
    alarm = Alarm("held_out_falls", folders[1], f"one rises while another falls {long}")
    return replace(comparison, alarms=(alarm,))


def show(browser: Any, page: Path, width: int, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    height = browser.execute_script("return document.documentElement.scrollHeight")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "height": height})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize("name", ["full", "train", "compare", "several", "check"])
def test_a_page_shows_without_a_fault(
    browser: Any, pages: dict[str, Path], tmp_path: Path, name: str, device: str, scheme: str
):
    show(browser, pages[name], WIDTHS[device], scheme)
    assert browser.save_screenshot(str(tmp_path / f"{name}-{device}-{scheme}.png"))
    assert browser.get_log("browser") == []
    assert browser.title == ("Check of data" if name == "check" else f"The {name} report")
    images = browser.execute_script("return [...document.images].map(image => [image.complete, image.naturalWidth])")
    assert len(images) >= 6
    assert all(complete and width > 0 for complete, width in images)
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= WIDTHS[device]
    beyond = browser.execute_script(
        "const right = document.documentElement.clientWidth + 0.5;"
        "return [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > right).length"
    )
    assert beyond == 0


SHOWN = """
const shown = [...document.querySelectorAll("#sorted .card, #chosen .card")].filter(card => card.checkVisibility());
return JSON.stringify(shown.map(card => ({
  place: Number(card.dataset.place), category: card.dataset.category, prompt: card.querySelector(".prompt").textContent,
  scores: card.dataset.scores.split(";").map(row => row.split(",").map(Number)),
  drifts: card.dataset.drifts.split(",").map(Number),
})));
"""


def cards(browser: Any) -> list[dict[str, Any]]:
    """The cards that can be seen, in their order."""
    return json.loads(browser.execute_script(SHOWN))


def choose(browser: Any, **wanted: str) -> None:
    """Choose options by their text, as a reader does."""
    from selenium.webdriver.support.ui import Select

    for field, text in wanted.items():
        Select(browser.find_element("id", field)).select_by_visible_text(text)


def test_the_gallery_sorts_and_filters(browser: Any, pages: dict[str, Path]):
    show(browser, pages["folder"], 1280, "light")
    assert browser.get_log("browser") == []
    before = cards(browser)
    assert len({card["place"] for card in before}) == 30
    choose(browser, sort="difference")
    for scorer, row in (("embedded-judge", 0), ("brightness", 1)):
        for folder, column in (("tuned", 1), ("third", 2)):
            for order, sign in (("highest first", 1), ("lowest first", -1)):
                choose(browser, scorer=scorer, folder=folder, order=order)
                shown = cards(browser)
                assert sorted(card["place"] for card in shown) == list(range(30))
                values = [sign * (card["scores"][row][column] - card["scores"][row][0]) for card in shown]
                assert values == sorted(values, reverse=True)
    choose(browser, sort="score of base", scorer="brightness", order="highest first")
    values = [card["scores"][1][0] for card in cards(browser)]
    assert values == sorted(values, reverse=True)
    choose(browser, sort="drift from the base", folder="third")
    values = [card["drifts"][1] for card in cards(browser)]
    assert values == sorted(values, reverse=True)
    choose(browser, sort="prompt")
    values = [card["prompt"] for card in cards(browser)]
    assert values == sorted(values, key=str.lower)
    choose(browser, category="anime")
    assert {card["category"] for card in cards(browser)} == {"anime"}
    assert browser.find_element("id", "said").text == f"{len(cards(browser))} of the 30 pairs on this page"
    choose(browser, category="all", sort="as chosen")
    assert cards(browser) == before
    words = before[3]["prompt"].split()[-2:]
    browser.find_element("id", "words").send_keys(" ".join(words).upper())
    assert all(" ".join(words) in card["prompt"].lower() for card in cards(browser))
    assert 0 < len(cards(browser)) < 30
    assert browser.get_log("browser") == []


def test_the_gallery_is_sorted_by_keys_alone(browser: Any, pages: dict[str, Path]):
    from selenium.webdriver.common.keys import Keys

    show(browser, pages["several"], 1280, "light")
    browser.find_element("tag name", "body").send_keys(Keys.TAB)
    focused = browser.switch_to.active_element
    assert focused.get_attribute("id") == "sort"
    focused.send_keys("d")
    assert browser.execute_script("return document.getElementById('sort').value") == "difference"
    focused.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("id") == "order"
    shown = cards(browser)
    values = [card["scores"][0][1] - card["scores"][0][0] for card in shown]
    assert values == sorted(values, reverse=True)


def test_pictures_beside_a_page_are_found(browser: Any, pages: dict[str, Path]):
    show(browser, pages["folder"], 360, "dark")
    assert browser.execute_script("return [...document.images].every(image => image.loading === 'lazy')")
    load = (  # as if each had come into view
        "const done = arguments[0];"
        "Promise.all([...document.images].map(image => { image.loading = 'eager'; return image.decode(); }))"
        ".then(() => done([...document.images].map(image => image.naturalWidth)), error => done(String(error)))"
    )
    assert browser.execute_async_script(load) == [32] * browser.execute_script("return document.images.length")
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360


def test_small_pictures_stay_crisp_and_the_dark_is_dark(browser: Any, pages: dict[str, Path]):
    brightness = {}
    for scheme in SCHEMES:
        show(browser, pages["full"], 1280, scheme)
        rendering = "return getComputedStyle(document.images[0]).imageRendering"
        assert browser.execute_script(rendering) == "pixelated"
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        brightness[scheme] = sum(int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(","))
    assert brightness["dark"] < 150 < 600 < brightness["light"]


def test_a_fault_would_be_seen(browser: Any, pages: dict[str, Path], tmp_path: Path):
    """The page's policy refuses what slips in, and the browser's log, on which the tests above rely, tells of it."""
    spoilt = tmp_path / "spoilt.html"
    text = pages["train"].read_text().replace("</main>", '<script>document.title = "run"</script></main>')
    spoilt.write_text(text)
    show(browser, spoilt, 1280, "light")
    assert browser.title == "The train report"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))
