"""Writes k8s/chart/values.schema.json: the values of the chart, the config of serving/config.py, types of Kubernetes.

Run it as `python k8s/make_schema.py` after a change of the config or of k8s/values.schema.yaml.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import yaml

K8S = Path(__file__).parent
sys.path.insert(0, str(K8S.parent))

from serving.config import ServeConfig  # noqa: E402     # run as a script, nothing of this tree is on the path

KUBERNETES_VERSION = "1.35.0"
_TYPES = (Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{KUBERNETES_VERSION}-local-strict"
          / "_definitions.json")
_REF = "#/$defs/"


def make_schema() -> dict[str, object]:
    """Return the schema; of Kubernetes' types those that it refers to."""
    schema: dict[str, object] = yaml.safe_load((K8S / "values.schema.yaml").read_text(encoding="utf-8"))
    known = json.loads(_TYPES.read_text(encoding="utf-8"))["$defs"] | schema["$defs"] | _config_types()
    wanted = dict.fromkeys(_references(schema["properties"]))
    for name in wanted_in_order(wanted, known):
        wanted[name] = _without_descriptions(known[name])
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema, "$defs": dict(sorted(wanted.items()))}


def wanted_in_order(first: dict[str, object], known: dict[str, object]) -> list[str]:
    """Return the names of the types that are needed, those that other types need too."""
    found, new = list(first), list(first)
    while new:
        more = [name for name in _references(known[new.pop()]) if name not in found]
        found += dict.fromkeys(more)
        new += dict.fromkeys(more)
    return found


def _config_types() -> dict[str, object]:
    """Return the types of the config, without the keys that the chart sets or that have no use in it."""
    whole = ServeConfig.model_json_schema()
    types: dict[str, dict[str, dict[str, dict[str, object]]]] = whole.pop("$defs")
    for key in ("local_nodes", "tls", "cluster_tls"):
        del whole["properties"][key]
    del types["PoolConfig"]["properties"]["resources"], types["RouterConfig"]["properties"]["resources"]
    for port in (whole["properties"]["http_port"], types["RouterConfig"]["properties"]["grpc_port"]):
        port["minimum"] = 1     # Services need to know it
    return {"ServeConfig": whole, **types}


def _references(part: object) -> Iterator[str]:
    values = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    if isinstance(part, dict) and isinstance(part.get("$ref"), str):
        yield part["$ref"].removeprefix(_REF)
    for value in values:
        yield from _references(value)


def _without_descriptions(part: object) -> object:
    if isinstance(part, dict):
        return {key: _without_descriptions(value) for key, value in part.items()
                if key not in ("title", "description") or not isinstance(value, str)}
    return [_without_descriptions(value) for value in part] if isinstance(part, list) else part


def schema_text() -> str:
    return json.dumps(make_schema(), indent=1) + "\n"


if __name__ == "__main__":
    (K8S / "chart" / "values.schema.json").write_text(schema_text(), encoding="utf-8")
