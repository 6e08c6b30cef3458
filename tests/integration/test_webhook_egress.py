"""Where requests may not go: nothing is sent there, and not one connection is opened."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address

import aiohttp
import attrs
import pytest
from yarl import URL

from agents import Agent, Issuer, serve_agent
from external_agents.adapters.webhook import resolver
from external_agents.adapters.webhook.connector import GuardedConnector
from external_agents.adapters.webhook.egress import EgressGuard
from external_agents.adapters.webhook.failures import Unanswered
from external_agents.adapters.webhook.journey import Journey, journey
from external_agents.adapters.webhook.outbound import Outbound, Post
from external_agents.adapters.webhook.resolver import SystemResolver
from external_agents.domain.egress import EgressPolicy
from external_agents.domain.invocation import ErrorCode, Outcome
from webhooks import Names, client_of, open_transport, request_to

REFUSED = Outcome(
    error=ErrorCode.EGRESS_REFUSED, message="The agent's URL leads to where requests may not go.", may_have_run=False
)


@pytest.fixture
async def canary() -> AsyncIterator[Agent]:
    """Listens where no request may go."""
    async with serve_agent() as agent:
        yield agent
        assert agent.connections == 0


class TestAddressLiterals:
    @pytest.mark.parametrize("allow", ["", "10.0.0.0/8,127.0.0.2", "::1"])
    @pytest.mark.parametrize("scheme", ["http", "https"])
    @pytest.mark.parametrize("host", ["127.0.0.1", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]"])
    async def test_a_literal_that_is_not_allowed(self, canary: Agent, allow: str, scheme: str, host: str):
        async with open_transport(allow, ports=str(canary.port)) as transport:
            assert await transport.exchange(request_to(f"{scheme}://{host}:{canary.port}/")) == REFUSED

    @pytest.mark.parametrize(
        "host",
        ["2130706433", "0x7f000001", "127.1", "0177.0.0.1", "127.0.0.1.", "localhost", "LOCALHOST", "a@127.0.0.1"],
    )
    async def test_a_spelling_of_one(self, canary: Agent, host: str):
        async with open_transport("10.0.0.0/8", ports=str(canary.port)) as transport:
            outcome = await transport.exchange(request_to(f"http://{host}:{canary.port}/"))
            assert outcome == REFUSED

    async def test_the_socket_is_judged_whatever_let_the_url_pass(self, canary: Agent):
        """Address literals skip aiohttp's resolver. This is the last line, without the one before it."""
        guard = EgressGuard(EgressPolicy(), Names())
        connector = GuardedConnector(guard, ssl.create_default_context())
        current = Journey(URL(canary.url, encoded=True), 1024, "acme")
        journey.set(current)
        async with aiohttp.ClientSession(connector=connector) as session:
            with pytest.raises(aiohttp.ClientConnectorError):
                await session.post(canary.url)
        assert current.refused
        assert not current.reached


