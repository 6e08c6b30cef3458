"""
Fills the generated parts of the documents: what stands between `<!-- generated: PART ARGUMENT -->` and `<!-- end -->`.

    python docs/generate.py          writes them
    python docs/generate.py --check  writes nothing, names the documents that are not up to date, and exits 1

It reads the domain's schemas, the API's description, the tables, the settings, the metrics and the command line, so it
needs everything installed (`.[serve]`).
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import typer.main
from sqlalchemy import Column, Table
from sqlalchemy.dialects import postgresql

import external_agents
from external_agents.adapters.postgres.tables import metadata
from external_agents.adapters.rest.errors import KINDS
from external_agents.adapters.rest.openapi import openapi_document
from external_agents.adapters.telemetry.metrics import METRICS, Metric
from external_agents.cli.app import app
from external_agents.domain import retry
from external_agents.domain.auth import EVERYTHING
from external_agents.domain.budget import BUDGET_CONFIG_SCHEMA
from external_agents.domain.catalog import BUILT_IN
from external_agents.domain.rate_limit import RATE_LIMIT_CONFIG_SCHEMA
from external_agents.settings import LOG_FORMATS, LOG_LEVELS, MAX_BODY_BYTES_BOUNDS, Settings, variable_of

DOCS = Path(__file__).parent
PACKAGE = Path(external_agents.__file__).parent

Schema: TypeAlias = Mapping[str, Any]
Command: TypeAlias = Any
"""click's, or the one that newer versions of typer bring along."""

_PART = re.compile(r"(<!-- generated: (?P<name>[\w-]+)(?: (?P<argument>\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)

_API = openapi_document(BUILT_IN)


# The forms that everything is written in.


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_row(columns), _row(["---"] * len(columns)), *map(_row, rows)]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    escaped = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def json_block(value: Any) -> str:
    return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```"


def code(text: object) -> str:
    return f"`{text}`"


def type_of(schema: Schema) -> str:
    """`string`, `number or string`, `"active" or "inactive"`."""
    if "$ref" in schema:
        return _linked(schema["$ref"])
    if "const" in schema:
        return code(json.dumps(schema["const"]))
    if "enum" in schema:
        return " ".join("null" if value is None else code(value) for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(type_of(one) for one in schema["anyOf"]))
    types = schema.get("type", "any JSON")
    named = " or ".join([types] if isinstance(types, str) else types)
    if "items" in schema:
        named += f" of {type_of(schema['items'])}"
    return named


def _linked(reference: str) -> str:
    return code(reference.rpartition("/")[2])


def bounds_of(schema: Schema) -> str:
    """`1 to 200 characters`; empty when there are none."""
    told = [
        _range(schema, "minLength", "maxLength", " characters"),
        _range(schema, "minimum", "maximum"),
        _range(schema, "minItems", "maxItems", " items"),
        f"below {schema['exclusiveMaximum']:,}" if "exclusiveMaximum" in schema else "",
        f"format {code(schema['format'])}" if "format" in schema else "",
        f"pattern {code(schema['pattern'])}" if "pattern" in schema else "",
    ]
    if "items" in schema and (each := bounds_of(schema["items"])):
        told.append(f"each {each}")
    told += [bounds_of(one) for one in schema.get("anyOf", ())]
    return "; ".join(dict.fromkeys(filter(None, told)))


def _range(schema: Schema, lowest: str, highest: str, unit: str = "") -> str:
    low, high = schema.get(lowest), schema.get(highest)
    if low is not None and high is not None:
        return f"{low:,} to {high:,}{unit}"
    if high is not None:
        return f"at most {high:,}{unit}"
    return "" if low is None else f"at least {low:,}{unit}"


# The API.


def _operations() -> Iterator[tuple[str, str, dict[str, Any], list[dict[str, Any]]]]:
    for path, item in _API["paths"].items():
        shared = item.get("parameters", [])
        for method in ("get", "post", "patch", "delete"):
            if method in item:
                yield method.upper(), path, item[method], [*shared, *item[method].get("parameters", [])]


def _permission(operation: Mapping[str, Any]) -> str:
    found = re.search(r"Needs the permission (`[^`]+`)", operation.get("description", ""))
    return found[1] if found else "none"


