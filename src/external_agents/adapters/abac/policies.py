"""Reading Cedar policies: the packaged guardrails and a folder's own, each checked against the schema."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import attrs
import orjson
from cedarpy import PolicySet, Schema, policies_to_json_str, validate_policies

from external_agents.domain.errors import ConfigurationError

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\r\n]*|;', re.DOTALL)
_BLANK = re.compile(r"(?:\s|//[^\r\n]*)*")

_LASTING_VARIABLES = ("principal", "action", "resource")

_log = logging.getLogger(__name__)


@attrs.frozen
class LoadedPolicy:
    """
    One policy in force.

    Attributes:
        id: Its `@id` annotation, or else `file:line`; decisions name it.
        line: Where it begins, from 1.
    """

    id: str
    effect: Literal["permit", "forbid"]
    file: str
    line: int
    text: str = attrs.field(repr=False)

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


class CedarPolicies:
    """
    The packaged guardrails and, after them, the policies of a folder; parsed and validated, immutable.

    Where none of the folder's policies permits anything, holders of a permission are permitted by default. As soon as
    one does, the folder says who is permitted: otherwise its permits would mean nothing.

    Attributes:
        loaded: Every policy in force, guardrails first, then by file name and line.
        has_folder: Whether a folder was given, even an empty one.
        reads_context: Whether a decision may depend on more than principal, action and resource. When in doubt it does.
    """

    def __init__(self, loaded: Sequence[LoadedPolicy], schema: Schema, *, has_folder: bool) -> None:
        self.loaded = tuple(loaded)
        self.schema = schema
        self.has_folder = has_folder
        text = "\n".join(policy.text for policy in self.loaded)
        self.policy_set = PolicySet.from_str(text)
        self.reads_context = any(
            variable not in _LASTING_VARIABLES for variable in _variables(orjson.loads(policies_to_json_str(text)))
        )
        # Cedar numbers the policies of one text in their order.
        self._ids = {f"policy{index}": policy.id for index, policy in enumerate(self.loaded)}

    @classmethod
    def load(cls, policy_dir: Path | None = None) -> CedarPolicies:
        """
        Args:
            policy_dir: Its `*.cedar` files are read once, in the order of their names; those beginning with a dot and
                those of folders within are not. Where it holds none, the guardrails alone are in force.

        Raises:
            ConfigurationError: The folder or a file cannot be read; or policies do not parse or validate: each of them
                is named with file and line.
        """
        schema = Schema.from_str(_packaged("schema.cedarschema"))
        reading = _Reading(schema)
        reading.take("guardrails.cedar", _packaged("guardrails.cedar"))
        if policy_dir is not None:
            for path in _cedar_files(policy_dir):
                reading.take(path.name, _text_of(path))
        if reading.faults:
            raise ConfigurationError("; ".join(reading.faults))
        if all(policy.effect == "forbid" for policy in reading.policies):
            reading.take("default.cedar", _packaged("default.cedar"))
        return cls(reading.policies, schema, has_folder=policy_dir is not None)

    def names_of(self, cedar_ids: Sequence[str]) -> tuple[str, ...]:
        """The ids of `loaded` for those that Cedar reports."""
        return tuple(sorted(self._ids[cedar_id] for cedar_id in cedar_ids))


class _Reading:
    """Policies taken so far, and the faults of those that could not be."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self.policies: list[LoadedPolicy] = []
        self.faults: list[str] = []

    def take(self, file: str, text: str) -> None:
        for line, statement in _statements(text):
            try:
                self.policies.append(self._checked(file, line, statement))
            except ValueError as error:
                self.faults.append(f"{file}:{line}: {' '.join(str(error).split())}")

    def _checked(self, file: str, line: int, text: str) -> LoadedPolicy:
        PolicySet.from_str(text)
        parsed = orjson.loads(policies_to_json_str(text))
        if parsed["templates"]:
            raise ValueError("a template (?principal, ?resource) applies to nothing here; write a policy")
        [policy] = parsed["staticPolicies"].values()
        faults = validate_policies(text, self._schema).errors
        if faults:
            prefix = f"for policy `{faults[0].policy_id}`, "
            raise ValueError(", ".join(fault.error.removeprefix(prefix) for fault in faults))
        return LoadedPolicy(
            id=policy.get("annotations", {}).get("id") or f"{file}:{line}",
            effect=policy["effect"],
            file=file,
            line=line,
            text=text,
        )


def _variables(node: Any) -> Iterator[Any]:
    """
    What stands behind `Var` anywhere in policies as JSON, such as `context`.

    A member of a record, or an annotation, may have that name, too; then it is more than the variables, never less.
    """
    if isinstance(node, dict):
        if "Var" in node:
            yield node["Var"]
        node = list(node.values())
    if isinstance(node, list):
        for part in node:
            yield from _variables(part)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of each policy: what ends in a semicolon outside of strings and comments, and what is left."""
    ends = [token.end() for token in _TOKEN.finditer(text) if token.group() == ";"]
    begin = 0
    for end in [*ends, len(text)]:
        blank = _BLANK.match(text, begin)
        begin = blank.end() if blank else begin
        if begin < end:
            yield text.count("\n", 0, begin) + 1, text[begin:end]
        begin = end


def _cedar_files(folder: Path) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix == ".cedar" and not path.name.startswith("."))
    except OSError as error:
        raise ConfigurationError(f"the policy folder {folder} cannot be read: {error.strerror}") from error
    if not found:
        _log.warning("the policy folder %s holds no *.cedar file; the guardrails alone are in force", folder)
    return found


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"the policy file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"the policy file {path} is not UTF-8") from error


def _packaged(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
