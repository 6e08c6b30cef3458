"""`external-agents invoke` and `external-agents invocations …`"""

from __future__ import annotations

from typing import Annotated

import typer

from external_agents.adapters.rest.representations import invocation_json, invocation_page_json
from external_agents.cli.context import (
    AgentArgument,
    JsonOption,
    OrgOption,
    operator_of,
    parse_id,
    read_document,
    with_installation,
)
from external_agents.cli.output import complain, note, show_fields, show_json, show_table
from external_agents.domain.invocation import ErrorCode, ExternalAgentInvocation, InvocationStatus
from external_agents.domain.json_values import JsonText
from external_agents.settings import variable_of

app = typer.Typer(help="The record of invocations: list, show.", no_args_is_help=True)


def invoke(
    agent: AgentArgument,
    org: OrgOption,
    payload: Annotated[
        str | None,
        typer.Argument(metavar="JSON|@FILE|-", help="What the agent is sent; stdin by default.", show_default=False),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="With the key of an earlier invocation, and equal JSON, within 24 h: print its answer again instead.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Invoke an agent and print its answer (with --json: the whole record).

    Example: external-agents invoke 019aa0f2-… --org acme '{"question": "How is the weather?"}'
    """
    agent_id, body = parse_id(agent, "AGENT"), JsonText.parse(read_document(payload))
    invoked = with_installation(
        lambda installation: installation.service.invoke(
            operator_of(org), agent_id, body, idempotency_key=idempotency_key
        )
    )
    invocation = invoked.invocation
    if invoked.replayed:
        note(f"this is the answer of invocation {invocation.id} again; the agent was not called.")
    if as_json:
        show_json(invocation_json(invocation))
    elif invocation.response is not None:
        print(invocation.response.text)
    if invocation.status is not InvocationStatus.SUCCEEDED:
        refused = invocation.error_code is ErrorCode.EGRESS_REFUSED
        mend = f" {variable_of('egress_allow')} of this very command counts." if refused else ""
        complain(
            f"the invocation ended as {invocation.status} ({invocation.error_code}): {invocation.error_message}{mend}"
        )
        raise typer.Exit(1)


@app.command("list")
def list_invocations(
    org: OrgOption,
    agent: Annotated[str | None, typer.Option(metavar="AGENT", help="Of this agent only.")] = None,
    status: Annotated[str | None, typer.Option(help="Such as failed.")] = None,
    since: Annotated[str | None, typer.Option(help="RFC 3339 with an offset, inclusive.")] = None,
    until: Annotated[str | None, typer.Option(help="RFC 3339 with an offset, exclusive.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    cursor: Annotated[str | None, typer.Option(help="The next_cursor of the page before.")] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Invocations, newest first.

    Example: external-agents invocations list --org acme --status failed --since 2026-01-31T00:00:00Z
    """
    agent_id = None if agent is None else parse_id(agent, "--agent")
    found = with_installation(
        lambda installation: installation.service.list_invocations(
            operator_of(org), agent_id, status=status, since=since, until=until, limit=limit, cursor=cursor
        )
    )
    if as_json:
        show_json(invocation_page_json(found))
        return
    show_table(("id", "agent", "status", "created", "ms", "cost"), map(_row, found.items))
    if found.next_cursor:
        note(f"more with --cursor {found.next_cursor}")


@app.command("show")
def show(
    agent: AgentArgument,
    invocation: Annotated[str, typer.Argument(metavar="INVOCATION", help="The invocation's id.", show_default=False)],
    org: OrgOption,
    as_json: JsonOption = False,
) -> None:
    """
    One invocation, with what was sent and what came back.

    Example: external-agents invocations show 019aa0f2-… 019aa0f3-… --org acme
    """
    agent_id, invocation_id = parse_id(agent, "AGENT"), parse_id(invocation, "INVOCATION")
    found = with_installation(
        lambda installation: installation.service.get_invocation(operator_of(org), agent_id, invocation_id)
    )
    _show(found, as_json=as_json)


def _row(invocation: ExternalAgentInvocation) -> tuple[str, ...]:
    return (
        str(invocation.id),
        str(invocation.external_agent_id),
        invocation.status,
        invocation.created_at.isoformat(timespec="seconds"),
        "" if invocation.execution_time_ms is None else str(invocation.execution_time_ms),
        "" if invocation.cost is None else str(invocation.cost),
    )


def _show(invocation: ExternalAgentInvocation, *, as_json: bool) -> None:
    fields = invocation_json(invocation)
    if as_json:
        show_json(fields)
    else:
        show_fields(fields)
