"""Translate between moesaic.v1 messages and our own values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from google.protobuf.json_format import MessageToDict
from pydantic import JsonValue, ValidationError

from model.step import TokenLogprob
from serving.errors import InvalidRequestError
from serving.ingress.build_request import Asked, SamplingFields, chat_message, invalid_request
from serving.ingress.chat_answer import ChatAnswer
from serving.ingress.chat_request import ChatQuestion
from serving.ingress.collect import UsageCount
from serving.ingress.prompts import Conversation, Text, TokenIds
from serving.ingress.tools import (
    FunctionBody,
    NamedFunction,
    NamedTool,
    ToolBody,
    ToolUse,
    check_arguments,
    flat_params,
    read_arguments,
    to_tool_use,
)
from serving.proto import inference_pb2 as pb
from serving.router.generation import GenerationDelta, ModelCard
from serving.text.answers.parts import Arguments, CallStart, Content, Reasoning
from serving.text.chat_template import ChatMessage, ToolCall

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


def to_prompt(request: pb.GenerateRequest) -> Text | TokenIds:
    """Return the prompt that is no chat. Raises InvalidRequestError when there is none."""
    match request.WhichOneof("prompt"):
        case "text":
            return Text(request.text)
        case "token_ids":
            return TokenIds(tuple(request.token_ids.ids))
        case _:
            raise InvalidRequestError("the request has no prompt", fix="set text, token_ids or chat", param="prompt")


def to_question(request: pb.GenerateRequest, asked: Asked) -> ChatQuestion:
    """Return the chat. Raises InvalidRequestError and its kinds."""
    return ChatQuestion(asked, to_conversation(request.chat), to_tools(request.chat), to_format(request))


def to_format(request: pb.GenerateRequest) -> dict[str, JsonValue]:
    """Return what the answer must look like, as `grammar_of` takes it."""
    wanted = request.format
    match wanted.WhichOneof("kind"):
        case None:
            return {}
        case "json_schema":
            return {"format": {"json": wanted.json_schema}}
        case "choice":
            return {"format": {"choice": list(wanted.choice.texts)}}
        case kind:
            return {"format": {kind: getattr(wanted, kind)}}


def to_tools(chat: pb.Chat) -> ToolUse:
    """Return what the chat says of tools. Raises InvalidRequestError and its kinds."""
    tools = [ToolBody(type="function", function=FunctionBody(
        name=tool.name, description=tool.description or None, strict=tool.strict,
        parameters=read_arguments(tool.parameters, f"tools[{index}].parameters") if tool.parameters else None))
        for index, tool in enumerate(chat.tools)]
    choice: str | NamedTool | None = chat.tool_choice or None
    if chat.called_function:
        choice = NamedTool(type="function", function=NamedFunction(name=chat.called_function))
    with flat_params("parameters"):
        return to_tool_use(tools, choice, False if chat.single_call else None)


def to_tokenize_prompt(request: pb.TokenizeRequest) -> Conversation | Text:
    """Return the prompt. Raises InvalidRequestError when there is none."""
    match request.WhichOneof("prompt"):
        case "text":
            return Text(request.text, request.add_special_tokens if request.HasField("add_special_tokens") else True)
        case "chat":
            if request.add_special_tokens:
                raise InvalidRequestError("a chat template writes its own special tokens", param="add_special_tokens",
                                          fix="leave add_special_tokens out")
            return replace(to_conversation(request.chat), tools=to_tools(request.chat).for_template())
        case _:
            raise InvalidRequestError("the request has no prompt", fix="set text or chat", param="prompt")


def to_conversation(chat: pb.Chat) -> Conversation:
    """Return the chat. Raises InvalidRequestError."""
    check_arguments([call.arguments for message in chat.messages for call in message.tool_calls], "chat.messages")
    messages = tuple(_to_message(message, f"chat.messages[{index}]") for index, message in enumerate(chat.messages))
    try:
        variables = MessageToDict(chat.chat_template_kwargs)
    except ValueError as error:     # protobuf's numbers may be NaN or infinite, JSON's may not
        raise InvalidRequestError(f"chat_template_kwargs is not JSON: {error}", fix="send finite numbers",
                                  param="chat.chat_template_kwargs") from None
    return Conversation(messages, variables=variables)


def _to_message(message: pb.ChatMessage, param: str) -> ChatMessage:
    made = chat_message(message.role, message.content, param=param, reasoning=message.reasoning or None)
    if made.role == "tool" and not message.tool_call_id:
        raise InvalidRequestError(f"{param}.tool_call_id is missing", fix="give the id of the call that it answers",
                                  param=f"{param}.tool_call_id")
    if message.tool_calls and made.role != "assistant":
        raise InvalidRequestError(f"a message of role {made.role!r} has tool_calls", param=f"{param}.tool_calls",
                                  fix="only an assistant's may")
    calls = tuple(ToolCall(call.name, read_arguments(call.arguments, f"{param}.tool_calls[{index}].arguments"),
                           call.id or None, len(call.arguments)) for index, call in enumerate(message.tool_calls))
    return replace(made, tool_calls=calls, tool_call_id=message.tool_call_id or None)


def to_chat_response(delta: GenerationDelta, request_id: str, answer: ChatAnswer) -> pb.GenerateResponse:
    """Return the response of a chat: what the delta says, told apart."""
    response = to_response(delta, request_id)
    parts = answer.read(delta)
    response.text = "".join(part.text for part in parts if isinstance(part, Content))
    response.reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    for part in parts:
        if isinstance(part, CallStart):
            response.tool_calls.add(index=part.index, id=answer.new_id(), name=part.name)
        elif isinstance(part, Arguments):
            response.tool_calls.add(index=part.index, arguments=part.text)
    response.finish_reason = answer.finish_reason(delta.finish_reason) or ""
    return response


def to_response(delta: GenerationDelta, request_id: str) -> pb.GenerateResponse:
    response = pb.GenerateResponse(request_id=request_id, choice=delta.choice, text=delta.text,
                                   token_ids=delta.token_ids)
    if delta.logprobs:
        response.logprobs.extend(_logprobs(delta.logprobs))
    if delta.prompt_logprobs:
        response.prompt_logprobs.extend(_logprobs(delta.prompt_logprobs))
    if delta.finish_reason is not None:
        response.finish_reason = delta.finish_reason.value
    if isinstance(delta.stop_reason, str):
        response.stop_string = delta.stop_reason
    elif delta.stop_reason is not None:
        response.stop_token_id = delta.stop_reason
    return response


def to_usage(usage: UsageCount) -> pb.Usage:
    return pb.Usage(prompt_tokens=usage.num_prompt_tokens, completion_tokens=usage.num_generated_tokens,
                    cached_tokens=usage.num_cached_tokens, reasoning_tokens=usage.num_reasoning_tokens or 0)


def to_model(card: ModelCard) -> pb.Model:
    return pb.Model(name=card.name, max_model_len=card.max_model_len, created=card.created_s)


def _logprobs(logprobs: Iterable[TokenLogprob]) -> list[pb.Logprob]:
    return [pb.Logprob(token_id=scored.token_id, logprob=scored.logprob,
                       top=[pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in scored.top])
            for scored in logprobs]