class TestNames:
    @pytest.mark.parametrize(
        "addresses",
        [
            ["127.0.0.1"],
            ["::1"],
            ["::ffff:127.0.0.1"],
            ["93.184.215.14", "127.0.0.1"],
            ["127.0.0.1", "93.184.215.14"],
            ["93.184.215.14"] * 20 + ["127.0.0.1"],
            ["169.254.169.254"],
        ],
    )
    async def test_every_address_of_a_name_must_pass(self, canary: Agent, addresses: list[str]):
        names = Names(agent_example=[addresses])
        async with open_transport("", ports=str(canary.port), resolve=names) as transport:
            assert await transport.exchange(request_to(f"https://agent.example:{canary.port}/")) == REFUSED
        assert names.asked == ["agent.example"]

    async def test_a_private_address_beside_an_allowed_one(self, canary: Agent):
        names = Names(agent_example=[["127.0.0.1", "10.0.0.1"]])
        async with open_transport("loopback", resolve=names) as transport:
            assert await transport.exchange(request_to(canary.url_at("/", "agent.example"))) == REFUSED

    async def test_the_connection_goes_to_the_address_that_was_judged(self, canary: Agent):
        """A name that is allowed at first and leads elsewhere when asked again is not asked again."""
        async with serve_agent() as agent:
            names = Names(agent_example=[["127.0.0.2"], ["127.0.0.1"]])
            async with open_transport("127.0.0.2", resolve=names) as transport:
                outcome = await transport.exchange(request_to(f"http://agent.example:{canary.port}/"))
                assert outcome.error is ErrorCode.CONNECTION_FAILED
                assert names.asked == ["agent.example"]
                assert await transport.exchange(request_to(f"http://agent.example:{canary.port}/")) == REFUSED
            assert agent.connections == 0

    async def test_a_kept_connection_serves_its_own_name_alone(self, agent_server: Agent):
        names = Names(agent_example=[["127.0.0.1"]], other_example=[["10.0.0.1"]])
        async with open_transport("loopback", resolve=names) as transport:
            for _ in range(2):
                assert (await transport.exchange(request_to(agent_server.url_at("/", "agent.example")))).error is None
            assert await transport.exchange(request_to(agent_server.url_at("/", "other.example"))) == REFUSED
        assert names.asked == ["agent.example", "other.example"]
        assert [seen.headers["host"] for seen in agent_server.requests] == [f"agent.example:{agent_server.port}"] * 2

    async def test_every_new_connection_asks_anew(self, agent_server: Agent):
        names = Names(agent_example=[["127.0.0.1"], ["10.0.0.1"]])
        url = agent_server.url_at("/", "agent.example")
        async with open_transport("loopback", resolve=names) as transport:
            assert (await transport.exchange(request_to(url))).error is None
            agent_server.drop_connections()
            await agent_server.until(lambda: agent_server.open_connections == 0)
            assert await transport.exchange(request_to(url)) == REFUSED

    async def test_localhost_is_never_looked_up(self, agent_server: Agent):
        names = Names(localhost=[["93.184.215.14"]])
        async with open_transport("127.0.0.1", resolve=names) as transport:
            outcome = await transport.exchange(request_to(agent_server.url_at("/", "localhost")))
            assert outcome.error is None
        assert names.asked == []
        assert agent_server.requests[0].headers["host"] == f"localhost:{agent_server.port}"

    async def test_a_name_beyond_ascii_is_looked_up_by_its_ascii_form(self, agent_server: Agent):
        names = Names(**{"xn--bcher-kva_example": [["127.0.0.1"]]})
        async with open_transport(resolve=names) as transport:
            assert (await transport.exchange(request_to(agent_server.url_at("/", "B\u00fccher.example")))).error is None
        assert names.asked == ["xn--bcher-kva.example"]
        assert agent_server.requests[0].headers["host"] == f"xn--bcher-kva.example:{agent_server.port}"

    async def test_a_name_is_judged_again_in_the_form_in_which_it_is_asked_for(self, canary: Agent, caplog):
        """Registration knows another IDNA than the wire; here they differ in whether the name is local."""

        @attrs.frozen
        class Lenient(EgressPolicy):
            def url_faults(self, url: str) -> list[str]:
                return [] if not url.isascii() else super().url_faults(url)

        names = Names(agent_local=[["127.0.0.1"]])
        outbound = Outbound(Lenient(ports=frozenset({canary.port})), resolve=names)
        for host in ("agent\u3002local", "127\u30020\u30020\u30021", "2130706433\uff0e", "xn--\u3002example"):
            post = Post(
                to="The agent", org_id="acme", url=f"https://{host}:{canary.port}/", headers={}, body=b"",
                answer_limit_bytes=1024, deadline_s=asyncio.get_running_loop().time() + 20,
            )  # fmt: skip
            with pytest.raises(Unanswered) as raised:
                await outbound.post(post)
            assert raised.value.outcome == REFUSED
        await outbound.aclose()
        assert names.asked == []

    async def test_a_name_without_addresses(self):
        async with open_transport(resolve=Names(agent_example=[[]])) as transport:
            outcome = await transport.exchange(request_to("http://agent.example/"))
        assert (outcome.error, outcome.may_have_run) == (ErrorCode.CONNECTION_FAILED, False)


class TestTokenUrls:
    @pytest.mark.parametrize("host", ["127.0.0.3", "login.example"])
    async def test_they_are_guarded_likewise(self, canary: Agent, agent_server: Agent, host: str):
        names = Names(login_example=[["127.0.0.3"]])
        credentials = client_of(f"http://{host}:{canary.port}/token")
        async with open_transport("127.0.0.1", resolve=names) as transport:
            outcome = await transport.exchange(request_to(agent_server.url, credentials=credentials))
        message = "The token endpoint's URL leads to where requests may not go."
        assert outcome == Outcome(error=ErrorCode.EGRESS_REFUSED, message=message)
        assert agent_server.connections == 0

    async def test_a_token_does_not_open_the_way(self, canary: Agent, agent_server: Agent):
        credentials = client_of(agent_server.at("/token", Issuer()))
        async with open_transport("127.0.0.1") as transport:
            outcome = await transport.exchange(request_to(f"http://127.0.0.3:{canary.port}/", credentials=credentials))
        assert outcome == REFUSED


