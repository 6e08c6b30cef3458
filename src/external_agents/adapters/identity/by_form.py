"""Several kinds of credentials at one door."""

from __future__ import annotations

from external_agents.domain.access import Principal
from external_agents.ports.identity import Authenticator


class ByForm(Authenticator):
    """Tokens of three parts with dots between them go to `jwt`, everything else to `api_keys`, which have no dots."""

    def __init__(self, *, api_keys: Authenticator, jwt: Authenticator) -> None:
        self._api_keys = api_keys
        self._jwt = jwt

    async def authenticate(self, bearer_token: str) -> Principal:
        is_jwt = bearer_token.count(".") == 2
        return await (self._jwt if is_jwt else self._api_keys).authenticate(bearer_token)
