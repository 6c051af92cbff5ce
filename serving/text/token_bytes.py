"""Find the bytes of text that each token stands for, from tokenizer.json, once.

Text is decoded from bytes, not token by token, because one character may be spread over several tokens. Three styles of
decoder cover the models we serve; another one is refused by name.
* byte level (GPT-2, Qwen, Llama 3): every character of a token's name stands for one byte
* metaspace (Llama 2, Mixtral): "▁" is a space, `<0xE4>` is a byte, a space at the very start of a text is dropped
* words: no decoder at all; tokens are joined with spaces
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from serving.errors import ServingError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenizerError(ServingError):
    """The checkpoint's tokenizer files are missing, broken or of an unknown kind."""


class Style(enum.Enum):
    BYTE_LEVEL = "byte level"
    METASPACE = "metaspace"
    WORDS = "words"


class FirstSpace(enum.Enum):
    """Rules for spaces in the first token of a text."""

    KEPT = "kept"
    ONE_DROPPED = "one dropped"         # a Strip step
    ALL_DROPPED = "all dropped"         # a Metaspace step drops every one of its marks in the first token


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's table: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


@dataclass(frozen=True, slots=True)
class DecoderStyle:
    style: Style
    first_space: FirstSpace = FirstSpace.KEPT
    has_byte_tokens: bool = False
    replacements: Mapping[str, str] = field(default_factory=dict)

    def bytes_of(self, token: str) -> bytes:
        """Return what `token` adds to a text that it does not begin."""
        match self.style:
            case Style.BYTE_LEVEL:
                mapped = [_BYTE_OF_CHARACTER.get(character) for character in token]
                known = [byte for byte in mapped if byte is not None]
                # As the tokenizers library: a token with any foreign character (an added one) stands for itself.
                return bytes(known) if len(known) == len(mapped) else token.encode()
            case Style.WORDS:
                return b" " + token.encode()
            case Style.METASPACE:
                byte_token = _BYTE_TOKEN.fullmatch(token) if self.has_byte_tokens else None
                if byte_token is not None:
                    return bytes([int(byte_token[1], 16)])
                for pattern, content in self.replacements.items():
                    token = token.replace(pattern, content)
                return token.encode()

    def at_the_start(self, content: bytes) -> bytes:
        """Return what a token of `content` adds when it is the first of a text."""
        match self.first_space:
            case FirstSpace.KEPT:
                return content
            case FirstSpace.ONE_DROPPED:
                return content.removeprefix(b" ")
            case FirstSpace.ALL_DROPPED:
                return content.replace(b" ", b"")


def read_decoder_style(decoder: JsonValue) -> DecoderStyle:
    """Read the `decoder` of tokenizer.json. Raises TokenizerError when it is of another kind."""
    if decoder is None:
        return DecoderStyle(Style.WORDS, FirstSpace.ONE_DROPPED)
    steps = decoder.get("decoders") if isinstance(decoder, dict) and decoder.get("type") == "Sequence" else [decoder]
    assert isinstance(steps, list)
    kinds = [str(step.get("type") if isinstance(step, dict) else None) for step in steps]
    if set(kinds) == {"ByteLevel"}:
        return DecoderStyle(Style.BYTE_LEVEL)
    if not set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        raise TokenizerError(f"tokenizer.json has the decoder {' + '.join(kinds)}",
                             fix="known are ByteLevel, Metaspace, and Replace + ByteFallback + Fuse + Strip")
    return _metaspace_style([step for step in steps if isinstance(step, dict)])


def _metaspace_style(steps: list[dict[str, JsonValue]]) -> DecoderStyle:
    replacements: dict[str, str] = {}
    first_space, has_byte_tokens = FirstSpace.KEPT, False
    for step in steps:
        match step["type"]:
            case "Replace":
                pattern, content = step["pattern"], step["content"]
                if not isinstance(pattern, dict) or "String" not in pattern:
                    raise TokenizerError(f"tokenizer.json's decoder replaces {pattern}", fix="known are plain strings")
                replacements[str(pattern["String"])] = str(content)
            case "Metaspace":
                replacements[str(step.get("replacement", "▁"))] = " "
                if step.get("prepend_scheme", "always") != "never":
                    first_space = FirstSpace.ALL_DROPPED
            case "ByteFallback":
                has_byte_tokens = True
            case "Strip":
                if (step.get("content"), step.get("start"), step.get("stop")) != (" ", 1, 0):
                    raise TokenizerError(f"tokenizer.json's decoder strips {step}", fix="known: one space at the start")
                first_space = FirstSpace.ONE_DROPPED
    return DecoderStyle(Style.METASPACE, first_space, has_byte_tokens, replacements)