def operations(_: str) -> str:
    """All of them in one table."""
    return table(
        ("call", "does", "permission", "answers", "errors"),
        [
            (
                f"[{code(f'{method} {path}')}](#{operation['operationId'].lower()})"
                if operation["tags"] != ["service"]
                else code(f"{method} {path}"),
                operation["summary"],
                _permission(operation),
                " ".join(status for status in operation["responses"] if status < "400"),
                " ".join(sorted(status for status in operation["responses"] if status >= "400")),
            )
            for method, path, operation, _ in _operations()
        ],
    )


def operation(operation_id: str) -> str:
    """One operation: its parameters, its body, its answers, and an example of what it answers."""
    for method, path, found, parameters in _operations():
        if found["operationId"] == operation_id:
            return "\n\n".join(filter(None, _operation(method, path, found, parameters)))
    raise KeyError(operation_id)


def _operation(method: str, path: str, found: Mapping[str, Any], parameters: list[dict[str, Any]]) -> Iterator[str]:
    yield f"`{method} {path}`"
    yield f"{found['summary']}. {found['description']}".replace("\n\n", " ")
    if parameters:
        yield table(
            ("parameter", "in", "type", "default", "meaning"),
            [
                (
                    code(parameter["name"]),
                    parameter["in"],
                    _with_bounds(parameter["schema"]),
                    code(parameter["schema"]["default"]) if "default" in parameter["schema"] else "",
                    parameter.get("description", ""),
                )
                for parameter in parameters
            ],
        )
    if body := found.get("requestBody"):
        media = " or ".join(map(code, body["content"]))
        schema = next(iter(body["content"].values()))["schema"]
        described = type_of(schema) if schema else "any JSON value"
        yield f"Request body: {media}, {described}."
    yield table(
        ("status", "meaning", "headers"),
        [_response(status, response) for status, response in sorted(found["responses"].items())],
    )
    yield from _example(found)


def _with_bounds(schema: Schema) -> str:
    bounds = bounds_of(schema)
    return f"{type_of(schema)} ({bounds})" if bounds else type_of(schema)


def _response(status: str, response: Mapping[str, Any]) -> tuple[str, str, str]:
    if "$ref" in response:
        response = _API["components"]["responses"][response["$ref"].rpartition("/")[2]]
    return status, response["description"], " ".join(map(code, response.get("headers", {})))


def _example(found: Mapping[str, Any]) -> Iterator[str]:
    for status, response in found["responses"].items():
        for content in response.get("content", {}).values():
            if "example" in content:
                yield f"{status} answers, for example:\n\n{json_block(content['example'])}"


def problems(_: str) -> str:
    """Every kind of problem."""
    rows = {
        (str(kind.status), code(kind.type), kind.title, _raised_as(error)): None
        for error, kind in sorted(KINDS.items(), key=lambda item: item[1].status)
    }
    return table(("status", "`type`", "`title`", "in the library"), rows)


def _raised_as(error: type[BaseException]) -> str:
    ours = error.__module__.startswith("external_agents.domain.")
    return code(error.__name__) if ours and error.__name__ != "ExternalAgentsError" else ""


def schema_fields(name: str) -> str:
    """The members of one of the API's schemas."""
    schema = _API["components"]["schemas"][name]
    secret = (member for member, definition in schema["properties"].items() if definition.get("writeOnly"))
    return fields(schema, frozenset(secret))


def fields(schema: Schema, secret: frozenset[str] = frozenset()) -> str:
    required = schema.get("required", ())
    properties: Mapping[str, Schema] = schema.get("properties", {})
    return table(
        ("field", "type", "bounds", "required", "default", "meaning"),
        [
            (
                f"**{code(name)}**" if name in secret else code(name),
                type_of(member),
                bounds_of(member),
                "yes" if name in required else "",
                code(json.dumps(member["default"])) if "default" in member else "",
                member.get("description", "") + (" Secret: write-only." if name in secret else ""),
            )
            for name, member in properties.items()
        ],
    )


