"""A service with certificates on its doors and links, and keys: chats, a batch and the live page as their users see
them. Its numbers are those of the open service beside it."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import openai
import pytest
import yaml

from serving.proto import inference_pb2 as pb
from serving.proto.inference_pb2_grpc import InferenceStub
from serving.tenants.database import open_database
from serving.tenants.key import Scope
from serving.tenants.key_store import KeyStore
from serving.tls.identity import CLUSTER_NAME
from tests.certificates import Authority
from tests.command_line import moesaic_here
from tests.deadlines import PATIENCE_S
from tests.e2e.conftest import Service, config_of, eventually
from tests.ports import held_port
from tests.serving.tenants.keys import new_key

pytestmark = pytest.mark.multinode
NAME = "locked"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello world"}], "max_tokens": 12, "temperature": 0}
NUM_LINES = 5


@dataclass(frozen=True)
class Locked:
    host: str
    http_port: int
    grpc_port: int
    authority: Path
    secret: str
    database: str

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.http_port}"

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.authority)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.trust(), timeout=PATIENCE_S,
                            headers={"authorization": f"Bearer {self.secret}"})

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.secret, max_retries=0,
                             http_client=httpx.Client(verify=self.trust(), timeout=PATIENCE_S))


def certificates(folder: Path, host: str) -> dict[str, dict[str, str]]:
    """Return the config's `tls` and `cluster_tls`, whose files are written."""
    folder.mkdir()
    config: dict[str, dict[str, str]] = {}
    for name, names in (("tls", (host, "localhost")), ("cluster_tls", (CLUSTER_NAME,))):
        authority = Authority(name)
        (folder / f"{name}.ca").write_bytes(authority.pem)
        config[name] = dict(zip(("certificate", "key"), authority.issue(*names).write(folder, name), strict=True))
    config["cluster_tls"]["ca"] = str(folder / "cluster_tls.ca")
    return config


@pytest.fixture(scope="module")
def locked(service: Service) -> Iterator[Locked]:
    folder, host = service.work_dir / NAME, service.running.grpc_address.rpartition(":")[0]
    tls, database = certificates(folder, host), f"sqlite:///{folder / 'keys.db'}"
    engine = open_database(database)
    key, secret = new_key(scopes=frozenset({Scope.INFER, Scope.STATUS}), tenant="team")
    KeyStore(engine).add(key)
    engine.dispose()
    found = Locked(host, held_port(), held_port(), folder / "tls.ca", secret, database)
    config = config_of(service.checkpoint) | tls | {
        "application": NAME, "route_prefix": f"/{NAME}", "http_port": found.http_port,
        "access": {"keys": True, "database": database}, "router": {"num_cpus": 0.1, "grpc_port": found.grpc_port}}
    path = service.work_dir / f"{NAME}.yaml"
    path.write_text(yaml.safe_dump(config))
    service.ray("deploy", NAME, str(path))
    try:
        with found.http() as http:
            assert eventually(lambda: is_healthy(http))
        yield found
    finally:
        service.ray("delete", NAME)


def is_healthy(http: httpx.Client) -> bool:
    try:
        return http.get("/health").status_code == 200
    except httpx.TransportError:        # the router has yet to open its door
        return False


def test_both_doors_answer_as_the_open_service_does(service: Service, locked: Locked) -> None:
    plain = httpx.post(f"{service.url}/v1/chat/completions", json=BODY, timeout=PATIENCE_S).json()
    expected = plain["choices"][0]["message"]["content"]
    with locked.client() as client:
        chat = client.chat.completions.create(**BODY, stream=True)      # type: ignore[call-overload]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chat) == expected != ""
    credentials = grpc.ssl_channel_credentials(locked.authority.read_bytes())
    asked = pb.GenerateRequest(model="tiny", chat=pb.Chat(messages=[pb.ChatMessage(**BODY["messages"][0])]),  # type: ignore[index]
                               sampling=pb.Sampling(max_tokens=12, temperature=0.0))
    with grpc.secure_channel(f"{locked.host}:{locked.grpc_port}", credentials,
                             options=[("grpc.enable_http_proxy", 0)]) as channel:
        responses = InferenceStub(channel).Generate(
            asked, timeout=PATIENCE_S, metadata=[("authorization", f"Bearer {locked.secret}")])
        assert "".join(response.text for response in responses) == expected


def test_who_has_no_key_or_speaks_in_the_clear_gets_nothing(locked: Locked) -> None:
    with httpx.Client(verify=locked.trust(), timeout=PATIENCE_S) as stranger:
        refused = stranger.post(f"{locked.url}/v1/chat/completions", json=BODY)
        assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{locked.host}:{locked.http_port}/health", timeout=PATIENCE_S)
    with grpc.insecure_channel(f"{locked.host}:{locked.grpc_port}",
                               options=[("grpc.enable_http_proxy", 0)]) as channel:
        with pytest.raises(grpc.RpcError) as closed:
            InferenceStub(channel).ListModels(pb.ListModelsRequest(), timeout=PATIENCE_S)
        assert closed.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_batch_is_answered_as_its_lines_would_be_and_is_on_the_bill(locked: Locked) -> None:
    with locked.client() as client:
        expected = client.chat.completions.create(**BODY).choices[0].message.content        # type: ignore[call-overload]
        lines = [json.dumps({"custom_id": f"id-{number}", "method": "POST", "url": "/v1/chat/completions",
                             "body": BODY}) for number in range(NUM_LINES)]
        file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        assert eventually(lambda: client.batches.retrieve(batch.id).status == "completed", PATIENCE_S)
        output = client.batches.retrieve(batch.id).output_file_id
        assert output is not None
        answers = [json.loads(line) for line in client.files.content(output).text.splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == [f"id-{number}" for number in range(NUM_LINES)]
    texts = [answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers]
    assert texts == [expected] * NUM_LINES

    def num_billed() -> int:
        usage = moesaic_here("usage", "--by", "tenant", "--format", "json", "--database", locked.database)
        assert usage.returncode == 0, usage.stderr
        return sum(int(row["requests"]) for row in json.loads(usage.stdout))
    assert eventually(lambda: num_billed() >= NUM_LINES + 1, PATIENCE_S)


def test_the_live_page_shows_the_group(locked: Locked) -> None:
    until_s, seen = time.monotonic() + PATIENCE_S, ""
    with locked.http() as http, http.stream("GET", "/ui/events") as events:
        assert events.status_code == 200
        for piece in events.iter_text():
            seen += piece
            if all(f'"{node}"' in seen for node in "abc") or time.monotonic() > until_s:
                break
    assert all(f'"{node}"' in seen for node in "abc"), seen
