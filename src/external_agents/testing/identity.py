"""What ApiKeyStore and Authenticator promise."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias
from uuid import UUID

import attrs
import pytest

from external_agents.domain.access import Principal
from external_agents.domain.errors import Unauthenticated
from external_agents.ports.identity import ApiKey, ApiKeyStore, Authenticator
from external_agents.testing.builders import id_at, new_id, new_org, principal_of

CREATED = datetime(2026, 3, 10, 12, 0, 0, 123456, tzinfo=UTC)

Issue: TypeAlias = Callable[[Principal], Awaitable[str]]
"""Credentials for a principal, as they stand behind `Authorization: Bearer`."""


def make_key(org_id: str, **changes: Any) -> ApiKey:
    fields: dict[str, Any] = {
        "id": new_id(),
        "principal": principal_of(org_id),
        "hash_key_id": "k1",
        "secret_hash": b"\x00hash\xff",
        "created_at": CREATED,
    }
    return ApiKey(**{**fields, **changes})


class ApiKeyStoreContract:
    """
    For ApiKeyStore.

    Fixtures:
        api_keys (ApiKeyStore): of any scope.
    """

    async def test_a_key_is_found_as_it_was_added(self, api_keys: ApiKeyStore) -> None:
        principal = Principal("acme:eu", "Jürgen “ops”", {"read:external_agent"}, {"team": "ops", "ünï": ""})
        key = make_key("-", principal=principal, expires_at=CREATED + timedelta(days=90))
        await api_keys.add(key)
        assert list(await api_keys.find(key.id)) == [key]

    async def test_a_key_without_permissions_has_none(self, api_keys: ApiKeyStore) -> None:
        key = make_key("-", principal=Principal(new_org(), "nobody", set()))
        await api_keys.add(key)
        assert list(await api_keys.find(key.id)) == [key]

    async def test_an_unknown_key_is_not_found(self, api_keys: ApiKeyStore) -> None:
        await api_keys.add(make_key(new_org()))
        assert list(await api_keys.find(new_id())) == []
        assert list(await api_keys.find(UUID(int=0))) == []

    async def test_several_are_found_at_once(self, api_keys: ApiKeyStore) -> None:
        keys = [make_key(new_org()) for _ in range(3)]
        for key in keys:
            await api_keys.add(key)
        found = await api_keys.find(keys[2].id, new_id(), keys[0].id)
        assert sorted(found, key=lambda key: key.id) == sorted([keys[0], keys[2]], key=lambda key: key.id)
        assert list(await api_keys.find()) == []

    async def test_keys_are_listed_newest_first_within_their_organisation(self, api_keys: ApiKeyStore) -> None:
        org_id = new_org()
        moments = [CREATED + timedelta(minutes=minute) for minute in range(3)]
        keys = [make_key(org_id, id=id_at(moment), created_at=moment) for moment in moments]
        for key in (keys[1], keys[2], keys[0]):
            await api_keys.add(key)
        await api_keys.add(make_key(new_org()))
        assert list(await api_keys.list(org_id)) == keys[::-1]
        assert list(await api_keys.list(new_org())) == []

    async def test_revoked_and_expired_keys_are_found_and_listed(self, api_keys: ApiKeyStore) -> None:
        key = make_key(new_org(), expires_at=CREATED - timedelta(days=1))
        await api_keys.add(key)
        assert await api_keys.revoke(key.id, CREATED)
        revoked = attrs.evolve(key, revoked_at=CREATED)
        assert list(await api_keys.find(key.id)) == [revoked]
        assert list(await api_keys.list(key.principal.org_id)) == [revoked]

    async def test_revoking_twice_keeps_the_first_time(self, api_keys: ApiKeyStore) -> None:
        key, other = make_key(new_org()), make_key(new_org())
        await api_keys.add(key)
        await api_keys.add(other)
        assert await api_keys.revoke(key.id, CREATED)
        assert await api_keys.revoke(key.id, CREATED + timedelta(days=1))
        assert list(await api_keys.find(key.id)) == [attrs.evolve(key, revoked_at=CREATED)]
        assert list(await api_keys.find(other.id)) == [other]

    async def test_the_first_use_of_an_hour_is_noted(self, api_keys: ApiKeyStore) -> None:
        key, other = make_key(new_org()), make_key(new_org())
        for one in (key, other):
            await api_keys.add(one)
        for used_at, noted_at in (
            (CREATED, CREATED),
            (CREATED + timedelta(minutes=59, seconds=59), CREATED),
            (CREATED + timedelta(minutes=60), CREATED + timedelta(minutes=60)),
            (CREATED, CREATED + timedelta(minutes=60)),
        ):
            await api_keys.note_uses({new_id(): used_at, key.id: used_at})
            [found] = await api_keys.find(key.id)
            assert found.last_used_at == noted_at
            assert [one.last_used_at for one in await api_keys.list(key.principal.org_id)] == [noted_at]
        [found] = await api_keys.find(other.id)
        assert found.last_used_at is None
        await api_keys.note_uses({})

    async def test_a_use_changes_nothing_else_of_a_key(self, api_keys: ApiKeyStore) -> None:
        key = make_key(new_org(), expires_at=CREATED + timedelta(days=1))
        await api_keys.add(key)
        await api_keys.revoke(key.id, CREATED)
        await api_keys.note_uses({key.id: CREATED})
        assert list(await api_keys.find(key.id)) == [attrs.evolve(key, revoked_at=CREATED)]

    async def test_revoking_an_unknown_key(self, api_keys: ApiKeyStore) -> None:
        assert not await api_keys.revoke(new_id(), CREATED)


class AuthenticatorContract:
    """
    For Authenticator.

    Fixtures:
        authenticator (Authenticator): of any scope.
        issue (Issue): an async function that gives out credentials which `authenticator` knows.
    """

    async def test_credentials_become_their_principal(self, authenticator: Authenticator, issue: Issue) -> None:
        principals = [
            Principal(new_org(), "billing", {"read:external_agent"}, {"team": "ops"}),
            Principal("A-Z_0.9:" + "x" * 92, "Jürgen", {"read:external_agent", "invoke:external_agent"}),
            Principal(new_org(), "nobody", set()),
        ]
        tokens = [await issue(principal) for principal in principals]
        for token, principal in zip(tokens, principals, strict=True):
            known = await authenticator.authenticate(token)
            assert known.org_id == principal.org_id
            assert known.subject == principal.subject
            assert known.permissions == principal.permissions
            assert principal.attributes.items() <= known.attributes.items()

    @pytest.mark.parametrize(
        "token",
        [
            "",
            " ",
            "unknown",
            "é\udc80",
            "\0",
            ".",
            "..",
            "a.b.c",
            "ey.ey.",
            "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIiwib3JnX2lkIjoiYiJ9.",
            "x" * 100_000,
            "_" * 50,
            "%00'; --",
        ],
        ids=lambda token: ascii(token)[:20],
    )
    async def test_what_was_never_issued_is_refused(self, authenticator: Authenticator, token: str) -> None:
        with pytest.raises(Unauthenticated):
            await authenticator.authenticate(token)

    async def test_credentials_that_were_altered_are_refused(self, authenticator: Authenticator, issue: Issue) -> None:
        token = await issue(principal_of(new_org()))
        middle = len(token) // 2
        altered = [token[:-8], token[8:], token + "AAAAAAAA", f"{token} x", token.swapcase(), token[::-1]]
        altered += [token[:index] + ("A" if token[index] != "A" else "B") + token[index + 1 :] for index in (0, middle)]
        for other in altered:
            with pytest.raises(Unauthenticated):
                await authenticator.authenticate(other)
        await authenticator.authenticate(token)
