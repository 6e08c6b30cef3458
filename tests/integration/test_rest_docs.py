"""The page that people read the API in."""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator

import pytest

from rest_api import Api, is_problem


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with Api() as api:
        yield api


async def test_the_page_runs_nothing_but_its_own_files(api: Api) -> None:
    page = await api.call("GET", "/docs", key=None)
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(directive.split(" ", 1) for directive in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' data:"
    assert not re.search(r"<style|style=|\son\w+=|<script(?! src=)", page.text)
    links = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert not [link for link in links if re.match(r"//|/|\w+:(?!,$)", link)], links
    for link in links:
        if not link.startswith("data:"):
            assert (await api.call("GET", f"/{link}", key=None)).status_code == 200


async def test_the_page_asks_no_other_host(api: Api) -> None:
    script = (await api.call("GET", "/docs/init.js", key=None)).text
    assert "http" not in script
    assert "validatorUrl: null" in script


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("swagger-ui-bundle.js", "text/javascript"),
        ("swagger-ui.css", "text/css; charset=utf-8"),
        ("init.js", "text/javascript"),
    ],
)
async def test_files(api: Api, name: str, media_type: str) -> None:
    answer = await api.call("GET", f"/docs/{name}", key=None)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == media_type
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["swagger-ui-bundle.js.map", "index.html", "..%2fapp.py", "%2e%2e", "x", "LICENSE"])
async def test_no_other_files(api: Api, name: str) -> None:
    assert is_problem(await api.call("GET", f"/docs/{name}", key=None), 404, "no-such-route")


async def test_a_slash_too_many_leads_back(api: Api) -> None:
    answer = await api.call("GET", "/docs/", key=None)
    assert (answer.status_code, answer.headers["location"]) == (301, "../docs")


def test_the_package_of_the_files_is_not_imported() -> None:
    assert "mkdocs_swagger_ui_tag" not in sys.modules
