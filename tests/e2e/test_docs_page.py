"""The documentation page in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from serve import Serve

pytestmark = pytest.mark.xdist_group("e2e")

OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,2000",
)
PATIENCE_S = 30


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = _program("chromium")
    for option in (*OPTIONS, f"--user-data-dir={tmp_path}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with Chrome(options=options, service=ChromeService(_program("chromedriver"))) as browser:
        yield browser


def _program(name: str) -> str:
    path = shutil.which(name)
    assert path, f"{name} is needed: apt-get install chromium chromium-driver"
    return path


def test_the_page_shows_every_route_and_asks_nobody_else(serve: Serve, browser: Chrome) -> None:
    browser.get(f"{serve.address}/docs")
    wait = WebDriverWait(browser, PATIENCE_S)
    wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, ".opblock"))
    shown = {
        (block.find_element(By.CSS_SELECTOR, ".opblock-summary-method").text, _path_of(block))
        for block in browser.find_elements(By.CSS_SELECTOR, ".opblock")
    }
    api = "/api/external-agents"
    assert shown >= {
        ("POST", api),
        ("GET", api),
        ("GET", f"{api}/{{agent_id}}"),
        ("PATCH", f"{api}/{{agent_id}}"),
        ("DELETE", f"{api}/{{agent_id}}"),
        ("POST", f"{api}/{{agent_id}}/invoke"),
        ("GET", f"{api}/{{agent_id}}/invocations"),
    }
    assert browser.get_log("browser") == [], "the console has no errors, the policy no violations"
    asked = [
        entry["message"] for entry in browser.get_log("performance") if "Network.requestWillBeSent" in entry["message"]
    ]
    foreign = [message for message in asked if '"url":"http' in message and f'"url":"{serve.address}' not in message]
    assert asked
    assert not foreign


def test_trying_out_a_call_reaches_the_api(serve: Serve, browser: Chrome) -> None:
    browser.get(f"{serve.address}/docs")
    wait = WebDriverWait(browser, PATIENCE_S)
    wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, ".opblock"))
    browser.find_element(By.CSS_SELECTOR, "button.authorize").click()
    wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, ".auth-container input"))
    browser.find_element(By.CSS_SELECTOR, ".auth-container input").send_keys(serve.key)
    browser.find_element(By.CSS_SELECTOR, ".auth-btn-wrapper button.authorize").click()
    browser.find_element(By.CSS_SELECTOR, ".auth-btn-wrapper button.btn-done").click()
    for step in (".opblock-summary-control", "button.execute"):
        # By script: while the operation unfolds, a click at a place on the screen may hit another one.
        element = wait.until(lambda page, step=step: _in_listing(page, step))
        browser.execute_script("arguments[0].click()", element)
    status = wait.until(lambda page: _in_listing(page, ".live-responses-table tr.response td.response-col_status"))
    assert status.text.startswith("200")


def _in_listing(page: Chrome, selector: str) -> WebElement | None:
    """Looked up each time: the page draws the operation anew at every step."""
    for block in page.find_elements(By.CSS_SELECTOR, ".opblock-get"):
        if _path_of(block) == "/api/external-agents":
            return next(iter(block.find_elements(By.CSS_SELECTOR, selector)), None)
    return None


def _path_of(block: WebElement) -> str:
    return str(block.find_element(By.CSS_SELECTOR, "[data-path]").get_attribute("data-path"))
