"""Chat clients: each streams the next message of a conversation over one of the service's doors."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import grpc
import httpx
from httpx_sse import EventSource, SSEError

from cluster.launch.door_trust import DoorTrust
from serving.errors import ServingError
from serving.link.channel_options import DIRECT

CONNECT_TIMEOUT_S = 10.0
TOKEN_TIMEOUT_S = 300.0
_TOO_LONG = "context_length_exceeded"


class ChatError(ServingError):
    """The service cannot be reached, or refused."""


class AnswerTooLongError(ChatError):
    """The prompt and max_tokens do not fit into the model's context together."""


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Limits:
    """An answer may be so long and so varied. None leaves it to the service."""

    max_tokens: int | None = None
    temperature: float | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Holds some text of the answer; the last piece has none, but says how many tokens it took and why it ended."""

    text: str = ""
    num_tokens: int | None = None
    finish_reason: str = ""


class ChatClient(Protocol):
    name: str

    def answer(self, messages: list[Message], limits: Limits) -> Iterator[Piece]:
        """Stream the assistant's next message. Raises ChatError."""


class HttpChatClient:
    """Speaks the OpenAI-compatible API, as any client would."""

    name = "HTTP"

    def __init__(self, address: str, api_key: str | None = None, trust: DoorTrust | None = None) -> None:
        """`trust`: how the door is known that speaks TLS; None: it is plain."""
        scheme = "http" if trust is None else "https"
        self._url = f"{scheme}://{address}/v1/chat/completions"
        self._models_url = f"{scheme}://{address}/v1/models"
        self._trust = trust
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def answer(self, messages: list[Message], limits: Limits) -> Iterator[Piece]:
        timeout = httpx.Timeout(TOKEN_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        try:
            # trust_env: a proxy of the environment is for the world outside.
            with httpx.Client(headers=self._headers, timeout=timeout, trust_env=False,
                              verify=self._trust.context() if self._trust else True) as client:
                body: dict[str, object] = {
                    "model": self._model(client), "stream": True, "stream_options": {"include_usage": True},
                    "messages": [{"role": message.role, "content": message.content} for message in messages]}
                if limits.max_tokens is not None:
                    body["max_tokens"] = limits.max_tokens
                if limits.temperature is not None:
                    body["temperature"] = limits.temperature
                with client.stream("POST", self._url, json=body) as response:
                    if response.status_code != 200:
                        response.read()
                        raise _refused(response)
                    yield from _pieces(response)
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, SSEError) as error:
            raise ChatError(f"no answer from {self._url}: {error or type(error).__name__}",
                            fix="see `moesaic status`") from error

    def _model(self, client: httpx.Client) -> str:
        response = client.get(self._models_url)
        if response.status_code != 200:
            raise _refused(response)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ChatError(f"what answers at {self._models_url} is not this service: {response.text[:200]!r}",
                            fix="give the address of a Moesaic service") from error


def _refused(response: httpx.Response) -> ChatError:
    try:
        error = response.json()["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code = response.text[:500], None
    kind = AnswerTooLongError if code == _TOO_LONG else ChatError
    return kind(f"the service answered {response.status_code}: {message}")


def _pieces(response: httpx.Response) -> Iterator[Piece]:
    """Turn server-sent events into pieces. Their lines end with \\n or \\r\\n only: text may hold other separators."""
    num_tokens, finish_reason = 0, ""
    for event in EventSource(response).iter_sse():
        if event.data == "[DONE]":
            break
        try:
            content = json.loads(event.data)
        except ValueError as error:
            raise ChatError(f"the service sent what is not JSON: {event.data[:200]!r}") from error
        if "error" in content:
            raise ChatError(str(content["error"]["message"]))
        for choice in content["choices"]:
            if choice["delta"].get("content"):
                yield Piece(choice["delta"]["content"])
            finish_reason = choice.get("finish_reason") or finish_reason
        if content.get("usage"):
            num_tokens = int(content["usage"]["completion_tokens"])
    yield Piece(num_tokens=num_tokens, finish_reason=finish_reason)


class GrpcChatClient:
    """Speaks to the gRPC door of one router replica."""

    name = "gRPC"

    def __init__(self, address: str, api_key: str | None = None, trust: DoorTrust | None = None) -> None:
        self._address = address
        self._trust = trust
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()

    def answer(self, messages: list[Message], limits: Limits) -> Iterator[Piece]:
        from serving.proto import inference_pb2 as pb
        from serving.proto.inference_pb2_grpc import InferenceStub

        num_tokens, finish_reason = 0, ""
        try:
            with self._channel() as channel:
                stub = InferenceStub(channel)
                models = stub.ListModels(pb.ListModelsRequest(), metadata=self._metadata, timeout=CONNECT_TIMEOUT_S)
                request = pb.GenerateRequest(
                    model=models.models[0].name,
                    sampling=pb.Sampling(max_tokens=limits.max_tokens, temperature=limits.temperature),
                    chat=pb.Chat(messages=[pb.ChatMessage(role=message.role, content=message.content)
                                           for message in messages]))
                for response in stub.Generate(request, metadata=self._metadata, timeout=TOKEN_TIMEOUT_S):
                    if response.text:
                        yield Piece(response.text)
                    num_tokens = response.usage.completion_tokens or num_tokens
                    finish_reason = response.finish_reason or finish_reason
        except grpc.RpcError as error:
            is_too_long = ("error-code", _TOO_LONG) in (error.trailing_metadata() or ())
            kind = AnswerTooLongError if is_too_long else ChatError
            raise kind(f"gRPC at {self._address}: {error.code().name}: {error.details()}",
                       fix="see `moesaic status`") from error
        yield Piece(num_tokens=num_tokens, finish_reason=finish_reason)

    def _channel(self) -> grpc.Channel:
        """Raises ChatError."""
        if self._trust is None:
            return grpc.insecure_channel(self._address, options=DIRECT)
        try:
            return self._trust.channel(self._address)
        except ValueError as error:
            raise ChatError(f"{self._trust.certificate} is no certificate: {error}", fix="see tls.certificate in the "
                            "config of the service") from error
