"""The bounds of a body's fields, which hold before anything is made of its bytes. Of values, SamplingParams has limits.

A value costs 10 to 300 bytes, however few it is written in: the numbers here keep what a body may cost within a few MB
and ten times its bytes.
"""

from __future__ import annotations

from serving.ingress.json_reader import BodyBounds, Bounds
from serving.sampling_params import MAX_LOGIT_BIASES, MAX_STOP_CHARACTERS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS

MAX_BODY_BYTES = 8 * 2**20      # a text of a million tokens is 4 to 5 MB
MAX_MESSAGES = 4096
MAX_PARTS = 1024                # of one message's content
MAX_PROMPTS = 2048              # in one body, as the OpenAI API
MAX_CHOICES = 4096              # of one body: prompts x n
MAX_COUNTED_TOKENS = 2**16      # of /tokenize and /detokenize; as many as the context has where that is more
MAX_REPEATED_TOKENS = 2**18     # of the prompts, in all choices of one answer
MAX_TOKEN_IDS = 2**18           # in one body; as many as the context has where that is more
MAX_TOOLS = 128                 # in one body, and calls of one message
MAX_TOOLS_CHARACTERS = 2**18    # of all descriptions and schemas
MAX_SCHEMA_VALUES = 4096        # of one function
MAX_SCHEMA_DEPTH = 24
MAX_CHOICE_STRINGS = 1024
MAX_ARGUMENT_VALUES = 2**16     # of all tool calls in one body

_ANY = MAX_BODY_BYTES           # a text is bounded by the context when it is tokenized
_NAME = Bounds(0, 256)
_TEXT = Bounds(0, _ANY)


def body_bounds(max_model_len: int) -> BodyBounds:
    """Return the bounds of every path's body, for a model of that context."""
    num_token_ids = max(MAX_TOKEN_IDS, max_model_len)
    return BodyBounds(
        num_values=32_768, num_integers=num_token_ids, depth=32, num_digits=40, num_key_characters=256,
        default=Bounds(1024, 65_536),
        fields={
            "model": _NAME, "user": _NAME, "request_id": _NAME,
            "prompt": Bounds(num_token_ids, _ANY), "tokens": Bounds(max(MAX_COUNTED_TOKENS, max_model_len), 0),
            "messages": Bounds(MAX_MESSAGES, 0), "messages.role": _NAME, "messages.name": _NAME,
            "messages.content": Bounds(MAX_PARTS, _ANY), "messages.content.type": _NAME,
            "messages.content.text": _TEXT, "messages.content.refusal": _TEXT, "messages.reasoning": _TEXT,
            "messages.reasoning_content": _TEXT, "messages.tool_calls": Bounds(MAX_TOOLS, 0),
            "messages.tool_calls.function.arguments": _TEXT, "messages.tool_call_id": _NAME,
            "messages.content.thinking": _TEXT, "messages.content.signature": _TEXT, "messages.content.data": _TEXT,
            "messages.content.content": Bounds(MAX_PARTS, _ANY), "messages.content.content.text": _TEXT,
            "system": Bounds(MAX_PARTS, _ANY), "system.text": _TEXT, "metadata.user_id": _NAME,
            "stop_sequences": Bounds(MAX_STOP_STRINGS, MAX_STOP_CHARACTERS),
            "input": Bounds(MAX_MESSAGES, _ANY), "input.content": Bounds(MAX_PARTS, _ANY), "input.content.text": _TEXT,
            "input.output": Bounds(MAX_PARTS, _ANY), "input.output.text": _TEXT, "input.arguments": _TEXT,
            "input.summary.text": _TEXT, "input.encrypted_content": _TEXT, "instructions": _TEXT,
            "previous_response_id": _NAME, "tools": Bounds(MAX_TOOLS, 0), "tool_choice": Bounds(8, 256),
            "reasoning_effort": _NAME,
            "stop": Bounds(MAX_STOP_STRINGS, MAX_STOP_CHARACTERS), "stop_token_ids": Bounds(MAX_STOP_TOKEN_IDS, 0),
            "logit_bias": Bounds(MAX_LOGIT_BIASES, 0)},
        free=("messages.content.input.",))