def auth_config(auth_type: str) -> str:
    scheme = BUILT_IN.auth_schemes[auth_type]
    return _config(scheme.schema, scheme.secret_fields)


def platform_config(provider: str) -> str:
    platform = BUILT_IN.platforms[provider]
    return _config(platform.schema, platform.secret_fields)


def rate_limit_config(_: str) -> str:
    return _config(RATE_LIMIT_CONFIG_SCHEMA)


def budget_config(_: str) -> str:
    return _config(BUDGET_CONFIG_SCHEMA)


def _config(schema: Schema, secret: frozenset[str] = frozenset()) -> str:
    """A config for people and for programs, with an example."""
    shown = [fields(schema, secret)] if schema.get("properties") else []
    if secret == EVERYTHING:
        shown.append("All of it is secret: it is shown as `{}`.")
    example = [f"Example:\n\n{json_block(value)}" for value in schema.get("examples", ())]
    definition = {name: value for name, value in schema.items() if name != "examples"}
    return "\n\n".join([*shown, *example, f"JSON Schema (draft-07):\n\n{json_block(definition)}"])


def retry_rule(_: str) -> str:
    return table(
        ("bound", "value"),
        [
            ("everything about one invocation ends within", f"{retry.TOTAL_S:g} s"),
            ("statuses that are tried again", ", ".join(map(str, sorted(retry.RETRIED_STATUSES)))),
            ("errors that are tried again", ", ".join(code(error.value) for error in sorted(retry.RETRIED_ERRORS))),
            ("wait before attempt n + 1", _backoff()),
            ("longest `Retry-After` that is honoured", f"{retry.RETRY_AFTER_MAX_S:g} s"),
        ],
    )


def _backoff() -> str:
    longest = [retry.backoff_s(attempt, 1.0) for attempt in (1, 2)]
    return f"random, from 0 to {longest[0]:g} s after the first, to {longest[1]:g} s after the second"


# The tables.

_MEANINGS = {
    "org_id": "The organisation. First in every primary key.",
    "name": "For people.",
    "description": "For people.",
    "provider": "The platform that the agent lives on. Fixed at creation.",
    "auth_type": "How the service authenticates to the agent.",
    "auth_config": "The fields of auth_config that are not secret.",
    "platform_config": "The fields of platform_config that are not secret.",
    "rate_limit_config": "As it was sent; null: no limits.",
    "budget_config": "As it was sent; null: no budget.",
    "tags": "For finding agents, and for policies.",
    "max_attempts": "How often one invocation is tried.",
    "status": "Where it is in its life.",
    "created_at": "When it was made.",
    "updated_at": "When it was changed last.",
    "completed_at": "When it ended; null while it runs.",
    "external_agent_id": "The agent that was called.",
    "response_status": "The HTTP status of the agent's last answer; null where none came.",
    "attempts": "Each try: when it began, the status or the error that came of it, and how long it took.",
    "execution_time_ms": "From the first attempt to the end of the last, waits included.",
    "error_code": "Why it did not succeed.",
    "error_message": "The same in one line, without secrets and internal addresses.",
}
"""Of fields whose schema says nothing: their names say most of it."""

_COLUMNS_OF = {"cost": ("cost_amount", "cost_currency"), "org_id": ("org_id",)}


def agent_columns(_: str) -> str:
    return _field_columns("Agent", metadata.tables["external_agents"])


def invocation_columns(_: str) -> str:
    return _field_columns("Invocation", metadata.tables["external_agent_invocations"])


def _field_columns(name: str, stored: Table) -> str:
    """A record field by field, beside its columns."""
    shown = _API["components"]["schemas"][name]["properties"]
    sent = BUILT_IN.agent_properties if name == "Agent" else {}
    return table(
        ("field", "type", "bounds", "default", "meaning", "column"),
        [
            (
                code(field),
                type_of(schema),
                bounds_of(schema),
                code(json.dumps(sent[field]["default"])) if "default" in sent.get(field, {}) else "",
                _MEANINGS.get(field) or schema["description"],
                ", ".join(_column(stored.columns[column]) for column in _COLUMNS_OF.get(field, (field,))),
            )
            for field, schema in shown.items()
        ],
    )


