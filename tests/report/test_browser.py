"""The report in a real browser: no errors, every image there, no sideways scrolling on a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.datasets import write_spoilt
from support.generated import make_folder, make_run, read_rows, write_rows

from diffpref.data.check import check
from diffpref.evaluate.compare import compare
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
    """The four kinds of page, with one prompt and one setting of unbroken text as hard to wrap as it gets."""
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
    dataset = write_spoilt(folder / "data", long)
    write_check(folder / "check.html", check(dataset), ["diffpref data check " + "y" * 200])
    return {name: folder / f"{name}.html" for name in (*kinds, "check")}


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
@pytest.mark.parametrize("name", ["full", "train", "compare", "check"])
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
