"""How a model writes its answers: which parser reads its tool calls, and whether it thinks in a block."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from serving.option_types import ToolParserName
from serving.text.answers import hermes, mistral, qwen3_coder, reasoning

_MARKERS: dict[ToolParserName, tuple[str, ...]] = {
    "hermes": (hermes.BEGIN, hermes.END), "qwen3_coder": (qwen3_coder.BEGIN, qwen3_coder.END),
    "mistral": (mistral.BEGIN, "[ARGS]", "[CALL_ID]")}


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What is known of a checkpoint. `tool_parser` None: its calls cannot be read."""

    tool_parser: ToolParserName | None = None
    thinks: bool = False

    def markers(self, has_tools: bool) -> tuple[str, ...]:
        """Return the tags that must not be left out of the text, though they may be special tokens."""
        thinking = (reasoning.BEGIN, reasoning.END) if self.thinks else ()
        return (*thinking, *(_MARKERS[self.tool_parser] if self.tool_parser and has_tools else ()))

    def call_start(self, name: str | None) -> str:
        """Return what an answer begins with that must be a call, of the function `name` or of any.

        It ends where tokens end, so that the model goes on as it has learned.
        """
        if self.tool_parser == "qwen3_coder":
            return f"<tool_call>\n<function={'' if name is None else name + '>' + chr(10)}"
        head = "[TOOL_CALLS] [" if self.tool_parser == "mistral" else "<tool_call>\n"
        return head + '{"name":' + ("" if name is None else f' {json.dumps(name)}, "arguments":')


def detect_format(template: str | None, tool_parser: ToolParserName | None = None) -> AnswerFormat:
    """Tell a model's format by what its chat template writes for earlier answers."""
    source = template or ""
    thinks = reasoning.END in source
    if tool_parser is not None:
        return AnswerFormat(tool_parser, thinks)
    if "<function=" in source:
        return AnswerFormat("qwen3_coder", thinks)
    if mistral.BEGIN in source:
        return AnswerFormat("mistral", thinks)
    return AnswerFormat("hermes" if hermes.BEGIN in source else None, thinks)


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """How the answers to one request are read."""

    format: AnswerFormat
    reads_calls: bool = False
    max_calls: int | None = None
    start: str = ""                     # stands in the prompt already, and belongs to the answer
    opens_thinking: bool = False
    schemas: qwen3_coder.Schemas = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Return whether the text is the answer, as it is."""
        return not (self.reads_calls or self.format.thinks)