def _column(column: Column[Any]) -> str:
    return f"{code(column.name)} {_sql_type(column)}"


def _sql_type(column: Column[Any]) -> str:
    return str(column.type.compile(dialect=postgresql.dialect())).lower()  # type: ignore[no-untyped-call]


def columns(name: str) -> str:
    """A table as it stands in the database."""
    stored = metadata.tables[name]
    key = ", ".join(column.name for column in stored.primary_key.columns)
    shown = table(
        ("column", "type", "null"),
        [(code(column.name), _sql_type(column), "yes" if column.nullable else "") for column in stored.columns],
    )
    lines = [f"Primary key: ({key})."]
    if stored.foreign_key_constraints:
        lines.append("Foreign key: to `external_agents` by organisation and agent.")
    for index in sorted(stored.indexes, key=lambda index: str(index.name)):
        lines.append(f"Index {code(index.name)} ({', '.join(column.name for column in index.columns)}).")
    return f"{shown}\n\n{' '.join(lines)}"


# Settings and commands.

_TAKEN = {
    "max_body_bytes": "{:,} to {:,}".format(*MAX_BODY_BYTES_BOUNDS),
    "log_format": " ".join(map(code, LOG_FORMATS)),
    "log_level": " ".join(map(code, LOG_LEVELS)),
    "row_security": "`off` `on`",
    "metrics_address": "`host:port` `[IPv6]:port`",
}


def settings(_: str) -> str:
    as_attrs: Any = Settings
    return table(
        ("variable", "default", "values", "meaning"),
        [
            (
                f"[{code(variable_of(field.name))}](#{variable_of(field.name).lower()})",
                code(field.default) if field.default else "none",
                _TAKEN.get(field.name, ""),
                field.metadata["environ_config"].help,
            )
            for field in attrs.fields(as_attrs)
        ],
    )


def commands(_: str) -> str:
    return table(
        ("command", "does"),
        [
            (f"[{code(f'external-agents {name}')}](#external-agents-{name.replace(' ', '-')})", _first_line(command))
            for name, command in _commands()
        ],
    )


def command(name: str) -> str:
    """One command (`keys.create`): usage, description, arguments, options, example."""
    spoken = name.replace(".", " ")
    found = dict(_commands())[spoken]
    return "\n\n".join(filter(None, _command(f"external-agents {spoken}", found)))


