"""TLS: the certificate is asked for the name, although the connection goes to the address that was checked."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agents import Reply, hasty_agent, serve_agent
from external_agents.domain.invocation import ErrorCode, Outcome
from webhooks import Names, open_transport, request_to

NAMES = {"agent_example": [["127.0.0.1"]], "other_example": [["127.0.0.1"]]}


class Authority:
    """A certificate authority of its own, for one test run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Test authority")])
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        usage = x509.KeyUsage(
            key_cert_sign=True, crl_sign=True, digital_signature=True, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False,
            encipher_only=False, decipher_only=False,
        )  # fmt: skip
        self._certificate = (
            self._builder(self._name, self._key, days=1)
            .add_extension(constraints, critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def trusted(self) -> ssl.SSLContext:
        """What a client has that trusts this authority alone."""
        pem = self._certificate.public_bytes(serialization.Encoding.PEM).decode()
        return ssl.create_default_context(cadata=pem)

    def server(self, name: str, *, days: int = 1) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            self._builder(subject, key, days)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        file = self._folder / f"{name}-{days}.pem"
        encoding, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        file.write_bytes(
            key.private_bytes(encoding, private, serialization.NoEncryption()) + certificate.public_bytes(encoding)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        context.sni_callback = _remember_name
        return context

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=10))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(authority, critical=False)
        )


def _remember_name(tls: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
    tls.told_server_name = name  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


class TestNames:
    async def test_the_name_stays_the_name(self, authority: Authority):
        async with (
            serve_agent(ssl_context=authority.server("agent.example")) as agent,
            open_transport(resolve=Names(**NAMES), ssl_context=authority.trusted()) as transport,
        ):
            for _ in range(3):
                outcome = await transport.exchange(request_to(agent.url_at("/hook", "agent.example")))
                assert outcome.error is None
            assert [seen.server_name for seen in agent.requests] == ["agent.example"] * 3
            assert [seen.headers["host"] for seen in agent.requests] == [f"agent.example:{agent.port}"] * 3
            assert [seen.connection for seen in agent.requests] == [1, 1, 1]

    async def test_another_name_is_another_connection(self, authority: Authority):
        """Both names lead to one address and one port; the certificate holds for one of them."""
        async with (
            serve_agent(ssl_context=authority.server("agent.example")) as agent,
            open_transport(resolve=Names(**NAMES), ssl_context=authority.trusted()) as transport,
        ):
            assert (await transport.exchange(request_to(agent.url_at("/", "agent.example")))).error is None
            outcome = await transport.exchange(request_to(agent.url_at("/", "other.example")))
            assert outcome.error is ErrorCode.CONNECTION_FAILED
            assert len(agent.requests) == 1


class TestCertificates:
    async def refused_by(self, authority: Authority, context: ssl.SSLContext | None, days: int = 1) -> Outcome:
        async with (
            serve_agent(ssl_context=authority.server("agent.example", days=days)) as agent,
            open_transport(resolve=Names(**NAMES), ssl_context=context) as transport,
        ):
            outcome = await transport.exchange(request_to(agent.url_at("/", "agent.example")))
            assert agent.requests == []
            return outcome

    async def test_one_of_an_unknown_authority(self, authority: Authority):
        message = "The agent shows a certificate that is not trusted."
        expected = Outcome(error=ErrorCode.CONNECTION_FAILED, message=message, may_have_run=False)
        assert await self.refused_by(authority, None) == expected

    async def test_one_that_has_expired(self, authority: Authority):
        outcome = await self.refused_by(authority, authority.trusted(), days=-1)
        assert outcome.message == "The agent shows a certificate that is not trusted."

    async def test_an_agent_without_tls(self):
        async with hasty_agent(b"HTTP/1.1 400 Bad Request\r\n\r\n") as (url, _), open_transport() as transport:
            outcome = await transport.exchange(request_to(url.replace("http:", "https:")))
        assert (outcome.error, outcome.may_have_run) == (ErrorCode.CONNECTION_FAILED, False)
        assert outcome.message == "The agent does not speak TLS as it should."


class TestBehaviour:
    async def test_deadlines_limits_and_resets_hold_as_well(self, authority: Authority):
        endless = Reply(body=b"x" * 5_000_000)
        async with (
            serve_agent(ssl_context=authority.server("agent.example")) as agent,
            open_transport(resolve=Names(**NAMES), ssl_context=authority.trusted()) as transport,
        ):
            request = request_to(agent.url_at("/", "agent.example"), timeout_s=5)
            large = Reply(body=b'"' + b"x" * 60_000 + b'"')
            agent.answers(endless, Reply(reset_after=20), Reply(body=b"7", chunked=True), large)
            outcomes = [await transport.exchange(request) for _ in range(4)]
        assert [outcome.error for outcome in outcomes] == [
            ErrorCode.RESPONSE_TOO_LARGE,
            ErrorCode.CONNECTION_FAILED,
            None,
            None,
        ]
