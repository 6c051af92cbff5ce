"""What an answer must look like, of the fields of OpenAI's and vLLM's API, as one grammar of llguidance."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

from llguidance import LLMatcher
from pydantic import JsonValue

from serving.errors import InvalidRequestError, UnsupportedFieldError
from serving.ingress.body_bounds import MAX_CHOICE_STRINGS
from serving.ingress.build_request import SamplingFields
from serving.ingress.tools import check_schema
from serving.sampling_params import MAX_GRAMMAR_CHARACTERS

FORMAT_FIELDS = frozenset({"response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice",
                           "guided_grammar"})
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_NEVER_MATTERS = ("backend", "disable_fallback", "disable_any_whitespace", "whitespace_pattern",
                  "disable_additional_properties")
_FIX = f"give one of {', '.join(_KINDS)}"


async def grammar_of(fields: Mapping[str, JsonValue], sampling: SamplingFields) -> str | None:
    """Return the grammar that the fields ask for, None for free text. Raises InvalidRequestError and its kinds.

    `fields`: those of FORMAT_FIELDS that are not null.
    """
    asked = [constraint for name, value in fields.items() for constraint in _constraints(name, value)]
    if not asked:
        return None
    if len(asked) > 1:
        raise InvalidRequestError(f"{asked[0][0]} and {asked[1][0]} contradict each other", fix="give one of them",
                                  param=asked[1][0])
    _check_end(asked[0][0], sampling)
    return await asyncio.to_thread(_checked, *asked[0])


async def checked_lark(field: str, lark: str, sampling: SamplingFields) -> str:
    """Return the grammar, which was made of `field`. Raises InvalidRequestError."""
    _check_end(field, sampling)
    return await asyncio.to_thread(_checked, field, "grammar", lark)


def _check_end(field: str, sampling: SamplingFields) -> None:
    if sampling.ignore_eos or sampling.min_tokens:
        raise InvalidRequestError(f"{field} says where the answer ends", fix="remove ignore_eos and min_tokens",
                                  param="ignore_eos" if sampling.ignore_eos else "min_tokens")


def _constraints(name: str, value: JsonValue) -> list[tuple[str, str, JsonValue]]:
    """Return (field, kind, content) of what one field asks for."""
    if name.startswith("guided_"):
        return [(name, name.removeprefix("guided_"), value)]
    assert isinstance(value, dict)
    if name == "response_format":
        return _of_response_format(value)
    for key, content in value.items():
        if key not in (*_KINDS, *_NEVER_MATTERS) and content is not None:
            raise UnsupportedFieldError(f"structured_outputs.{key[:80]} is not supported", fix=_FIX,
                                        param="structured_outputs")
    return [(name, key, content) for key, content in value.items()
            if key in _KINDS and content is not None and not (key == "json_object" and content is False)]


def _of_response_format(value: dict[str, JsonValue]) -> list[tuple[str, str, JsonValue]]:
    kind, name = value.get("type"), "response_format"
    if kind == "text":
        return []
    if kind == "json_object":
        return [(name, "json_object", True)]
    if kind != "json_schema":
        raise UnsupportedFieldError(f"response_format of type {str(kind)[:80]!r} is not supported", param=name,
                                    fix="use text, json_object or json_schema")
    described = value.get("json_schema")
    if not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
        raise InvalidRequestError("response_format.json_schema.schema is missing", fix="give the schema",
                                  param="response_format")
    return [(name, "json", described["schema"])]


def _checked(field: str, kind: str, content: JsonValue) -> str:
    try:
        grammar = _written(field, kind, content)
        fault = LLMatcher.validate_grammar(grammar)
    except ValueError as error:
        fault = str(error)
    if fault:
        raise InvalidRequestError(f"{field} cannot be used: {fault[:300]}", fix="correct it, or make it simpler",
                                  param=field)
    if len(grammar) > MAX_GRAMMAR_CHARACTERS:
        raise InvalidRequestError(f"{field} has more than {MAX_GRAMMAR_CHARACTERS} characters", fix="make it simpler",
                                  param=field)
    return grammar


def _written(field: str, kind: str, content: JsonValue) -> str:
    """Return the grammar. Raises ValueError, InvalidRequestError."""
    if kind == "json_object":
        return str(LLMatcher.grammar_from_json_schema({"type": "object"}))
    if kind == "json":
        schema: JsonValue = json.loads(content) if isinstance(content, str) else content
        check_schema(schema, field, field)
        if not isinstance(schema, dict):
            raise ValueError("it is no object")
        return str(LLMatcher.grammar_from_json_schema(schema))
    if kind == "choice":
        if not isinstance(content, list) or not content or not all(isinstance(entry, str) for entry in content):
            raise ValueError("it is no list of strings")
        if len(content) > MAX_CHOICE_STRINGS:
            raise ValueError(f"it has more than {MAX_CHOICE_STRINGS} entries")
        return str(LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(entry) for entry in content)))
    if not isinstance(content, str) or not content or len(content) > MAX_GRAMMAR_CHARACTERS:
        raise ValueError(f"it is no string of 1 to {MAX_GRAMMAR_CHARACTERS} characters")
    return str(LLMatcher.grammar_from_regex(content) if kind == "regex" else LLMatcher.grammar_from_lark(content))