class TestWhatIsTold:
    @pytest.mark.parametrize(
        ("url", "addresses", "rule"),
        [
            ("https://agent.example/", ["10.1.2.3"], "10.1.2.3 is not public and not in EGRESS_ALLOW"),
            ("https://agent.example:444/", ["93.184.215.14"], "port 444 is not in EGRESS_PORTS"),
            ("http://agent.example/", ["93.184.215.14"], "http is only for EGRESS_ALLOW"),
            ("https://agent/", ["93.184.215.14"], "the name is not a public one"),
            ("http://localhost/", [], "localhost stands for no address in EGRESS_ALLOW"),
            ("https://agent.example\\/secret", [], "must not contain spaces, control characters or backslashes"),
        ],
    )
    async def test_the_log_names_the_rule_and_the_outcome_does_not(self, caplog, url, addresses, rule):
        async with open_transport(
            "192.168.0.0/16", resolve=Names(agent_example=[addresses], agent=[addresses])
        ) as transport:
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="external_agents.adapters.webhook"):
                assert await transport.exchange(request_to(url)) == REFUSED
        (record,) = caplog.records
        assert record.name == "external_agents.adapters.webhook"
        assert rule in record.getMessage()
        assert "secret" not in record.getMessage()

    async def test_an_outcome_never_tells_an_address(self, agent_server: Agent):
        names = Names(agent_example=[["127.0.0.1"]], far_example=[["10.0.0.1"]])
        async with open_transport(resolve=names) as transport:
            urls = [f"http://{host}:{port}/" for host in ("agent.example", "far.example") for port in (1, 65535)]
            outcomes = [await transport.exchange(request_to(url)) for url in urls]
        assert all(
            "127." not in (outcome.message or "") and "10." not in (outcome.message or "") for outcome in outcomes
        )


class TestTheSystemsResolver:
    async def test_it_knows_this_machine(self):
        assert ip_address("127.0.0.1") in await SystemResolver()("localhost", "acme")

    async def test_an_unknown_name(self, lookups: Lookups):
        lookups.error = socket.gaierror(socket.EAI_NONAME, "unknown")
        with pytest.raises(OSError, match="unknown"):
            await SystemResolver()("agent.example", "acme")

    async def test_a_slow_lookup_is_given_up_and_shared(self, lookups: Lookups):
        resolve = SystemResolver(timeout_s=0.1)
        lookups.may_end.clear()
        results = await asyncio.gather(*(resolve("slow.example", "acme") for _ in range(50)), return_exceptions=True)
        assert all(isinstance(result, socket.gaierror) for result in results)
        assert lookups.asked == ["slow.example"]
        await resolve.aclose()

    async def test_threads_are_bounded(self, lookups: Lookups):
        resolve = SystemResolver(threads_max=3, timeout_s=0.2)
        lookups.may_end.clear()
        await asyncio.gather(*(resolve(f"{n}.example", f"org-{n}") for n in range(10)), return_exceptions=True)
        assert len(lookups.asked) == 3
        lookups.may_end.set()
        assert await SystemResolver()("other.example", "acme") == (ip_address("93.184.215.14"),)
        await resolve.aclose()

    async def test_an_organisation_with_slow_names_holds_up_nobody_else(self, lookups: Lookups):
        """Its own other names wait; and who asks for the same slow name has a lookup of its own."""
        resolve = SystemResolver(threads_max=5, threads_per_organisation_max=3, timeout_s=20)
        lookups.may_end.clear()
        slow = [asyncio.create_task(resolve(f"slow-{n}.example", "mallory")) for n in range(50)]
        await until(lambda: len(lookups.asked) == 3)
        others = [asyncio.create_task(resolve(name, "acme")) for name in ("slow-0.example", "slow-49.example")]
        await until(lambda: len(lookups.asked) == 5)
        assert lookups.asked[3:] == ["slow-0.example", "slow-49.example"]
        lookups.may_end.set()
        assert {len(found) for found in await asyncio.gather(*others, *slow)} == {1}
        await resolve.aclose()

    async def test_a_lookup_that_has_not_begun_in_time_never_does(self, lookups: Lookups):
        resolve = SystemResolver(threads_max=1, timeout_s=0.1)
        lookups.may_end.clear()
        for name in ("slow.example", "late.example"):
            with pytest.raises(socket.gaierror):
                await resolve(name, "acme")
        await until(lambda: ("acme", "late.example") not in resolve._running)
        lookups.may_end.set()
        await until(lambda: not resolve._running)
        assert lookups.asked == ["slow.example"]
        assert not resolve._slots_of
        await resolve.aclose()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - nobody tells when it does
            await asyncio.sleep(0.001)


class Lookups:
    """The system's answers, under the test's control."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may_end = threading.Event()
        self.may_end.set()
        self.error: OSError | None = None

    def __call__(self, host: bytes, *_: object, **__: object) -> list[tuple]:
        self.asked.append(host.decode())
        assert self.may_end.wait(20)
        if self.error:
            raise self.error
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", 0))] * 2


@pytest.fixture
def lookups(monkeypatch) -> Lookups:
    lookups = Lookups()
    monkeypatch.setattr(resolver.socket, "getaddrinfo", lookups)
    yield lookups
    lookups.may_end.set()
