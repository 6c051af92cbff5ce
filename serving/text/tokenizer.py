"""Turn text into token ids and back by a checkpoint's tokenizer files, as transformers' fast tokenizers do.

Files read: tokenizer.json (required); tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
generation_config.json, config.json (what is there). The `tokenizers` library does the work, not transformers.
Which special tokens go around a text is tokenizer.json's word alone: like transformers 5, `add_bos_token` is not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import tokenizers
from pydantic import JsonValue

from model.errors import CheckpointError
from model.json_file import read_json_object, shown
from serving.errors import InvalidRequestError, UnsupportedFieldError
from serving.option_types import ToolParserName
from serving.text.answers.answer_format import AnswerFormat, detect_format
from serving.text.chat_template import ChatMessage, ChatTemplate, read_chat_template
from serving.text.generation_config import SamplingDefaults, sampling_defaults, stated_eos_token_ids, unused_fields
from serving.text.special_tokens import SpecialTokens
from serving.text.token_bytes import DecoderStyle, TokenizerError, read_decoder_style

_WINDOW = 16_384            # characters
_MAX_NORMALIZED = 4         # characters that become one when a text is normalized
_MAX_CUT_TOKENS = 16        # that a window may have more than its part of the whole text
JsonObject = Mapping[str, JsonValue]
_MAX_VOCAB_SIZE = 1 << 24       # a hundred times those in use; ids are kept in a table


@dataclass(frozen=True, slots=True)
class Note:
    """Something of a checkpoint that does not stop it from being served, and that people should know."""

    found: str
    fix: str


class Tokenizer:
    """Immutable after construction; encode and decode may be called from any thread."""

    def __init__(self, backend: tokenizers.Tokenizer, style: DecoderStyle, num_embeddings: int,
                 eos_token_ids: tuple[int, ...], chat_template: ChatTemplate | None = None,
                 sampling_defaults: SamplingDefaults | None = None, notes: tuple[Note, ...] = ()) -> None:
        self._backend = backend
        self._bytes_of_id = {token_id: style.bytes_of(token) for token, token_id in backend.get_vocab().items()}
        self._chat_template = chat_template
        self._longest_token = max(map(len, self._bytes_of_id.values()), default=1) or 1     # bytes
        self._ids = tuple(range(num_embeddings))
        self.style = style
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.num_embeddings = num_embeddings        # a prompt may hold ids below it; the model draws such
        self.eos_token_ids = eos_token_ids
        self.sampling_defaults = sampling_defaults or SamplingDefaults()
        self.notes = notes
        self._special = SpecialTokens(backend)
        self.special_token_ids = frozenset(token_id for token_id, token in backend.get_added_tokens_decoder().items()
                                           if token.special)

    @staticmethod
    def from_dir(path: str | Path) -> Tokenizer:
        """Read and judge a checkpoint's tokenizer. Raises TokenizerError (files) or ChatTemplateError."""
        folder = Path(path)
        config = _special_token_settings(folder)
        backend, style = _read_backend(folder)
        special_tokens = {key: token for key, token in ((key, _token_text(value)) for key, value in config.items()
                                                        if key.endswith("_token")) if token is not None}
        _add_special_tokens(backend, config, special_tokens)
        source = read_chat_template(folder, config.get("chat_template"))
        model_config = _read_json(folder / "config.json")
        generation_config = _read_json(folder / "generation_config.json")
        num_embeddings = _num_embeddings(model_config, backend)
        eos_token_ids = _eos_token_ids(backend, stated_eos_token_ids(generation_config, model_config),
                                       special_tokens.get("eos_token"))
        _check_eos(eos_token_ids, num_embeddings)
        template = None if source is None else ChatTemplate(source, special_tokens)
        notes = (*_notes_on_tokens(backend, num_embeddings, eos_token_ids), *_notes_on_template(template),
                 *(Note(f"generation_config.json: {field} is not applied", "send what clients need with each request")
                   for field in unused_fields(generation_config)))
        return Tokenizer(backend, style, num_embeddings, eos_token_ids, template,
                         sampling_defaults(generation_config), notes)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids; where `quote` has marked special tokens, they are text. Lets go of the GIL, so that a
        long text can be encoded in a thread beside the event loop."""
        if self._special.is_quoted(text):
            return self._special.encode(text)
        # One text as a batch: `encode` itself holds the GIL to the end. "fast" leaves out character offsets only.
        return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def quote(self, text: str) -> str:
        """Return the text of a client as it may stand in a prompt: special tokens in it are marked. Raises
        InvalidRequestError where there are very many."""
        return str(self._special.quote(text))

    def has_more_tokens(self, text: str, number: int) -> bool:
        """Return True when the text certainly has more tokens than that, at a cost that its length does not raise.

        Encoding takes a hundred bytes for each token: a long text is encoded in windows, until enough were counted. A
        window's ends may cut tokens in two, which is allowed for.
        """
        text = self._special.unquote(text)
        if len(text) > number * self._longest_token * _MAX_NORMALIZED:
            return True
        num_counted = 0
        for start in range(0, len(text) if len(text) > max(number, _WINDOW) else 0, _WINDOW):
            num_counted += len(self.encode(text[start:start + _WINDOW], False)) - _MAX_CUT_TOKENS
            if num_counted > number:
                return True
        return False

    def shared_ids(self, token_ids: Iterable[int]) -> tuple[int, ...]:
        """Return the ids as objects that all prompts share: 8 bytes for each and not 40. Wrong ids stay as they are."""
        known, shared = len(self._ids), self._ids
        return tuple([shared[token_id] if 0 <= token_id < known else token_id for token_id in token_ids])

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text. Bytes that are no UTF-8 become U+FFFD; ids without a token are left out."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """Return what the token adds to a text, perhaps a part of a character. Empty for an id without a token."""
        return self._bytes_of_id.get(token_id, b"")

    def token_text(self, token_id: int) -> str:
        """Return the token for people: its text, or `bytes:\\xe4\\xbd` (the OpenAI API's form) if that is no
        character."""
        content = self.token_bytes(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def token_name(self, token_id: int) -> str:
        """Return the token as it is written in the vocabulary."""
        return str(self._backend.id_to_token(token_id) or "")

    def apply_chat_template(self, messages: Sequence[ChatMessage], add_generation_prompt: bool = True,
                            variables: Mapping[str, JsonValue] | None = None,
                            tools: Sequence[Mapping[str, JsonValue]] = ()) -> str:
        """Return the prompt's text, to be encoded with add_special_tokens=False. What comes from the client is quoted
        in it. Raises InvalidRequestError."""
        if self._chat_template is None:
            raise InvalidRequestError("this model's checkpoint has no chat template", param="messages",
                                      fix="use completions, or put a chat_template.jinja into the checkpoint's folder")
        if tools and not self._chat_template.knows_tools:
            raise UnsupportedFieldError("this model's chat template writes no tools", param="tools",
                                        fix="remove them, or put a template that does into the checkpoint's folder")
        return self._chat_template.render(messages, add_generation_prompt, variables, tools, self._special)

    def answer_format(self, tool_parser: ToolParserName | None = None) -> AnswerFormat:
        """Return how the model writes its answers; `tool_parser` counts over what the template shows."""
        return detect_format(None if self._chat_template is None else self._chat_template.source, tool_parser)

    def to_json(self) -> str:
        """Return the tokenizer as the tokenizers library writes it, with all added tokens."""
        return str(self._backend.to_str())

    def token_id(self, token: str) -> int | None:
        """Return the id of a text that is one token of the vocabulary."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)


def _read_json(path: Path) -> JsonObject:
    """Return the object in the file; an empty one when there is no such file. Raises TokenizerError."""
    try:
        return cast(JsonObject, read_json_object(path))
    except FileNotFoundError:
        return {}
    except CheckpointError as error:
        raise TokenizerError(error.message, fix=error.fix) from error


def _read_backend(folder: Path) -> tuple[tokenizers.Tokenizer, DecoderStyle]:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise TokenizerError(f"{folder} has no tokenizer.json",
                             fix="download it with the checkpoint, or make it with transformers' save_pretrained")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:      # the library raises nothing narrower
        raise TokenizerError(f"{file} cannot be read: {error}", fix="download the checkpoint again") from error
    backend.no_truncation()
    backend.no_padding()
    return backend, read_decoder_style(_read_json(file).get("decoder"))


def _special_token_settings(folder: Path) -> JsonObject:
    """Return tokenizer_config.json; where it is old and lists no added tokens, special_tokens_map.json goes over it."""
    config = _read_json(folder / "tokenizer_config.json")
    return config if "added_tokens_decoder" in config else {**config, **_read_json(folder / "special_tokens_map.json")}


def _token_text(value: JsonValue) -> str | None:
    """Return a special token, which is written as a string or as an object with its properties."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _add_special_tokens(backend: tokenizers.Tokenizer, config: JsonObject, special_tokens: Mapping[str, str]) -> None:
    """Add tokens that only tokenizer_config.json knows: they get the ids that are stated there, or are marked
    special."""
    listed = config.get("added_tokens_decoder")
    entries = listed if isinstance(listed, dict) else {}
    for token_id in entries:
        if not (token_id.isdecimal() and isinstance(entries[token_id], dict) and _token_text(entries[token_id])):
            raise TokenizerError(f"tokenizer_config.json: added_tokens_decoder has {token_id!r}: "
                                 f"{str(entries[token_id])[:80]}", fix="write ids with objects that have a content")
    for token_id in sorted(entries, key=int):
        entry = entries[token_id]
        assert isinstance(entry, dict)
        flags = {key: bool(entry[key]) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
                 if key in entry}
        backend.add_tokens([tokenizers.AddedToken(_encodable(str(entry["content"])), **flags)])
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens([_encodable(token) for token in special_tokens.values() if token not in known])


def _encodable(token: str) -> str:
    """Return the token. Raises TokenizerError where it is half of a character, as JSON can write one."""
    try:
        token.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"tokenizer_config.json: the token {token!r} is no text: {error}",
                             fix="write whole characters") from error
    return token


def _num_embeddings(model_config: JsonObject, backend: tokenizers.Tokenizer) -> int:
    """Return how many token ids the model has: config.json's `vocab_size`, or as many as the tokenizer has."""
    stated = model_config.get("vocab_size")
    if stated is None:
        return max(backend.get_vocab().values(), default=0) + 1
    if not isinstance(stated, int) or isinstance(stated, bool) or not 1 <= stated <= _MAX_VOCAB_SIZE:
        raise TokenizerError(f"config.json: vocab_size={shown(stated)} is not a whole number from 1 to "
                             f"{_MAX_VOCAB_SIZE}", fix="correct it, or fetch it again")
    return stated


def _eos_token_ids(backend: tokenizers.Tokenizer, stated: tuple[int, ...], eos_token: str | None) -> tuple[int, ...]:
    """Return the ids that the files state, then the tokenizer's own, each once."""
    own = None if eos_token is None else backend.token_to_id(eos_token)
    return tuple(dict.fromkeys([*stated, *([] if own is None else [own])]))


def _check_eos(eos_token_ids: tuple[int, ...], num_embeddings: int) -> None:
    for token_id in eos_token_ids:
        if not 0 <= token_id < num_embeddings:
            raise TokenizerError(f"the end-of-sequence token {token_id} is not of this model, whose ids end at "
                                 f"{num_embeddings - 1}",
                                 fix="correct eos_token_id in generation_config.json or config.json, or eos_token in "
                                     "tokenizer_config.json")


def _notes_on_tokens(backend: tokenizers.Tokenizer, num_embeddings: int, eos_token_ids: tuple[int, ...]
                     ) -> Iterator[Note]:
    beyond = sorted((token_id, token) for token, token_id in backend.get_vocab().items() if token_id >= num_embeddings)
    if beyond:
        yield Note(f"{len(beyond)} tokens, {beyond[0][1]!r} the first, have no embedding: texts with them are refused",
                   "remove them from tokenizer.json and tokenizer_config.json, if the model was not trained with them")
    if not eos_token_ids:
        yield Note("no end-of-sequence token is stated: answers end at max_tokens or a stop string only",
                   "state eos_token_id in generation_config.json")


def _notes_on_template(template: ChatTemplate | None) -> Iterator[Note]:
    if template is None:
        yield Note("no chat template: chats are refused, completions are served",
                   "put a chat_template.jinja into the checkpoint's folder")
        return
    for name in sorted(template.absent_tokens):
        yield Note(f"the chat template writes {name}, which is not set: nothing is written for it",
                   f"set {name} in tokenizer_config.json")
    try:
        template.render([ChatMessage("user", "Hello")])
    except InvalidRequestError as error:
        yield Note(f"a chat of one user message is refused: {error.message}", "correct the chat template")
