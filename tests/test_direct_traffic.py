"""Our own parts reach each other past the user's proxy; only what fetches from hubs obeys it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
HUBS = ("cluster/device/",)
CLIENTS = {
    "insecure_channel": "options", "secure_channel": "options",     # of serving/link/channel_options.py
    "httpx.Client": "trust_env", "httpx.AsyncClient": "trust_env", "httpx.get": "trust_env", "httpx.post": "trust_env",
    "httpx.stream": "trust_env"}


def calls_of_clients() -> Iterator[tuple[str, str, set[str | None]]]:
    """File and line, name of the client, names of its arguments."""
    for folder in ("cluster", "serving", "model", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            where = str(path.relative_to(ROOT))
            if where.startswith(HUBS) or where.endswith(("_pb2.py", "_pb2_grpc.py")):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    name = ast.unparse(node.func)
                    known = next((client for client in CLIENTS if name == client or name.endswith(f".{client}")), None)
                    if known is not None:
                        yield f"{where}:{node.lineno}", known, {keyword.arg for keyword in node.keywords}


def test_every_client_of_our_own_says_that_it_goes_past_the_proxy() -> None:
    calls = list(calls_of_clients())
    assert len(calls) >= 6
    assert [(where, name) for where, name, arguments in calls if CLIENTS[name] not in arguments] == []
