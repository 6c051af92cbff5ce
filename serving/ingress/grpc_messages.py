"""Translate between moesaic.v1 messages and our own values."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.json_format import MessageToDict
from pydantic import ValidationError

from model.step import TokenLogprob
from serving.errors import InvalidRequestError
from serving.ingress.build_request import SamplingFields, chat_message, invalid_request
from serving.ingress.collect import UsageCount
from serving.ingress.prompts import Conversation, Prompt, Text, TokenIds
from serving.proto import inference_pb2 as pb
from serving.router.generation import GenerationDelta, ModelCard

_OPTIONAL = ("n", "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "presence_penalty",
             "frequency_penalty", "repetition_penalty", "seed", "skip_special_tokens", "prompt_logprobs")


def to_fields(sampling: pb.Sampling) -> SamplingFields:
    """Return what the client said. Raises InvalidRequestError for NaN and infinity."""
    given = {name: getattr(sampling, name) for name in _OPTIONAL if sampling.HasField(name)}
    try:
        return SamplingFields(
            **given, logit_bias={str(token_id): bias for token_id, bias in sampling.logit_bias.items()},
            stop=list(sampling.stop), stop_token_ids=list(sampling.stop_token_ids), ignore_eos=sampling.ignore_eos,
            include_stop_str_in_output=sampling.include_stop_str_in_output)
    except ValidationError as error:
        raise invalid_request(error) from None


def num_logprobs(sampling: pb.Sampling) -> int | None:
    return sampling.logprobs if sampling.HasField("logprobs") else None


def to_prompt(request: pb.GenerateRequest) -> Prompt:
    """Return the prompt. Raises InvalidRequestError when there is none."""
    match request.WhichOneof("prompt"):
        case "text":
            return Text(request.text)
        case "token_ids":
            return TokenIds(tuple(request.token_ids.ids))
        case "chat":
            return to_conversation(request.chat)
        case _:
            raise InvalidRequestError("the request has no prompt", fix="set text, token_ids or chat", param="prompt")


def to_tokenize_prompt(request: pb.TokenizeRequest) -> Conversation | Text:
    """Return the prompt. Raises InvalidRequestError when there is none."""
    match request.WhichOneof("prompt"):
        case "text":
            return Text(request.text, request.add_special_tokens if request.HasField("add_special_tokens") else True)
        case "chat":
            if request.add_special_tokens:
                raise InvalidRequestError("a chat template writes its own special tokens", param="add_special_tokens",
                                          fix="leave add_special_tokens out")
            return to_conversation(request.chat)
        case _:
            raise InvalidRequestError("the request has no prompt", fix="set text or chat", param="prompt")


def to_conversation(chat: pb.Chat) -> Conversation:
    """Return the chat. Raises InvalidRequestError."""
    messages = tuple(chat_message(message.role, message.content, param=f"chat.messages[{index}]")
                     for index, message in enumerate(chat.messages))
    try:
        variables = MessageToDict(chat.chat_template_kwargs)
    except ValueError as error:     # protobuf's numbers may be NaN or infinite, JSON's may not
        raise InvalidRequestError(f"chat_template_kwargs is not JSON: {error}", fix="send finite numbers",
                                  param="chat.chat_template_kwargs") from None
    return Conversation(messages, variables=variables)


def to_response(delta: GenerationDelta, request_id: str) -> pb.GenerateResponse:
    response = pb.GenerateResponse(
        request_id=request_id, choice=delta.choice, text=delta.text, token_ids=delta.token_ids,
        logprobs=_logprobs(delta.logprobs), prompt_logprobs=_logprobs(delta.prompt_logprobs),
        finish_reason="" if delta.finish_reason is None else delta.finish_reason.value)
    if isinstance(delta.stop_reason, str):
        response.stop_string = delta.stop_reason
    elif delta.stop_reason is not None:
        response.stop_token_id = delta.stop_reason
    return response


def to_usage(usage: UsageCount) -> pb.Usage:
    return pb.Usage(prompt_tokens=usage.num_prompt_tokens, completion_tokens=usage.num_generated_tokens,
                    cached_tokens=usage.num_cached_tokens)


def to_model(card: ModelCard) -> pb.Model:
    return pb.Model(name=card.name, max_model_len=card.max_model_len, created=card.created_s)


def _logprobs(logprobs: Iterable[TokenLogprob]) -> list[pb.Logprob]:
    return [pb.Logprob(token_id=scored.token_id, logprob=scored.logprob,
                       top=[pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in scored.top])
            for scored in logprobs]
