"""Agents and invocations over their lives, beside a model of a few fields."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from external_agents import (
    AgentInactive,
    AgentNotFound,
    AgentStatus,
    ExternalAgentsError,
    IllegalTransition,
    InvocationStatus,
    Principal,
    StaleVersion,
    ValidationError,
)
from external_agents.adapters.memory import MemoryStore, memory_service
from external_agents.domain.invocation import ENDED, ExternalAgentInvocation
from external_agents.testing.builders import (
    ALL_PERMISSIONS,
    answered,
    conclude,
    make_agent,
    make_finished_call,
    refused,
)
from external_agents.testing.fakes import FakeClock, ScriptedTransport, SequentialIds

ALICE = Principal("acme", "alice", ALL_PERMISSIONS)


class AgentLife(RuleBasedStateMachine):
    """One agent through the service: status, version, and what was invoked."""

    @initialize(status=st.sampled_from(["active", "inactive"]))
    def begin(self, status: str) -> None:
        self.runner = asyncio.Runner()
        self.clock, self.transport = FakeClock(), ScriptedTransport()
        self.service = memory_service(
            self.transport, store=MemoryStore(), clock=self.clock, ids=SequentialIds(self.clock)
        )
        document = {
            "name": "x",
            "provider": "custom",
            "webhook_url": "https://agent.example.com/",
            "auth_type": "none",
            "max_attempts": 1,
            "status": status,
        }
        self.id = self.run(self.service.create_agent(ALICE, document)).id
        self.status, self.version, self.invocations = status, 1, 0

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def refused_with(self, error: type[ExternalAgentsError], work: Any) -> None:
        with pytest.raises(error):
            self.run(work)

    @rule(status=st.sampled_from(["active", "inactive", "deleted", "gone"]))
    def set_status(self, status: str) -> None:
        call = self.service.update_agent(ALICE, self.id, {"status": status})
        if self.status == "deleted":
            self.refused_with(AgentNotFound, call)
        elif status in {"deleted", "gone"}:
            self.refused_with(ValidationError, call)
        else:
            assert self.run(call).status == status
            self.status, self.version = status, self.version + 1

    @rule(offset=st.integers(-1, 1))
    def rename_if(self, offset: int) -> None:
        call = self.service.update_agent(ALICE, self.id, {"name": "y"}, if_version=[self.version + offset])
        if self.status == "deleted":
            self.refused_with(AgentNotFound, call)
        elif offset:
            self.refused_with(StaleVersion, call)
        else:
            self.run(call)
            self.version += 1

    @rule(succeeds=st.booleans())
    def invoke(self, succeeds: bool) -> None:
        self.transport.otherwise = answered() if succeeds else refused()
        call = self.service.invoke_agent(ALICE, self.id, None)
        if self.status == "deleted":
            self.refused_with(AgentNotFound, call)
        elif self.status == "inactive":
            self.refused_with(AgentInactive, call)
        else:
            assert self.run(call).status == ("succeeded" if succeeds else "failed")
            self.invocations += 1

    @rule()
    def delete(self) -> None:
        call = self.service.delete_agent(ALICE, self.id)
        if self.status == "deleted":
            self.refused_with(AgentNotFound, call)
        else:
            self.run(call)
            self.status, self.version = "deleted", self.version + 1

    @invariant()
    def what_is_seen_agrees(self) -> None:
        if not hasattr(self, "status"):
            return
        if self.status == "deleted":
            self.refused_with(AgentNotFound, self.service.get_agent(ALICE, self.id))
        else:
            agent = self.run(self.service.get_agent(ALICE, self.id))
            assert (agent.status, agent.version) == (self.status, self.version)
        for status in AgentStatus:
            assert self.run(self.service.list_agents(ALICE, status=status)).total == (status == self.status)
        page = self.run(self.service.list_invocations(ALICE, self.id, limit=100))
        assert len(page.items) == len(self.transport.requests) == self.invocations

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.close()


AgentLife.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestAgentLife = AgentLife.TestCase


@given(st.lists(st.sampled_from(list(AgentStatus)), max_size=6), st.sampled_from(list(AgentStatus)))
def test_nothing_comes_back_from_deletion(wanted: list[AgentStatus], start: AgentStatus) -> None:
    agent = make_agent(status=start)
    for status in wanted:
        try:
            changed = agent.changed({"status": status}, by="x", at=agent.created_at)
        except IllegalTransition:
            assert agent.is_deleted
            assert status is not AgentStatus.DELETED
            continue
        assert not agent.is_deleted or changed.is_deleted
        assert (changed.status, changed.version) == (status, agent.version + 1)
        agent = changed


@given(st.sampled_from(list(InvocationStatus)), st.sampled_from(["succeed", "fail", "interrupt"]))
def test_only_a_running_invocation_ends_and_it_ends_once(status: InvocationStatus, way: str) -> None:
    invocation = make_finished_call(make_agent(), status=status, completed_at=None)

    def end(invocation: ExternalAgentInvocation) -> ExternalAgentInvocation:
        if way == "interrupt":
            return invocation.interrupted(invocation.created_at)
        return conclude(invocation, answered() if way == "succeed" else refused())

    if status is not InvocationStatus.RUNNING:
        with pytest.raises(IllegalTransition):
            end(invocation)
        return
    ended = end(invocation)
    assert ended.status in ENDED
    assert ended.completed_at is not None
    with pytest.raises(IllegalTransition):
        end(ended)
