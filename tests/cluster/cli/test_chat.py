"""Both clients of `moesaic chat` against real small servers, behind a proxy that nobody may ask."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest

from cluster.cli.chat import AnswerTooLongError, ChatClient, ChatError, GrpcChatClient, HttpChatClient, Limits, Message
from cluster.launch.door_trust import DoorTrust
from serving.proto import inference_pb2 as pb
from serving.proto.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server
from serving.tls.contexts import server_context
from tests.certificates import Authority, Issued
from tests.counting_proxy import CountingProxy

# Everything that some line splitter takes for the end of a line, inside one chunk.
HOSTILE = "a\u2028b\u2029c\u0085d\u000be\u000cf\u001cg\u001dh\u001ei\nj"
QUESTION = [Message("user", "say it")]


def event(content: object) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def chunk(text: str, finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]})


ANSWER = [chunk(HOSTILE), b": a comment\r\n\r\n", chunk("日本").replace(b"\n", b"\r\n"),
          chunk("", "length"), event({"choices": [], "usage": {"completion_tokens": 7}}), b"data: [DONE]\n\n"]


class Door(BaseHTTPRequestHandler):
    """Streams ANSWER in pieces that end in the middle of letters; refuses more than 100 tokens."""

    protocol_version = "HTTP/1.1"
    answer = ANSWER

    def do_GET(self) -> None:
        self._reply(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body.get("max_tokens", 0) > 100:
            self._reply(400, {"error": {"message": "too long", "code": "context_length_exceeded"}})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        whole = b"".join(self.answer)
        for start in range(0, len(whole), 5):
            piece = whole[start:start + 5]
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def _reply(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Servicer(InferenceServicer):     # type: ignore[misc]
    def ListModels(self, request: pb.ListModelsRequest, context: grpc.ServicerContext) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[pb.Model(name="tiny")])

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        if request.sampling.max_tokens > 100:
            context.set_trailing_metadata((("error-code", "context_length_exceeded"),))
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "too long")
        yield pb.GenerateResponse(text=HOSTILE)
        yield pb.GenerateResponse(text="日本", finish_reason="length", usage=pb.Usage(completion_tokens=7))


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingProxy]:
    proxy = CountingProxy()
    for name, value in proxy.variables.items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.close()


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def identity(request: pytest.FixtureRequest) -> Issued | None:
    return Authority().issue("llm.example") if request.param else None


@pytest.fixture
def trust(identity: Issued | None, tmp_path: Path) -> DoorTrust | None:
    return identity and DoorTrust(identity.write(tmp_path)[0])


@pytest.fixture
def http_address(identity: Issued | None) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Door) as server:
        if identity is not None:
            tls = server_context(identity.certificate, identity.key)
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def grpc_address(identity: Issued | None) -> Iterator[str]:
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        add_InferenceServicer_to_server(Servicer(), server)
        port = server.add_insecure_port("127.0.0.1:0") if identity is None else server.add_secure_port(
            "127.0.0.1:0", grpc.ssl_server_credentials([(identity.key, identity.certificate)]))
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, proxy: CountingProxy, trust: DoorTrust | None) -> ChatClient:
    if request.param == "http":
        return HttpChatClient(request.getfixturevalue("http_address"), trust=trust)
    return GrpcChatClient(request.getfixturevalue("grpc_address"), trust=trust)


def test_every_letter_comes_through_and_nothing_passes_the_proxy(client: ChatClient, proxy: CountingProxy) -> None:
    pieces = list(client.answer(QUESTION, Limits(10, 0.0)))
    assert "".join(piece.text for piece in pieces) == HOSTILE + "日本"
    assert pieces[-1].num_tokens == 7 and pieces[-1].finish_reason == "length"
    assert proxy.asked == []


def test_an_answer_that_does_not_fit_is_an_error_of_its_own(client: ChatClient) -> None:
    with pytest.raises(AnswerTooLongError, match="too long"):
        list(client.answer(QUESTION, Limits(512)))


@pytest.mark.parametrize(("answer", "says"), [
    ([b"data: {\n\n"], "not JSON"),
    ([chunk("a"), event({"error": {"message": "the shard is gone"}})], "the shard is gone")])
def test_what_is_no_answer_is_named(http_address: str, trust: DoorTrust | None, monkeypatch: pytest.MonkeyPatch,
                                    answer: list[bytes], says: str) -> None:
    monkeypatch.setattr(Door, "answer", answer)
    with pytest.raises(ChatError, match=says):
        list(HttpChatClient(http_address, trust=trust).answer(QUESTION, Limits()))


@pytest.mark.parametrize("identity", [None])
def test_a_plain_door_is_no_door_with_tls(http_address: str, grpc_address: str, tmp_path: Path) -> None:
    certificate, key = Authority().issue("llm.example").write(tmp_path)
    for client in (HttpChatClient(http_address, trust=DoorTrust(certificate)),
                   GrpcChatClient(grpc_address, trust=DoorTrust(certificate)),
                   HttpChatClient(http_address, trust=DoorTrust(key))):
        with pytest.raises(ChatError, match="see `moesaic status`"):
            list(client.answer(QUESTION, Limits()))
    Path(certificate).write_text("-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n")
    with pytest.raises(ChatError, match="is no certificate"):
        list(GrpcChatClient(grpc_address, trust=DoorTrust(certificate)).answer(QUESTION, Limits()))


@pytest.mark.parametrize("client", [HttpChatClient("127.0.0.1:9"), GrpcChatClient("127.0.0.1:9"),
                                    HttpChatClient("not a host"), HttpChatClient("")])
def test_nobody_there_is_named(client: ChatClient) -> None:
    with pytest.raises(ChatError, match="moesaic status"):
        list(client.answer(QUESTION, Limits()))
