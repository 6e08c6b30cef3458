"""The API's description: `/openapi.json`, and `/docs`, a Swagger UI that talks to no other host."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
import falcon
import orjson
from falcon.asgi import Request, Response

from external_agents.adapters.rest.resources import Resource
from external_agents.domain.errors import ConfigurationError

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)

_SWAGGER_UI_PACKAGE = "mkdocs_swagger_ui_tag"
_OURS = Path(__file__).with_name("docs_page")


@attrs.frozen
class Asset:
    content: bytes
    media_type: str


class OpenApi(Resource):
    is_open = True

    def __init__(self, document: dict[str, Any]) -> None:
        self._content = orjson.dumps(document)

    async def on_get(self, req: Request, resp: Response) -> None:
        resp.content_type = falcon.MEDIA_JSON
        resp.data = self._content

    on_head = on_get


class DocsPage(Resource):
    is_open = True

    def __init__(self) -> None:
        self._content = (_OURS / "index.html").read_bytes()

    async def on_get(self, req: Request, resp: Response) -> None:
        if req.scope["path"].endswith("/"):
            raise falcon.HTTPMovedPermanently("../docs")
        resp.content_type = falcon.MEDIA_HTML
        resp.set_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
        resp.set_header("Referrer-Policy", "no-referrer")
        resp.data = self._content

    on_head = on_get


class DocsAsset(Resource):
    is_open = True

    def __init__(self) -> None:
        self._assets = _assets()

    async def on_get(self, req: Request, resp: Response, name: str) -> None:
        if name not in self._assets:
            raise falcon.HTTPRouteNotFound
        asset = self._assets[name]
        resp.content_type = asset.media_type
        resp.data = asset.content

    on_head = on_get


def documentation_routes(document: dict[str, Any]) -> dict[str, Resource]:
    """
    Raises:
        ConfigurationError: Swagger UI is not installed.
    """
    return {"/openapi.json": OpenApi(document), "/docs": DocsPage(), "/docs/{name}": DocsAsset()}


@cache
def _assets() -> dict[str, Asset]:
    swagger_ui = _swagger_ui()
    files = {
        _OURS / "init.js": falcon.MEDIA_JS,
        swagger_ui / "javascripts" / "swagger-ui-bundle.js": falcon.MEDIA_JS,
        swagger_ui / "stylesheets" / "swagger-ui.css": "text/css; charset=utf-8",
    }
    return {file.name: Asset(file.read_bytes(), media_type) for file, media_type in files.items()}


def _swagger_ui() -> Path:
    """Where the package keeps the files; it is not imported, for it is a plugin of something that is not installed."""
    package = find_spec(_SWAGGER_UI_PACKAGE)
    if package is None or package.origin is None:
        raise ConfigurationError("The files of /docs are missing: pip install 'external-agents[rest]'.")
    return Path(package.origin).with_name("swagger-ui")
