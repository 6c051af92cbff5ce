"""Known fields of OpenAI's and vLLM's API that are not implemented, and the values with which they change nothing.

One rule for all: null means "not said"; a value that cannot change the answer is accepted; any other is refused by
name. A field that stands in no table is unknown and refused, so that a misspelt one is never dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from serving.errors import InvalidRequestError, UnsupportedFieldError


@dataclass(frozen=True, slots=True)
class Unused:
    """`neutral`: the values, besides null, that mean what is done anyway. `never_matters`: every value does."""

    neutral: tuple[JsonValue, ...] = ()
    never_matters: bool = False
    fix: str = "remove it"

    def accepts(self, value: JsonValue) -> bool:
        return value is None or self.never_matters or any(_is_same(value, allowed) for allowed in self.neutral)


def _is_same(value: JsonValue, allowed: JsonValue) -> bool:
    """Compare as JSON does: 1 and 1.0 are one number, true is none."""
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed


_IGNORED = Unused(never_matters=True)
_REFUSED = Unused()
_OFF = Unused((False,))
_ON = Unused((True,))
_EMPTY = Unused(([],))
_USE_TOOLS = "use tools and tool_choice, which came in its place"

REQUEST_FIELDS: dict[str, Unused] = {
    # OpenAI
    "audio": _REFUSED, "function_call": Unused(("none", "auto"), fix=_USE_TOOLS),
    "functions": Unused(([],), fix=_USE_TOOLS), "metadata": _IGNORED, "modalities": Unused((["text"], [])),
    "moderation": _REFUSED, "prediction": _REFUSED, "prompt_cache_key": _IGNORED,
    "prompt_cache_options": _IGNORED, "prompt_cache_retention": _IGNORED,
    "safety_identifier": _IGNORED,
    "service_tier": Unused(("auto", "default")), "store": _OFF, "suffix": Unused(("",)),
    "verbosity": Unused(("medium",)), "web_search_options": _REFUSED,
    # vLLM: how tokens are drawn
    "allowed_token_ids": _REFUSED, "bad_words": _EMPTY, "early_stopping": _OFF, "length_penalty": Unused((1.0,)),
    "logits_processors": _EMPTY, "repetition_detection": _REFUSED, "spaces_between_special_tokens": _ON,
    "thinking_token_budget": Unused((-1,)), "use_beam_search": _OFF, "watermarking": _OFF,
    "guided_decoding_backend": _IGNORED, "guided_whitespace_pattern": _IGNORED,
    "structural_tag": Unused(fix="use response_format"),
    # vLLM: how the prompt is made
    "add_special_tokens": Unused((False,), fix="remove it: a chat template writes its own special tokens"),
    "chat_template": Unused(fix="remove it, and put the template into the checkpoint's folder"),
    "continue_final_message": _OFF, "documents": _EMPTY, "echo": _OFF, "media_io_kwargs": _IGNORED,
    "mm_processor_kwargs": _IGNORED, "prompt_embeds": _REFUSED,
    "truncate_prompt_tokens": Unused(fix="remove it, and shorten the prompt"), "truncation_side": _IGNORED,
    # vLLM: how the request is handled and what of it is shown
    "cache_salt": Unused(fix="remove it: prefixes are cached for all; scheduler.prefix_caching switches that off"),
    "ec_transfer_params": _REFUSED, "kv_transfer_params": _REFUSED,
    "logprob_token_ids": _REFUSED, "return_mm_kwargs": _IGNORED, "return_prompt_text": _OFF,
    "return_token_offsets": _IGNORED, "return_tokens_as_token_ids": _OFF, "routed_experts_prompt_start": Unused((0,)),
    "session_id": _IGNORED, "stream_interval": Unused((1,)), "vllm_xargs": Unused(({},)),
}
MESSAGE_FIELDS: dict[str, Unused] = {
    "annotations": _IGNORED, "audio": _REFUSED, "cache_control": _IGNORED,
    "function_call": Unused(fix="write it into tool_calls"),
    "refusal": Unused(("",), fix="write it into the content"), "task": _REFUSED,
    "tools": Unused(([],), fix="give tools beside the messages"),
}
TOOL_CALL_FIELDS: dict[str, Unused] = {"index": _IGNORED}       # of streamed pieces that a client put together

CONTENT_PART_FIELDS: dict[str, Unused] = {
    "audio_url": _REFUSED, "cache_control": _IGNORED, "file": _REFUSED, "image_embeds": _REFUSED,
    "image_url": _REFUSED, "input_audio": _REFUSED, "prompt_cache_breakpoint": _IGNORED, "uuid": _IGNORED,
    "video_url": _REFUSED,
}


def refuse_unused(extras: Mapping[str, JsonValue], table: Mapping[str, Unused], place: str = "",
                  where: str = "") -> None:
    """Check fields that have no place of their own in a body.

    `place` is the path of the object that holds them, and `where` says the same in words, for messages.
    Raises InvalidRequestError for an unknown field, UnsupportedFieldError for a value that would change the answer.
    """
    for name, value in extras.items():
        param = f"{place}.{name}" if place else name
        if name not in table:
            raise InvalidRequestError(f"unknown field {name!r}{where}", fix="remove it, or check its spelling",
                                      param=param)
        if not table[name].accepts(value):
            raise UnsupportedFieldError(f"{name}={_abbreviated(value)}{where} is not supported",
                                        fix=table[name].fix, param=param)


def _abbreviated(value: JsonValue) -> str:
    """Show short values only: a schema or an image would hide the message."""
    return repr(value) if isinstance(value, (bool, int, float)) or (
        isinstance(value, str) and len(value) <= 40) else "..."
