"""The service's secret keys: named, derived from by purpose, read from a setting or from a file made once."""

from __future__ import annotations

import base64
import binascii
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from external_agents.domain.errors import ConfigurationError

KEY_BYTES = 32
KEY_ID_PATTERN = r"[A-Za-z0-9_.-]{1,32}"

_FILE_MAX_BYTES = 64 * 1024


class KeyRing:
    """
    Keys by id, in order: the first makes new things, all of them read old ones.

    The keys themselves are used for nothing but deriving (HKDF-SHA256, RFC 5869) one key for each purpose.

    Attributes:
        sealing_keys: For secrets at rest, by key id.
        api_key_hash_keys: For the keyed hashes of API keys, by key id.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        """
        Args:
            keys: At least one, of KEY_BYTES each, by ids that match KEY_ID_PATTERN.

        Raises:
            ConfigurationError: Something is wrong with them.
        """
        if not keys:
            raise ConfigurationError("there is no secret key")
        for key_id, key in keys.items():
            if re.fullmatch(KEY_ID_PATTERN, key_id) is None or len(key) != KEY_BYTES:
                raise ConfigurationError(f"a secret key has an id ({KEY_ID_PATTERN}) and {KEY_BYTES} bytes")
        self.key_ids = tuple(keys)
        self.sealing_keys = _derived(keys, b"external-agents: sealing 1")
        self.api_key_hash_keys = _derived(keys, b"external-agents: hashing API keys 1")

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(self.key_ids)})"

    @classmethod
    def parse(cls, text: str, source: str = "EXTERNAL_AGENTS_SECRET_KEYS") -> KeyRing:
        """
        Args:
            text: `kid:base64[,kid:base64…]`.
            source: Where it stands, for the messages.

        Raises:
            ConfigurationError: Which entry is wrong, and how; never what is in it.
        """
        keys: dict[str, bytes] = {}
        for position, entry in enumerate(text.split(","), start=1):
            try:
                key_id, key = _parsed(entry.strip())
                if key_id in keys:
                    raise ValueError(f"the key id {key_id} is there twice")
            except ValueError as error:
                raise ConfigurationError(f"{source}, entry {position}: {error}") from None
            keys[key_id] = key
        return cls(keys)

    @classmethod
    def load_or_create(cls, path: Path) -> KeyRing:
        """
        The keys in a file, which is made with a random key and mode 0600 where there is none.

        Processes that race for it end up with one key. The file has the form of the setting, so it can be rotated by
        hand and moved into the setting.

        Raises:
            ConfigurationError: It cannot be read or made, others can read it, or what it holds is wrong.
        """
        try:
            if not path.exists():
                _make(path)
            return cls.parse(_read_private(path), source=str(path))
        except OSError as error:
            raise ConfigurationError(f"the key file {path} cannot be used: {error.strerror}") from error


def _derived(keys: Mapping[str, bytes], purpose: bytes) -> Mapping[str, bytes]:
    return MappingProxyType(
        {key_id: HKDF(SHA256(), KEY_BYTES, salt=None, info=purpose).derive(key) for key_id, key in keys.items()}
    )


def _parsed(entry: str) -> tuple[str, bytes]:
    key_id, separator, encoded = entry.partition(":")
    if not separator:
        raise ValueError("is not of the form kid:base64")
    if re.fullmatch(KEY_ID_PATTERN, key_id) is None:
        raise ValueError(f"the key id must match {KEY_ID_PATTERN}")
    try:
        key = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the key is not base64") from None
    if len(key) != KEY_BYTES:
        raise ValueError(f"the key has {len(key)} bytes, not {KEY_BYTES}; `openssl rand -base64 32` makes one")
    return key_id, key


def _make(path: Path) -> None:
    """Appears under its name complete, or not at all; whoever is second leaves the first one's in place."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    key_id = f"local-{secrets.token_hex(4)}"
    line = f"{key_id}:{base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()}\n"
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        temporary.unlink()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_private(path: Path) -> str:
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if mode & 0o077:
            raise ConfigurationError(f"the key file {path} is open to others: chmod 600 it, if nobody can have read it")
        content = file.read(_FILE_MAX_BYTES)
    try:
        return content.decode("ascii").strip()
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} is not of the form kid:base64") from None
