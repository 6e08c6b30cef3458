"""All commands under one name, and how each of them ends: 0 done, 1 failed, 2 wrong usage; never a traceback."""

from __future__ import annotations

import logging
from typing import Any

import typer

from external_agents.cli import agents, check, invocations, keys, migrate, serve
from external_agents.cli.output import complain
from external_agents.domain.errors import ExternalAgentsError, Unavailable, ValidationError

WRONG_USAGE = 2
INTERRUPTED = 130

_log = logging.getLogger(__name__)

# typer carries a click of its own since 0.26 and stood on the package click before; it exports this class in neither.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="external-agents",
    help="Register agents that live elsewhere, and invoke them under control.\n\nExample: external-agents serve --dev",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.serve)
app.command("migrate")(migrate.migrate)
app.add_typer(keys.app, name="keys")
app.add_typer(agents.app, name="agents")
app.command("invoke")(invocations.invoke)
app.add_typer(invocations.app, name="invocations")
app.command("check")(check.check)


def run(arguments: list[str] | None = None) -> int:
    """Carry out one command line. Returns the exit status."""
    try:
        status = app(arguments, standalone_mode=False)
    except _UsageError as error:
        _complain_of_usage(error)
        return WRONG_USAGE
    except typer.Exit as done:
        return done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except ValidationError as invalid:
        for fault in invalid.errors:
            complain(str(fault))
        return 1
    except Unavailable as outage:
        complain(f"{outage} {_cause_of(outage)} `external-agents check` tells what is missing.")
        return 1
    except ExternalAgentsError as error:
        complain(str(error))
        return 1
    except BrokenPipeError:
        return 1
    except Exception as error:
        _log.debug("unexpected", exc_info=True)
        complain(f"Unexpected {type(error).__name__}; EXTERNAL_AGENTS_LOG_LEVEL=debug shows where.")
        return 1
    return status if isinstance(status, int) else 0


def _complain_of_usage(error: Any) -> None:
    if message := error.format_message():  # Without one, the help has been shown.
        command = error.ctx.command_path if error.ctx else app.info.name
        complain(f"{message.rstrip('.')}. See {command} --help")


def _cause_of(outage: Unavailable) -> str:
    """What the driver said; it names hosts and ports, which the operator may see, and no password."""
    driver_error = getattr(outage.__cause__, "orig", outage.__cause__)
    return f"({driver_error})" if driver_error else ""
