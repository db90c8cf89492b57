"""Check pages in headless Chromium, as a reader's browser shows them."""

import tempfile
from contextlib import contextmanager
from pathlib import Path

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDE, PHONE = (1280, 900), (390, 844)


@contextmanager
def open_browser():
    """Yield a browser with an empty profile that records its console."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
        try:
            yield driver
        finally:
            driver.quit()


def show(browser, page: Path, size=WIDE) -> None:
    """Open a page in a window of the given size in pixels."""
    width, height = size
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE},
    )
    browser.get(page.resolve().as_uri())
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 30).until(lambda _: browser.execute_script("return document.readyState") == "complete")


def check_page(browser, page: Path) -> None:
    """Check what must hold for every page: a silent console, all images, names for plots, no wider than a phone."""
    show(browser, page)
    assert browser.get_log("browser") == []
    broken = (
        "return [...document.images].filter(i => !i.complete || !i.naturalWidth || !i.alt)"
        ".map(i => i.alt || i.outerHTML)"
    )
    assert browser.execute_script(broken) == []
    nameless = (
        "return [...document.querySelectorAll('.plot')].filter(p => !p.ariaLabel || !p.querySelector('svg')).length"
    )
    assert browser.execute_script(nameless) == 0
    repeated = """const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
                  return ids.filter((id, k) => ids.indexOf(id) !== k
                                               && document.getElementById(id).closest('svg') === null)"""
    assert browser.execute_script(repeated) == []
    fetched = (
        "return performance.getEntriesByType('resource').map(e => e.name).filter(name => !name.startsWith('data:'))"
    )
    assert browser.execute_script(fetched) == []
    show(browser, page, PHONE)
    assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]


def column(browser, table: int, place: int) -> list[str]:
    """Return the texts of a table's column."""
    return browser.execute_script(
        "return [...document.querySelectorAll('table')[arguments[0]].tBodies[0].rows]"
        ".map(row => row.cells[arguments[1]].textContent)",
        table,
        place,
    )


def click_heading(browser, table: int, place: int) -> None:
    browser.execute_script(
        "document.querySelectorAll('table')[arguments[0]].tHead.rows[0].cells[arguments[1]]"
        ".querySelector('button').click()",
        table,
        place,
    )
