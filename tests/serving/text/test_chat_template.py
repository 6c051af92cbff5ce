"""Our rendering against transformers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import JsonValue
from transformers import AutoTokenizer

from serving.errors import InvalidRequestError
from serving.text.chat_template import (
    RESERVED_VARIABLES,
    ChatMessage,
    ChatTemplate,
    ChatTemplateError,
    read_chat_template,
)
from serving.text.tokenizer import Tokenizer

MESSAGES = [ChatMessage("system", "Be brief."), ChatMessage("user", "1 < 2 & \"你好\"\n"),
            ChatMessage("assistant", "Yes. "), ChatMessage("user", "  why?")]
TEMPLATES = {
    "trim": "{%- for m in messages %}\n    {%- if loop.first %}\n[{{ m.role }}]\n    {%- endif %}\n "
            "{{ m.content | trim }}\n{% endfor %}{{ eos_token }}",
    "tojson": "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}|"
              "{{ {'b': 1, 'a': '<'} | tojson(sort_keys=true) }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}"
                     "{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
                 "{{ dict(a=1).a }}{{ dict.fromkeys(['x'], 2).x }}",
    "none": "{% if tools %}T{% endif %}{% if documents is none %}D{% endif %}{% if bos_token is defined %}B{% endif %}"
            "{{ add_generation_prompt }}{{ strftime_now('%Y') | length }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_text_equals_transformers(folder_with: Callable[..., Path], name: str, add_generation_prompt: bool) -> None:
    folder = folder_with(chat_template=TEMPLATES[name])
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [message.to_json() for message in MESSAGES], tokenize=False, add_generation_prompt=add_generation_prompt)
    assert Tokenizer.from_dir(folder).apply_chat_template(MESSAGES, add_generation_prompt) == theirs


def test_chatml_ids_equal_transformers(byte_level_dir: Path) -> None:
    ours, theirs = Tokenizer.from_dir(byte_level_dir), AutoTokenizer.from_pretrained(byte_level_dir)
    ids = ours.encode(ours.apply_chat_template(MESSAGES), add_special_tokens=False)
    expected = theirs.apply_chat_template([message.to_json() for message in MESSAGES], add_generation_prompt=True)
    assert ids == expected["input_ids"]


def test_named_templates_and_the_file_are_found_as_transformers_does(folder_with: Callable[..., Path]) -> None:
    folder = folder_with(chat_template=[{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}])
    assert Tokenizer.from_dir(folder).apply_chat_template(MESSAGES) == "D"
    (folder / "chat_template.jinja").write_text("F")
    assert Tokenizer.from_dir(folder).apply_chat_template(MESSAGES) == "F"
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.apply_chat_template([message.to_json() for message in MESSAGES], tokenize=False) == "F"


@pytest.mark.parametrize("configured", [{"default": "x"}, 7, True])
def test_a_template_of_a_wrong_type_is_named(tmp_path: Path, configured: JsonValue) -> None:
    with pytest.raises(ChatTemplateError, match=r"tokenizer_config\.json"):
        read_chat_template(tmp_path, configured)


def test_a_template_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ChatTemplateError, match="cannot be read"):
        read_chat_template(tmp_path, None)


def test_no_template_at_all(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path, None) is None


def test_what_the_template_raises_reaches_the_client() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        template.render(MESSAGES)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("source", [
    "{{ 1 // 0 }}", "{{ 1.5 ** 100000 }}", "{{ messages + 1 }}", "{{ nowhere.a }}", "{{ nowhere() }}",
    "{{ messages[0].content.nope() }}", "{% include 'x' %}", "{{ strftime_now(3) }}", "{{ raise_exception([1]) }}",
    "{{ messages[0].content | batch }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}"])
def test_every_fault_of_a_template_is_an_error_with_its_line(source: str) -> None:
    template = ChatTemplate("{# a template #}\n\n" + source, {})
    with pytest.raises(InvalidRequestError, match="refuses these messages at its line 3: ."):
        template.render(MESSAGES)


def test_variables_reach_the_template_and_unread_ones_are_ignored() -> None:
    template = ChatTemplate("{% if enable_thinking is defined and not enable_thinking %}quick"
                            "{% else %}slow{% endif %}", {})
    assert template.render(MESSAGES, variables={"enable_thinking": False}) == "quick"
    assert template.render(MESSAGES) == "slow"
    assert template.render(MESSAGES, variables={"thinking": False, "self": 1, "context": 2}) == "slow"


@pytest.mark.parametrize("name", sorted(RESERVED_VARIABLES))
def test_what_a_request_says_itself_is_no_variable(name: str) -> None:
    template = ChatTemplate("{{ messages | length }}{{ tools }}{{ add_generation_prompt }}", {})
    assert template.render(MESSAGES, variables={name: None}) == "4NoneTrue"
    with pytest.raises(InvalidRequestError, match=f"'{name}'"):
        template.render(MESSAGES, variables={name: False})


def test_a_name_and_reasoning_are_there_for_templates_that_read_them() -> None:
    message = ChatMessage("assistant", "hi", name="Ada", reasoning="hm")
    read = ChatTemplate("{{ messages[0].name }} {{ messages[0].reasoning_content }} {{ messages[0].reasoning }}", {})
    assert read.render([message]) == "Ada hm hm"
    assert ChatTemplate("{{ messages[0].content }}", {}).render([message]) == "hi"
    assert ChatTemplate("{{ messages[0] | tojson }}", {}).render([ChatMessage("user", "a")]) == (
        '{"role": "user", "content": "a"}')


def test_no_messages_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        ChatTemplate("x", {}).render([])


@pytest.mark.parametrize("attack", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}",
                                    "{{ namespace(__class__=1) }}", "{{ ''.__class__.__subclasses__() }}"])
def test_the_template_cannot_leave_its_sandbox(attack: str) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate(attack, {}).render(MESSAGES)


def test_a_broken_template_is_refused_at_start() -> None:
    with pytest.raises(ChatTemplateError, match="not valid Jinja"):
        ChatTemplate("{% if %}", {})


@pytest.mark.parametrize("source", [
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if x %}" * 300 + "{% endif %}" * 300,
    "{% for i in x %}" * 30 + "{% endfor %}" * 30])
def test_a_template_that_is_too_deep_is_named(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="not valid Jinja"):
        ChatTemplate(source, {})
