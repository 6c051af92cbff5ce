"""gRPC messages are bounded on the wire and after it."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import InvalidRequestError
from serving.ingress.body_bounds import MAX_BODY_BYTES, body_bounds
from serving.ingress.grpc.wire_bounds import bounded_reader
from serving.proto import inference_pb2 as pb

read = bounded_reader(pb.GenerateRequest, body_bounds(256))


def encode_length(size: int) -> bytes:
    length = b""
    while size > 0x7F:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return length + bytes([size])


def test_a_usual_request_is_read_whole() -> None:
    request = pb.GenerateRequest(
        model="m", chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")] * 4096), tenant="t",
        sampling=pb.Sampling(n=2, temperature=0.5, seed=-3, stop=["a"], logit_bias={5: 1.0}, stop_token_ids=[7]))
    assert read(request.SerializeToString()) == request


@pytest.mark.parametrize(("request_", "says"), [
    (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * 4097)), "messages has more than 4096"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * (2**18 + 1))), "prompt has more than 262144"),
    (pb.GenerateRequest(sampling=pb.Sampling(stop=["a"] * 17)), "stop has more than 16"),
    (pb.GenerateRequest(sampling=pb.Sampling(stop=["a" * 257])), "stop has a string of more than 256"),
    (pb.GenerateRequest(sampling=pb.Sampling(stop_token_ids=[1] * 257)), "stop_token_ids has more than 256"),
    (pb.GenerateRequest(sampling=pb.Sampling(logit_bias=dict.fromkeys(range(1025), 1.0))), "logit_bias has more than"),
    (pb.GenerateRequest(model="m" * 257), "model has a string of more than 256"),
    (pb.GenerateRequest(tenant="m" * 257), "user has a string of more than 256")])
def test_what_is_too_much_is_named(request_: pb.GenerateRequest, says: str) -> None:
    error = read(request_.SerializeToString())
    assert isinstance(error, InvalidRequestError) and says in str(error)


@pytest.mark.parametrize(("field", "piece"), [(4, b"\x0a\x00"), (5, b"\x6a\x00"), (5, b"\x5a\x00"), (5, b"\x70\x01")],
                         ids=["messages", "stops", "biases", "unpacked ids"])
def test_no_message_of_the_largest_size_becomes_many_objects(field: int, piece: bytes) -> None:
    inner = piece * ((MAX_BODY_BYTES - 16) // len(piece))
    content = bytes([field << 3 | 2]) + encode_length(len(inner)) + inner
    tracemalloc.start()
    error = read(content)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(error, InvalidRequestError) and "more than 32768 fields" in str(error)
    assert peak_bytes < 100_000


@pytest.mark.parametrize("piece", [b"\x0a\x02\x08\x00", b"\x0a\x00", b"\x0a\x02\x32\x00"],
                         ids=["nulls", "empty", "lists"])
def test_template_variables_are_counted_wherever_they_are(piece: bytes) -> None:
    inner = piece * (MAX_BODY_BYTES // len(piece) // 2)
    for tag in (0x32, 0x12, 0x0A, 0x12, 0x22):      # list_value, value, fields, chat_template_kwargs, chat
        inner = bytes([tag]) + encode_length(len(inner)) + inner
    error = read(inner)
    assert isinstance(error, InvalidRequestError) and "more than 32768 fields" in str(error)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_message_or_the_clients_error(content: bytes) -> None:
    assert isinstance(read(content), (pb.GenerateRequest, InvalidRequestError))
