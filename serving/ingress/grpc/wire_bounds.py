"""The bounds of gRPC messages, which hold before and after protobuf makes objects of them.

protobuf makes 60 bytes of a chat message that is two bytes long, so the fields of a message are counted on the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from serving.errors import InvalidRequestError
from serving.ingress.json_reader import BodyBounds
from serving.proto import inference_pb2 as pb

M = TypeVar("M", pb.GenerateRequest, pb.TokenizeRequest)
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def bounded_reader(kind: type[M], bounds: BodyBounds) -> Callable[[bytes], M | InvalidRequestError]:
    """Return a deserializer. It returns an error, for gRPC tells the client nothing of one that is raised."""
    def read(content: bytes) -> M | InvalidRequestError:
        try:
            _check_number_of_fields(content, kind.DESCRIPTOR, bounds.num_values)
            message: M = kind.FromString(content)
            _check_sizes(message, bounds)
        except InvalidRequestError as error:
            return error
        except (DecodeError, IndexError):
            return InvalidRequestError("the request is no message of this method", fix="use the server's .proto")
        return message
    return read


def _check_number_of_fields(content: bytes, kind: Descriptor, limit: int) -> None:
    """Raise InvalidRequestError when the message, with all that are within it, has more fields than the limit."""
    number = 0
    walk = [(kind, _fields(content, 0, len(content)))]      # messages that are being read, the innermost last
    while walk:
        inside, fields = walk[-1]
        for field, start, end in fields:
            number += 1
            if number > limit:
                raise InvalidRequestError(f"the request has more than {limit} fields", fix=f"send at most {limit}")
            known = inside.fields_by_number.get(field)
            if known is not None and known.message_type is not None:
                walk.append((known.message_type, _fields(content, start, end)))
                break
        else:
            walk.pop()


def _fields(content: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and end of each field. Raises IndexError or DecodeError for what is no message."""
    while at < end:
        tag, at = _varint(content, at)
        wire_type, start = tag & 7, at
        if wire_type == _VARINT:
            _, at = _varint(content, at)
        elif wire_type == _BYTES:
            length, start = _varint(content, at)
            at = start + length
        elif wire_type in (_FIXED64, _FIXED32):
            at += 8 if wire_type == _FIXED64 else 4
        else:
            raise DecodeError(f"wire type {wire_type}")
        yield tag >> 3, start, min(at, end)


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise DecodeError("a number of more than 64 bits")


def _check_sizes(message: pb.GenerateRequest | pb.TokenizeRequest, bounds: BodyBounds) -> None:
    chat = message.chat
    sizes = {"messages": len(chat.messages), "tools": len(chat.tools),
             "messages.tool_calls": max((len(said.tool_calls) for said in chat.messages), default=0)}
    names = {"model": [message.model], "messages.role": [said.role for said in chat.messages],
             "messages.tool_call_id": [said.tool_call_id for said in chat.messages],
             "tool_choice": [chat.tool_choice, chat.called_function]}
    if isinstance(message, pb.GenerateRequest):
        sampling = message.sampling
        sizes |= {"prompt": len(message.token_ids.ids), "stop": len(sampling.stop),
                  "stop_token_ids": len(sampling.stop_token_ids), "logit_bias": len(sampling.logit_bias)}
        names |= {"user": [message.tenant], "request_id": [message.request_id], "stop": list(sampling.stop[:64])}
    for field, size in sizes.items():
        if size > (limit := bounds.fields[field].num_values):
            raise InvalidRequestError(f"{field} has more than {limit} values", fix=f"send at most {limit}", param=field)
    for field, texts in names.items():
        if max(map(len, texts), default=0) > (limit := bounds.fields[field].num_characters):
            raise InvalidRequestError(f"{field} has a string of more than {limit} characters",
                                      fix=f"send at most {limit}", param=field)
