"""Write chat messages as a prompt, through the checkpoint's Jinja template, exactly as transformers does.

Source of the environment's settings: transformers 5, utils/chat_template_utils.py. The template is code from a hub, so
it runs in Jinja's immutable sandbox and sees plain JSON values only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.utils import Namespace
from pydantic import JsonValue

from serving.errors import InvalidRequestError, ServingError
from serving.text.special_tokens import SpecialTokens
from serving.text.template_limits import LimitedEnvironment, limit_steps

_COMMON_TOKENS = frozenset({"bos_token", "eos_token", "pad_token", "unk_token"})
_MAX_LAYOUT = 256       # characters
_MAX_SAID = 500
RESERVED_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class ChatTemplateError(ServingError):
    """The checkpoint's template cannot be read or parsed."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of an earlier answer."""

    name: str
    arguments: Mapping[str, JsonValue]
    id: str | None = None
    num_characters: int = 0             # of the arguments as they were written

    def to_json(self) -> dict[str, JsonValue]:
        call: dict[str, JsonValue] = {
            "type": "function", "function": {"name": self.name, "arguments": dict(self.arguments)}}
        return call if self.id is None else {"id": self.id, **call}


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str
    name: str | None = None
    reasoning: str | None = None        # of an earlier answer; templates know it by either of two names
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None     # what a tool's message answers

    @property
    def num_characters(self) -> int:
        return len(self.content) + len(self.reasoning or "") + sum(call.num_characters for call in self.tool_calls)

    def to_json(self) -> dict[str, JsonValue]:
        message: dict[str, JsonValue] = {"role": self.role, "content": self.content}
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning is not None:
            message |= {"reasoning_content": self.reasoning, "reasoning": self.reasoning}
        if self.tool_calls:
            message["tool_calls"] = [call.to_json() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here its body is simply rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Macro) -> str:
        return str(caller())


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(message if isinstance(message, str) else "it gives no reason in words")


def _strftime_now(layout: str) -> str:
    if len(layout) > _MAX_LAYOUT:
        raise jinja2.TemplateError("a layout of times is too long")
    return datetime.now().strftime(layout)


def _tojson(value: JsonValue, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """Write plain JSON, on which models were trained; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _TemplateDict:
    """`dict(...)` without the attributes of the class, which lead out of the sandbox."""

    def __call__(self, *args: Mapping[str, JsonValue], **kwargs: JsonValue) -> dict[str, JsonValue]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Sequence[str], value: JsonValue = None) -> dict[str, JsonValue]:
        return dict.fromkeys(keys, value)


class _TemplateNamespace(Namespace):
    """`namespace(...)` that keeps no underscore names, which would reach CPython's internals."""

    def __init__(*args: object, **kwargs: object) -> None:
        self, *mappings = args
        assert isinstance(self, _TemplateNamespace)
        attributes = dict(*mappings, **kwargs)    
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: str) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template must not store {name!r} on a namespace")


def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment([_GenerationTag, loopcontrols], {"tojson": _tojson})
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_TemplateDict(),
                               namespace=_TemplateNamespace)
    return environment


class ChatTemplate:
    """One compiled template with the tokenizer's special tokens (`bos_token`, ...) bound."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile. Raises ChatTemplateError when `source` is not a Jinja template."""
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._template = environment.limited_template(source)
        except Exception as error:      # nested too deep for the parser or Python's compiler, say
            said = error if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            raise ChatTemplateError(f"the checkpoint's chat template is not valid Jinja: {said}",
                                    fix="mend chat_template in tokenizer_config.json or chat_template.jinja") from error
        self._special_tokens = dict(special_tokens)
        named = {variable for variable in find_undeclared_variables(tree) if variable in _COMMON_TOKENS}
        self.absent_tokens: frozenset[str] = frozenset(named - set(special_tokens))
        self.source = source
        self.knows_tools = "tools" in find_undeclared_variables(tree)

    def render(self, messages: Sequence[ChatMessage], add_generation_prompt: bool = True,
               variables: Mapping[str, JsonValue] | None = None, tools: Sequence[Mapping[str, JsonValue]] = (),
               special: SpecialTokens | None = None) -> str:
        """Return the prompt's text, special tokens written out. `variables` go to the template (`enable_thinking`,
        ...), `tools` are written as OpenAI's API has them. Special tokens in any of these are quoted by `special`.

        Raises InvalidRequestError when the template refuses the messages. As everywhere, it may leave a variable or a
        field of a message unread.
        """
        self._check(messages, variables or {})
        own = {name: value for name, value in (variables or {}).items() if name not in RESERVED_VARIABLES}
        limit_steps(len(messages) + len(tools), sum(message.num_characters for message in messages)
                    + sum(len(_tojson(dict(tool))) for tool in tools))
        given: JsonValue = {**own, "messages": [message.to_json() for message in messages],
                            "tools": [dict(tool) for tool in tools] or None}
        if special is not None:
            given = special.quote(given)
        assert isinstance(given, dict)
        try:
            return self._template.render({
                **self._special_tokens, **given, "documents": None, "add_generation_prompt": add_generation_prompt})
        except Exception as error:      # a template is a program, and can fail in every way that one can
            said = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            said = said if special is None else special.unquote(said)
            raise InvalidRequestError(
                f"the model's chat template refuses these messages at its line {_line(error)}: {said[:_MAX_SAID]}",
                param="messages", fix="check the roles and their order") from error

    def _check(self, messages: Sequence[ChatMessage], variables: Mapping[str, JsonValue]) -> None:
        if not messages:
            raise InvalidRequestError("messages is empty", fix="give at least one message", param="messages")
        for name, value in variables.items():
            if name in RESERVED_VARIABLES and value is not None:
                raise InvalidRequestError(f"chat_template_kwargs must not set {name!r}", param="chat_template_kwargs",
                                          fix="remove it, and use the request's own field")


def _line(error: BaseException) -> int:
    """Return the innermost line of the template that the error went through: Jinja writes them into the traceback."""
    line, traceback = 0, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def read_chat_template(folder: Path, configured: JsonValue) -> str | None:
    """Return the source, as transformers finds it: chat_template.jinja, else `chat_template` of tokenizer_config.json
    (a string, or a list of {name, template} of which "default" counts); None when the checkpoint has none.

    Raises ChatTemplateError when it is there and cannot be read.
    """
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ChatTemplateError(f"{file} cannot be read: {error}", fix="fetch it again") from error
    if configured is None or isinstance(configured, str):
        return configured
    if not isinstance(configured, list):
        raise ChatTemplateError(f"chat_template in tokenizer_config.json is {str(configured)[:80]!r}",
                                fix="write a string, or a list of objects with name and template")
    for entry in configured:
        if isinstance(entry, dict) and entry.get("name") == "default" and isinstance(entry.get("template"), str):
            return str(entry["template"])
    return None