def _commands(group: Any = None, prefix: str = "") -> Iterator[tuple[str, Command]]:
    members: Mapping[str, Command] = (group or _top()).commands
    for name, found in members.items():
        if hasattr(found, "commands"):
            yield from _commands(found, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", found


def _top() -> Command:
    return typer.main.get_command(app)


def _first_line(found: Command) -> str:
    return (found.help or "").strip().split("\n\n")[0]


def _command(name: str, found: Command) -> Iterator[str]:
    paragraphs = (found.help or "").strip().split("\n\n")
    arguments = [parameter for parameter in found.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in found.params if parameter.param_type_name == "option"]
    usage = [name, "[OPTIONS]", *(_usage(argument) for argument in arguments)]
    yield f"```text\n{' '.join(usage)}\n```"
    yield "\n\n".join(text for text in paragraphs if not text.startswith("Example: "))
    if arguments:
        yield table(
            ("argument", "meaning"),
            [(code(_usage(argument)), getattr(argument, "help", "") or "") for argument in arguments],
        )
    if options:
        hints = inspect.get_annotations(inspect.unwrap(found.callback))
        yield table(("option", "default", "meaning"), [_option(option, hints) for option in options])
    for text in paragraphs:
        if text.startswith("Example: "):
            yield f"```sh\n{text.removeprefix('Example: ')}\n```"


def _usage(argument: Any) -> str:
    metavar = argument.metavar or str(argument.name).upper()
    return metavar if argument.required else f"[{metavar}]"


def _option(option: Any, hints: Mapping[str, Any]) -> tuple[str, str, str]:
    kind = "N" if "int" in str(hints.get(option.name)) else str(option.name).upper()
    metavar = "" if option.is_flag else f" {option.metavar or kind}"
    default = "required" if option.required else "" if option.default in (None, False, ()) else code(option.default)
    return " ".join(code(name + metavar) for name in option.opts), default, option.help or ""


# Metrics.


def metrics(_: str) -> str:
    return table(
        ("metric", "type", "meaning", "labels"),
        [(code(metric.name), metric.kind, _meaning(metric), "; ".join(_labels(metric))) for metric in METRICS],
    )


def _meaning(metric: Metric) -> str:
    buckets = ", ".join(f"{bound:g}" for bound in metric.buckets)
    return f"{metric.meaning} Buckets: {buckets}." if buckets else metric.meaning


def _labels(metric: Metric) -> Iterator[str]:
    """Each with its values, or what is told of them."""
    for place, name in enumerate(metric.labels):
        known = dict.fromkeys(code(values[place]) for values in metric.series)
        yield f"{code(name)}: {' '.join(known) or metric.told[place]}"


# The layout.

_UNSAID = {
    "": "The public face: domain types, errors and ExternalAgentService; imports no adapter",
    "domain": "Pure values and rules: no I/O, no clock, no randomness",
    "application": "The use cases, on ports alone",
    "adapters": "Each behind an extra of its own",
    "adapters/postgres": "Tables, repositories, ledger, migrations, partitions; the embedded server",
    "adapters/webhook": "POSTs to agents: connections past the egress guard, credentials, limits",
}
"""Of packages without a docstring, and of the top one, whose own is for its users."""

_OPENED = ("domain", "ports", "application")
"""Packages whose modules are listed one by one."""


def layout(_: str) -> str:
    lines = [("external_agents/", _UNSAID[""])]
    for path in sorted(PACKAGE.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.suffix == ".py" and path.name != "__init__.py":
            lines.append((f"  {path.name}", _docstring(path)))
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    inward = [*_OPENED, "adapters"]
    for package in (*inward, *sorted(packages.difference(inward))):
        lines.append((f"  {package}/", _package_line(package)))
        for path in sorted((PACKAGE / package).iterdir()):
            if package in _OPENED and path.suffix == ".py" and path.name != "__init__.py":
                lines.append((f"    {path.name}", _docstring(path)))
            elif package == "adapters" and (path / "__init__.py").exists():
                lines.append((f"    {path.name}/", _package_line(f"adapters/{path.name}")))
    width = max(len(name) for name, _ in lines)
    return "```text\n" + "\n".join(f"{name:<{width}}  {line}".rstrip() for name, line in lines) + "\n```"


def _package_line(package: str) -> str:
    return _UNSAID.get(package) or _docstring(PACKAGE / package / "__init__.py")


def _docstring(path: Path) -> str:
    """The first sentence, up to its first stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z`)])[.;](?: |$)", sentence)[0].rstrip(".")


PARTS: Mapping[str, Callable[[str], str]] = {
    "operations": operations,
    "operation": operation,
    "problems": problems,
    "fields": schema_fields,
    "auth_config": auth_config,
    "platform_config": platform_config,
    "rate_limit_config": rate_limit_config,
    "budget_config": budget_config,
    "retry-rule": retry_rule,
    "agent-columns": agent_columns,
    "invocation-columns": invocation_columns,
    "columns": columns,
    "settings": settings,
    "commands": commands,
    "command": command,
    "metrics": metrics,
    "layout": layout,
}


def filled(text: str) -> str:
    """A document with its generated parts as they should be."""
    return _PART.sub(
        lambda part: f"{part[1]}\n{PARTS[part['name']](part['argument'] or '')}\n\n{part[4]}",
        text,
    )


def main(arguments: Sequence[str]) -> int:
    behind = 0
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        if text == (new := filled(text)):
            continue
        behind += 1
        print(path.relative_to(DOCS.parent))
        if "--check" not in arguments:
            path.write_text(new, encoding="utf-8")
    return 1 if behind and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
