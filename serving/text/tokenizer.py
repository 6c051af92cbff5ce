"""Text <-> token ids, from a checkpoint's tokenizer files, as transformers' fast tokenizers do it.

Files read: tokenizer.json (required); tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
generation_config.json, config.json (what is there). The `tokenizers` library does the work, not transformers.
Which special tokens go around a text is tokenizer.json's word alone: like transformers 5, `add_bos_token` is not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from pydantic import JsonValue

from serving.errors import InvalidRequestError
from serving.text.chat_template import ChatMessage, ChatTemplate, read_chat_template
from serving.text.token_bytes import DecoderStyle, TokenizerError, read_decoder_style

JsonObject = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What the checkpoint's generation_config.json recommends where a client says nothing; None: the API's default.

    As in vLLM the values count whatever `do_sample` says: temperature stays 1.0 unless the file names one.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class Tokenizer:
    """Immutable after construction; encode and decode may be called from any thread."""

    def __init__(self, backend: tokenizers.Tokenizer, style: DecoderStyle, num_embeddings: int,
                 eos_token_ids: tuple[int, ...], chat_template: ChatTemplate | None = None,
                 sampling_defaults: SamplingDefaults | None = None) -> None:
        self._backend = backend
        self._bytes_of_id = {token_id: style.bytes_of(token) for token, token_id in backend.get_vocab().items()}
        self._chat_template = chat_template
        self.style = style
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.num_embeddings = num_embeddings        # a prompt may hold ids below it; the model draws such
        self.eos_token_ids = eos_token_ids
        self.sampling_defaults = sampling_defaults or SamplingDefaults()
        self.special_token_ids = frozenset(token_id for token_id, token in backend.get_added_tokens_decoder().items()
                                           if token.special)

    @staticmethod
    def from_dir(path: str | Path) -> Tokenizer:
        """Read a checkpoint's tokenizer. Raises TokenizerError (files) or ChatTemplateError."""
        folder = Path(path)
        config = _special_token_settings(folder)
        backend, style = _read_backend(folder)
        special_tokens = {key: token for key, token in ((key, _token_text(value)) for key, value in config.items()
                                                        if key.endswith("_token")) if token is not None}
        _add_special_tokens(backend, config, special_tokens)
        source = read_chat_template(folder, config.get("chat_template"))
        model_config = _read_json(folder / "config.json")
        generation_config = _read_json(folder / "generation_config.json")
        num_embeddings = model_config.get("vocab_size")
        return Tokenizer(
            backend, style,
            num_embeddings=num_embeddings if isinstance(num_embeddings, int) else max(backend.get_vocab().values()) + 1,
            eos_token_ids=_eos_token_ids(backend, generation_config, model_config, special_tokens.get("eos_token")),
            chat_template=None if source is None else ChatTemplate(source, special_tokens),
            sampling_defaults=_sampling_defaults(generation_config))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """-> token ids. Lets go of the GIL, so that a long text can be encoded in a thread beside the event loop."""
        # One text as a batch: `encode` itself holds the GIL to the end. "fast" leaves out character offsets only.
        return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """-> text. Bytes that are no UTF-8 become U+FFFD; ids without a token are left out."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text, perhaps a part of a character. Empty for an id without a token."""
        return self._bytes_of_id.get(token_id, b"")

    def token_text(self, token_id: int) -> str:
        """The token for people: its text, or `bytes:\\xe4\\xbd` (the OpenAI API's form) if that is no character."""
        content = self.token_bytes(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def token_name(self, token_id: int) -> str:
        """The token as it is written in the vocabulary."""
        return str(self._backend.id_to_token(token_id) or "")

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def apply_chat_template(self, messages: Sequence[ChatMessage], add_generation_prompt: bool = True,
                            variables: Mapping[str, JsonValue] | None = None) -> str:
        """-> the prompt's text, to be encoded with add_special_tokens=False. Raises InvalidRequestError."""
        if self._chat_template is None:
            raise InvalidRequestError("this model's checkpoint has no chat template", param="messages",
                                      fix="use completions, or put a chat_template.jinja into the checkpoint's folder")
        return self._chat_template.render(messages, add_generation_prompt, variables)


def _read_json(path: Path) -> JsonObject:
    """-> the object in the file; empty when there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}", fix="download the checkpoint again") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds no JSON object", fix="download the checkpoint again")
    return content


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
    """tokenizer_config.json; where it is old and lists no added tokens, special_tokens_map.json goes over it."""
    config = _read_json(folder / "tokenizer_config.json")
    return config if "added_tokens_decoder" in config else {**config, **_read_json(folder / "special_tokens_map.json")}


def _token_text(value: JsonValue) -> str | None:
    """A special token is written as a string or as an object with its properties."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _add_special_tokens(backend: tokenizers.Tokenizer, config: JsonObject, special_tokens: Mapping[str, str]) -> None:
    """Tokens that only tokenizer_config.json knows: they get the ids that are stated there, or are marked special."""
    listed = config.get("added_tokens_decoder")
    entries = sorted((int(token_id), entry) for token_id, entry in listed.items()) if isinstance(listed, dict) else []
    for _, entry in entries:
        if isinstance(entry, dict):
            flags = {key: bool(entry[key]) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
                     if key in entry}
            backend.add_tokens([tokenizers.AddedToken(str(entry["content"]), **flags)])
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens([token for token in special_tokens.values() if token not in known])


def _eos_token_ids(backend: tokenizers.Tokenizer, generation_config: JsonObject, model_config: JsonObject,
                   eos_token: str | None) -> tuple[int, ...]:
    """generation_config.json's ids (without it config.json's), then the tokenizer's own, each once."""
    stated = generation_config.get("eos_token_id", model_config.get("eos_token_id"))
    ids = [token_id for token_id in (stated if isinstance(stated, list) else [stated]) if isinstance(token_id, int)]
    own = None if eos_token is None else backend.token_to_id(eos_token)
    return tuple(dict.fromkeys([*ids, *([] if own is None else [own])]))


def _sampling_defaults(config: JsonObject) -> SamplingDefaults:
    def number(name: str) -> float | None:
        value = config.get(name)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    top_k, top_p, penalty = number("top_k"), number("top_p"), number("repetition_penalty")
    return SamplingDefaults(temperature=number("temperature"), top_p=top_p or None, min_p=number("min_p"),
                            top_k=int(top_k) if top_k is not None and top_k >= 1 else None,
                            repetition_penalty=penalty or None)
