"""Every format, whole and split anywhere: the same reasoning, content and calls, and no tag in any of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.text.answers.answer_format import AnswerFormat, AnswerRules, ToolParserName, detect_format
from serving.text.answers.answer_parser import AnswerParser
from serving.text.answers.parts import Arguments, CallStart, Content, Part, Reasoning

SCHEMAS = {"f": {"n": {"type": "integer"}, "s": {"type": "string"}, "o": {"type": "object"}, "b": {"type": "boolean"},
                 "any": {"anyOf": [{"type": "string"}, {"type": "number"}]}, "maybe": {"type": ["string", "null"]}}}
Read = tuple[str, str, list[tuple[str, str]]]       # reasoning, content, (name, arguments) of the calls


def rules(parser: ToolParserName | None, thinks: bool = False, **more: object) -> AnswerRules:
    made = AnswerRules(AnswerFormat(parser, thinks), reads_calls=parser is not None, schemas=SCHEMAS)
    return replace(made, **more)


def gather(parts: list[Part]) -> Read:
    reasoning, content, calls = "", "", list[list[str]]()
    for part in parts:
        match part:
            case Reasoning(text):
                reasoning += text
            case Content(text):
                content += text
            case CallStart(index, name):
                assert index == len(calls)
                calls.append([name, ""])
            case Arguments(index, text):
                assert index == len(calls) - 1 and text
                calls[index][1] += text
    return reasoning, content, [(name, arguments) for name, arguments in calls]


def read(how: AnswerRules, pieces: list[str]) -> Read:
    parser = AnswerParser(how)
    return gather([part for piece in pieces for part in parser.push(piece)] + parser.end())


HERMES = '<tool_call>\n{"name": "f", "arguments": {"s": "a </tool_call> \\" {", "n": [1, {}]}}\n</tool_call>'
CODER = ("<tool_call>\n<function=f>\n<parameter=n>\n3\n</parameter>\n<parameter=s>\nline \"1\"\n<b>\n\n</parameter>\n"
         "<parameter=o>\n{\"a\": [1, null]}\n</parameter>\n</function>\n</tool_call>")
CODER_ARGUMENTS = {"n": 3, "s": 'line "1"\n<b>\n', "o": {"a": [1, None]}}
CASES: list[tuple[ToolParserName | None, bool, str, Read]] = [
    (None, False, "  plain <tool_call> text \n", ("", "  plain <tool_call> text \n", [])),
    (None, True, "\n<think>\nso <think> it\n</think>\n\nYes.\n", ("so <think> it", "Yes.\n", [])),
    (None, True, " <thin air", ("", " <thin air", [])),
    (None, True, "<think> never ends </thin ", ("never ends </thin ", "", [])),
    ("hermes", False, f"Let me see.\n{HERMES}\n{HERMES}\n",
     ("", "Let me see.", [("f", '{"s": "a </tool_call> \\" {", "n": [1, {}]}')] * 2)),
    ("hermes", True, f"<think>\nhm\n</think>\n\n{HERMES}",
     ("hm", "", [("f", '{"s": "a </tool_call> \\" {", "n": [1, {}]}')])),
    ("hermes", False, '<tool_call>{"arguments": {"a": 1}, "id": 7, "name": "g\\u00e9"}</tool_call> done',
     ("", " done", [("gé", '{"a": 1}')])),
    ("hermes", False, '<tool_call>{"name": "g"}</tool_call>', ("", "", [("g", "{}")])),
    ("hermes", False, '<tool_call>{"name": "g", "arguments": null}</tool_call>', ("", "", [("g", "{}")])),
    ("hermes", False, '<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}', ("", "", [("g", '{"a": 1}')])),
    ("hermes", False, '<tool_call>{"name": "g", "arguments": {"a": 1}</tool_call>', ("", "", [("g", '{"a": 1}')])),
    ("hermes", False, '<tool_call>{"name": "g", "arguments": {"a": "cut of', ("", "", [("g", '{"a": "cut of')])),
    ("hermes", False, "the <tool_call> tag, a < b and <tool", ("", "the <tool_call> tag, a < b and <tool", [])),
    ("hermes", False, '<tool_call>{"no": 1}</tool_call>', ("", '<tool_call>{"no": 1}</tool_call>', [])),
    ("mistral", False, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "]"}}, {"name": "g", "arguments": {}}]',
     ("", "", [("f", '{"a": "]"}'), ("g", "{}")])),
    ("mistral", False, 'ok [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]123[ARGS]{}[TOOL_CALLS]h{"b": {}}',
     ("", "ok", [("f", '{"a": 1}'), ("g", "{}"), ("h", '{"b": {}}')])),
    ("mistral", False, "[TOOL_CALLS] nothing", ("", "[TOOL_CALLS] nothing", [])),
    ("qwen3_coder", False, f"I look.\n\n{CODER}\n{CODER}", ("", "I look.", [
        ("f", '{"n": 3, "s": "line \\"1\\"\\n<b>\\n", "o": {"a": [1, null]}}')] * 2)),
    ("qwen3_coder", False, "<function=f>\n<parameter=b>\nTrue\n<parameter=any>\n1.5\n<parameter=maybe>\nnull\n"
     "<parameter=new>\n5\n</parameter>\n</function>",
     ("", "", [("f", '{"b": true, "any": 1.5, "maybe": null, "new": "5"}')])),
    ("qwen3_coder", False, "<tool_call>\n<function=f>\n<parameter=n>\nmany\n</parameter>\n</tool_call>",
     ("", "", [("f", '{"n": "many"}')])),
    ("qwen3_coder", False, "<tool_call>\n<function=f>\n<parameter=n>\n1e999\n</parameter>\n</function>",
     ("", "", [("f", '{"n": "1e999"}')])),
    ("qwen3_coder", False, "<tool_call>\n<function=f>\n<parameter=s>\nhalf \n", ("", "", [("f", '{"s": "half ')])),
    ("qwen3_coder", False, "<tool_call> is a tag", ("", "<tool_call> is a tag", [])),
]


@pytest.mark.parametrize(("parser", "thinks", "text", "expected"), CASES)
def test_what_a_text_says(parser: ToolParserName | None, thinks: bool, text: str, expected: Read) -> None:
    assert read(rules(parser, thinks), [text]) == expected
    assert read(rules(parser, thinks), list(text)) == expected


@settings(max_examples=400)
@given(st.data())
def test_any_split_says_the_same(data: st.DataObject) -> None:
    parser, thinks, text, expected = data.draw(st.sampled_from(CASES))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(rules(parser, thinks), pieces) == expected


WORDS = [
    "<tool_call>", "</tool_call>", "<function=f>", "<parameter=s>", "<parameter=n>", "</parameter>", "</function>",
    "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", '{"name": "f", ', '"arguments": {', "}", "]", "[",
    ",", ":", '"', "\\", "\n", " ", "5", "é", "😀", "<", "name"]


@settings(max_examples=600)
@given(st.sampled_from([None, "hermes", "qwen3_coder", "mistral"]), st.booleans(),
       st.lists(st.sampled_from(WORDS), max_size=25), st.integers(1, 7))
def test_any_text_ends_and_its_splits_agree(parser: ToolParserName | None, thinks: bool, words: list[str],
                                            size: int) -> None:
    text, how = "".join(words), rules(parser, thinks)
    whole = read(how, [text])
    assert whole == read(how, list(text)) == read(how, [text[at:at + size] for at in range(0, len(text), size)])
    if parser is None and not thinks:
        assert whole == ("", text, [])


def test_arguments_come_as_they_are_made() -> None:
    for name, text in (("hermes", HERMES), ("qwen3_coder", CODER)):
        parser = AnswerParser(rules(name))      # type: ignore[arg-type]
        num_after = [len("".join(part.text for part in parser.push(sign) if isinstance(part, Arguments)))
                     for sign in text]
        assert sum(1 for number in num_after if number) > 15 and max(num_after) < 25


def test_arguments_of_tags_are_json() -> None:
    _, _, ((_, arguments),) = read(rules("qwen3_coder"), [CODER])
    assert json.loads(arguments) == CODER_ARGUMENTS


def test_only_so_many_calls_are_told() -> None:
    _, content, calls = read(rules("hermes", max_calls=1), [HERMES, HERMES, "x"])
    assert len(calls) == 1 and content == "x"


def test_a_thought_that_the_prompt_has_opened() -> None:
    parser = AnswerParser(rules("hermes", True, opens_thinking=True))
    assert parser.is_thinking and gather(parser.push("hm </think>")) == ("hm", "", []) and not parser.is_thinking
    assert gather(parser.push(f"\n\n{HERMES}") + parser.end())[2]


@pytest.mark.parametrize(("parser", "rest", "arguments"), [
    ("hermes", ' {"a": 1}}\n</tool_call>', '{"a": 1}'), ("mistral", ' {"a": 1}}]', '{"a": 1}'),
    ("qwen3_coder", "<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>", '{"n": 1}')])
def test_a_call_that_the_prompt_has_begun(parser: ToolParserName, rest: str, arguments: str) -> None:
    start = AnswerFormat(parser).call_start("f")
    made = AnswerParser(rules(parser, True, start=start))
    assert gather(made.start() + made.push(rest) + made.end()) == ("", "", [("f", arguments)])
    of_any = {"hermes": ' "f", "arguments":', "mistral": ' "f", "arguments":', "qwen3_coder": "f>\n"}[parser]
    assert AnswerFormat(parser).call_start(None) + of_any == start


@pytest.mark.parametrize(("template", "expected"), [
    (None, AnswerFormat()), ("{{ tools }}", AnswerFormat()), ("<tool_call>", AnswerFormat("hermes")),
    ("<tool_call>\n<function=", AnswerFormat("qwen3_coder")), ("[TOOL_CALLS]", AnswerFormat("mistral")),
    ("</think><tool_call>", AnswerFormat("hermes", True))])
def test_the_format_is_told_by_the_template(template: str | None, expected: AnswerFormat) -> None:
    assert detect_format(template) == expected
    assert detect_format(template, "mistral") == AnswerFormat("mistral", expected.thinks)
