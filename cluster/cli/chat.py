"""`moesaic chat`: a conversation with a running service, over either door, streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import grpc
import httpx

from serving.errors import ServingError

CONNECT_TIMEOUT_S = 10.0
TOKEN_TIMEOUT_S = 300.0


class ChatError(ServingError):
    """The service cannot be reached, or refused."""


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of the answer; the last piece has no text and says how many tokens the answer took."""

    text: str = ""
    num_tokens: int | None = None


class ChatClient(Protocol):
    name: str

    def answer(self, messages: list[Message], max_tokens: int | None, temperature: float | None) -> Iterator[Piece]:
        """Stream the assistant's next message. Raises ChatError."""


class HttpChatClient:
    """The OpenAI-compatible door, as any client would use it."""

    name = "HTTP"

    def __init__(self, address: str, api_key: str | None = None) -> None:
        self._url = f"http://{address}/v1/chat/completions"
        self._models_url = f"http://{address}/v1/models"
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def answer(self, messages: list[Message], max_tokens: int | None, temperature: float | None) -> Iterator[Piece]:
        timeout = httpx.Timeout(TOKEN_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        try:
            with httpx.Client(headers=self._headers, timeout=timeout) as client:
                body: dict[str, object] = {
                    "model": self._model(client), "stream": True, "stream_options": {"include_usage": True},
                    "messages": [{"role": message.role, "content": message.content} for message in messages]}
                if max_tokens is not None:
                    body["max_tokens"] = max_tokens
                if temperature is not None:
                    body["temperature"] = temperature
                with client.stream("POST", self._url, json=body) as response:
                    if response.status_code != 200:
                        response.read()
                        raise _refused(response)
                    yield from _pieces(response.iter_lines())
        except httpx.HTTPError as error:
            raise ChatError(f"no answer from {self._url}: {error}", fix="see `moesaic status`") from error

    def _model(self, client: httpx.Client) -> str:
        response = client.get(self._models_url)
        if response.status_code != 200:
            raise _refused(response)
        return str(response.json()["data"][0]["id"])


def _refused(response: httpx.Response) -> ChatError:
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = response.text[:500]
    return ChatError(f"the service answered {response.status_code}: {message}")


def _pieces(lines: Iterator[str]) -> Iterator[Piece]:
    num_tokens = 0
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise ChatError(str(event["error"]["message"]))
        for choice in event["choices"]:
            if choice["delta"].get("content"):
                yield Piece(choice["delta"]["content"])
        if event.get("usage"):
            num_tokens = int(event["usage"]["completion_tokens"])
    yield Piece(num_tokens=num_tokens)


class GrpcChatClient:
    """The gRPC door of one router replica."""

    name = "gRPC"

    def __init__(self, address: str, api_key: str | None = None) -> None:
        self._address = address
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()

    def answer(self, messages: list[Message], max_tokens: int | None, temperature: float | None) -> Iterator[Piece]:
        from serving.proto import inference_pb2 as pb
        from serving.proto.inference_pb2_grpc import InferenceStub

        num_tokens = 0
        try:
            with grpc.insecure_channel(self._address) as channel:
                stub = InferenceStub(channel)
                models = stub.ListModels(pb.ListModelsRequest(), metadata=self._metadata, timeout=CONNECT_TIMEOUT_S)
                request = pb.GenerateRequest(
                    model=models.models[0].name, sampling=pb.Sampling(max_tokens=max_tokens, temperature=temperature),
                    chat=pb.Chat(messages=[pb.ChatMessage(role=message.role, content=message.content)
                                           for message in messages]))
                for response in stub.Generate(request, metadata=self._metadata, timeout=TOKEN_TIMEOUT_S):
                    if response.text:
                        yield Piece(response.text)
                    num_tokens = response.usage.completion_tokens or num_tokens
        except grpc.RpcError as error:
            raise ChatError(f"gRPC at {self._address}: {error.code().name}: {error.details()}",
                            fix="see `moesaic status`") from error
        yield Piece(num_tokens=num_tokens)
