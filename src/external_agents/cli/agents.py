"""`external-agents agents …`"""

from __future__ import annotations

from typing import Annotated

import typer

from external_agents.adapters.rest.representations import agent_json, agent_page_json, usage_json
from external_agents.cli.context import (
    AgentArgument,
    JsonOption,
    OrgOption,
    operator_of,
    parse_id,
    read_document,
    with_installation,
)
from external_agents.cli.output import note, show_fields, show_json, show_table
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.json_values import decode

app = typer.Typer(help="Agents: create, list, show, update, delete; and how their limits stand.", no_args_is_help=True)

DocumentArgument = Annotated[
    str | None,
    typer.Argument(metavar="JSON|@FILE|-", help="As the API takes it; stdin by default.", show_default=False),
]


@app.command("create")
def create(org: OrgOption, document: DocumentArgument = None, as_json: JsonOption = False) -> None:
    """
    Register an agent.

    Example: external-agents agents create --org acme @agent.json
    """
    fields = decode(read_document(document))
    agent = with_installation(lambda installation: installation.service.create_agent(operator_of(org), fields))
    _show(agent, as_json=as_json)


@app.command("list")
def list_agents(
    org: OrgOption,
    page: Annotated[int, typer.Option(min=1)] = 1,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    status: Annotated[str | None, typer.Option(help="active, inactive or deleted.")] = None,
    provider: Annotated[str | None, typer.Option(help="Such as teams.")] = None,
    tag: Annotated[str | None, typer.Option()] = None,
    q: Annotated[str | None, typer.Option("--q", help="A part of the name or the description.")] = None,
    as_json: JsonOption = False,
) -> None:
    """
    The agents of an organisation, newest first.

    Example: external-agents agents list --org acme --provider teams
    """
    found = with_installation(
        lambda installation: installation.service.list_agents(
            operator_of(org), page=page, limit=limit, status=status, provider=provider, tag=tag, q=q
        )
    )
    if as_json:
        show_json(agent_page_json(found))
        return
    show_table(
        ("id", "name", "provider", "status", "webhook_url"),
        [(str(agent.id), agent.name, agent.provider, agent.status, agent.webhook_url) for agent in found.items],
    )
    note(f"page {found.page} of {max(1, found.pages)}, {found.total} in all")


@app.command("show")
def show(agent: AgentArgument, org: OrgOption, as_json: JsonOption = False) -> None:
    """
    One agent, without its secrets.

    Example: external-agents agents show 019aa0f2-… --org acme
    """
    agent_id = parse_id(agent, "AGENT")
    found = with_installation(lambda installation: installation.service.get_agent(operator_of(org), agent_id))
    _show(found, as_json=as_json)


@app.command("update")
def update(
    agent: AgentArgument, org: OrgOption, document: DocumentArgument = None, as_json: JsonOption = False
) -> None:
    """
    Change an agent by a JSON merge patch; secrets that are left out are kept.

    Example: external-agents agents update 019aa0f2-… --org acme '{"status": "inactive"}'
    """
    agent_id, patch = parse_id(agent, "AGENT"), decode(read_document(document))
    changed = with_installation(
        lambda installation: installation.service.update_agent(operator_of(org), agent_id, patch)
    )
    _show(changed, as_json=as_json)


@app.command("delete")
def delete(agent: AgentArgument, org: OrgOption) -> None:
    """
    Mark an agent as deleted; its record and its invocations stay.

    Example: external-agents agents delete 019aa0f2-… --org acme
    """
    agent_id = parse_id(agent, "AGENT")
    with_installation(lambda installation: installation.service.delete_agent(operator_of(org), agent_id))
    note(f"agent {agent_id} is deleted.")


@app.command("usage")
def usage(agent: AgentArgument, org: OrgOption, as_json: JsonOption = False) -> None:
    """
    How an agent's rate limits and its budget stand.

    Example: external-agents agents usage 019aa0f2-… --org acme
    """
    agent_id = parse_id(agent, "AGENT")
    found = with_installation(lambda installation: installation.service.get_usage(operator_of(org), agent_id))
    if as_json:
        show_json(usage_json(found))
    else:
        show_fields({**usage_json(found)["rate_limit"], "budget": usage_json(found)["budget"]})


def _show(agent: ExternalAgent, *, as_json: bool) -> None:
    fields = agent_json(agent)
    if as_json:
        show_json(fields)
    else:
        show_fields(fields)
