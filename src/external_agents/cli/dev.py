"""What `serve --dev` gives a new user: a key, and two pastes to a first answer."""

from __future__ import annotations

import os
from pathlib import Path

from external_agents.bootstrap import home_folder, open_installation
from external_agents.domain.errors import ConfigurationError, Unauthenticated
from external_agents.settings import Settings

DEV_ORG = "dev"
DEV_SUBJECT = "dev"


async def dev_key(settings: Settings, database_url: str) -> str:
    """
    The key kept under HOME, or a new one where it is not there or this database does not know it.

    Raises:
        ConfigurationError: It cannot be kept.
    """
    path = home_folder(settings) / "dev-key"
    async with open_installation(settings, database_url) as installation:
        try:
            kept = path.read_text(encoding="ascii").strip()
            await installation.authenticator.authenticate(kept)
        except (OSError, UnicodeDecodeError, Unauthenticated):
            kept, _ = await installation.api_keys.issue(DEV_ORG, DEV_SUBJECT)
            _keep(path, kept)
        return kept


def first_steps(address: str, key: str) -> str:
    return f"""
For development: agents on this machine are allowed, and there is a key for the organisation `{DEV_ORG}`.
Two pastes to a first answer. An agent, in a terminal of its own:

python3 -c '
from http.server import BaseHTTPRequestHandler, HTTPServer
class Agent(BaseHTTPRequestHandler):
    def do_POST(self):
        said = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{{\\"you said\\": " + said + b"}}")
HTTPServer(("127.0.0.1", 9000), Agent).serve_forever()'

Register it and ask it:

export KEY={key}
AGENT=$(curl -sS {address}/api/external-agents -H "Authorization: Bearer {key}" \\
  -H 'Content-Type: application/json' -d '{{"name": "Echo", "provider": "custom",
  "webhook_url": "http://127.0.0.1:9000/", "auth_type": "none"}}' |
  python3 -c 'import json, sys; print(json.load(sys.stdin)["id"])')
curl -sS {address}/api/external-agents/$AGENT/invoke -H "Authorization: Bearer {key}" \\
  -H 'Content-Type: application/json' -d '{{"hello": "agent"}}'
"""


def _keep(path: Path, key: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{key}\n")
    except OSError as error:
        raise ConfigurationError(f"The key for development cannot be kept in {path}: {error.strerror}.") from None
