"""What schemathesis cannot read from the document: values of our own formats, and an agent that is there."""

from __future__ import annotations

import base64
import os
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis import Case, HookContext

AGENT_URL = os.environ["FUZZ_AGENT_URL"]

_VISIBLE = st.characters(min_codepoint=0x21, max_codepoint=0x7E)
_PRINTABLE = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=50)

schemathesis.openapi.format("uri", st.just(AGENT_URL))
schemathesis.openapi.format("header-name", st.from_regex(r"X-Fuzz-[A-Za-z0-9]{1,20}", fullmatch=True))
schemathesis.openapi.format("header-value", st.text(_VISIBLE, min_size=1, max_size=50))
schemathesis.openapi.format("user-id", _PRINTABLE.filter(lambda text: ":" not in text))
schemathesis.openapi.format("printable", _PRINTABLE)
schemathesis.openapi.format(
    "signing-secret", st.binary(min_size=24, max_size=64).map(lambda key: "whsec_" + base64.b64encode(key).decode())
)
schemathesis.openapi.format("amount", st.from_regex(r"[1-9][0-9]{0,11}(\.[0-9]{1,9})?", fullmatch=True))


@schemathesis.hook
def before_call(context: HookContext, case: Case, kwargs: dict[str, Any]) -> None:
    """What the document's schemas leave open: hosts that are there to be invoked, and amounts of nine decimals."""
    if not isinstance(case.body, dict):
        return
    if "example.com" in str(case.body.get("webhook_url")):
        case.body["webhook_url"] = AGENT_URL
    budget = case.body.get("budget_config")
    if isinstance(budget, dict):
        for name, amount in budget.items():
            if isinstance(amount, float) and amount > 0:
                budget[name] = round(amount, 9)
