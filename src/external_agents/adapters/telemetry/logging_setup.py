"""One pipeline for every log line of the process, structlog's and the standard library's, to stderr."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import sys
from functools import partial
from typing import Any, Literal, TextIO, TypeAlias, cast

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from external_agents.adapters.telemetry.request_context import merge_request_ids
from external_agents.domain.errors import ConfigurationError

LogFormat: TypeAlias = Literal["console", "json"]

FORMATS = ("console", "json")
LEVELS = ("debug", "info", "warning", "error", "critical")

_OWN_HANDLERS = ("gunicorn.error", "gunicorn.access")
_TALKATIVE = ("aiohttp", "alembic", "httpcore", "httpx", "psycopg", "sqlalchemy")
"""At info or debug they write URLs, headers or SQL with its parameters, and with them secrets, payloads, noise."""


def configure_logging(log_format: str | None = None, level: str = "info") -> None:
    """
    Set up structlog and `logging` for this process; calling it again replaces what was there.

    Each line carries the time (ISO 8601, UTC), the level, the logger and what `structlog.contextvars` holds, such as
    the ids of the request and of its trace. Exceptions are written without the values of local variables.

    Args:
        log_format: `json`, one object a line; `console`, for people; None: console where stderr is a terminal.
        level: One of LEVELS, in either case.

    Raises:
        ConfigurationError: The format or the level is unknown.
    """
    chosen = _chosen_format(log_format)
    logging.config.dictConfig(logging_config(chosen, level))
    logging.captureWarnings(True)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(_level_number(level)),
        cache_logger_on_first_use=True,
        **_shortest_way(chosen),
    )


def logging_config(log_format: str | None = None, level: str = "info") -> dict[str, Any]:
    """
    The same as a dictionary for `logging.config`; gunicorn's `logconfig_dict` takes it, for its own process.

    Raises:
        ConfigurationError: The format or the level is unknown.
    """
    chosen = _chosen_format(log_format)
    lowest = _level_number(level)
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": _formatter, "log_format": chosen}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}},
        "root": {"handlers": ["stderr"], "level": lowest},
        "loggers": {
            **{name: {"handlers": [], "propagate": True, "level": lowest} for name in _OWN_HANDLERS},
            **{name: {"level": max(lowest, logging.WARNING)} for name in _TALKATIVE},
            "asyncio": {"level": max(lowest, logging.INFO)},
        },
    }


def _chosen_format(log_format: str | None) -> LogFormat:
    if log_format is None:
        return "console" if sys.stderr.isatty() else "json"
    if log_format not in FORMATS:
        raise ConfigurationError(f"EXTERNAL_AGENTS_LOG_FORMAT must be one of {', '.join(FORMATS)}, not {log_format!r}")
    return cast(LogFormat, log_format)


def _level_number(level: str) -> int:
    if level.lower() not in LEVELS:
        raise ConfigurationError(f"EXTERNAL_AGENTS_LOG_LEVEL must be one of {', '.join(LEVELS)}, not {level!r}")
    return logging.getLevelNamesMapping()[level.upper()]


def _shortest_way(log_format: LogFormat) -> dict[str, Any]:
    """For structlog's own lines. As JSON they are what they would be by way of `logging`, in half of the time."""
    if log_format == "json":
        return {"processors": [*_every_line(), *_as_json()], "logger_factory": partial(_LineLogger, sys.stderr)}
    processors = [*_every_line(), structlog.stdlib.ProcessorFormatter.wrap_for_formatter]
    return {"processors": processors, "logger_factory": structlog.stdlib.LoggerFactory()}


class _LineLogger(structlog.WriteLogger):
    def __init__(self, stream: TextIO, name: str = "root") -> None:
        super().__init__(stream)
        self.name = name


def _every_line() -> list[Processor]:
    return [
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.contextvars.merge_contextvars,
        merge_request_ids,
    ]


def _formatter(log_format: LogFormat) -> logging.Formatter:
    render: list[Processor]
    if log_format == "json":
        render = _as_json()
    else:
        colors = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        # The default formatter of exceptions shows local variables wherever rich is installed.
        plain = structlog.dev.plain_traceback
        render = [_visible, structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_every_line(),
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        use_get_message=True,
    )


def _as_json() -> list[Processor]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=_json)]


def _json(event: EventDict, **_: object) -> str:
    try:
        return orjson.dumps(event, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # Lone surrogates, integers over 64 bits.
        return json.dumps(event, default=repr)


def _visible(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """Nobody's input steers the terminal: control characters are written as escapes."""
    return {key: _escaped(value) if isinstance(value, str) else value for key, value in event.items()}


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
