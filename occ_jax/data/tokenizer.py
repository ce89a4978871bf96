"""Text to token ids and back, with the digit tasks' alphabet or a checkpoint's own tokenizer.

`encode` never adds special tokens, as a chat template writes them itself. `decode` never hides
them, as a token that a policy samples between two digits must not vanish before a verifier reads
the text. Leaves rendering chat templates to `occ_jax.data.chat`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from occ_jax.config import ModelConfig
from occ_jax.data.chat import Message, RenderChat, load_chat_template
from occ_jax.errors import UserError, one_line

ALPHABET = "0123456789+=>,"
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class Tokenizer(NamedTuple):
    """The tokenizer interface of this package."""

    encode: Callable[[str], list[int]]  # special tokens only if the text spells them
    decode: Callable[[Sequence[int]], str]  # special tokens spelled out
    render_chat: RenderChat  # by the checkpoint's chat template
    eos_ids: tuple[int, ...]  # any ends a completion; the first one ends supervised completions
    pad_id: int  # fills columns that are not valid
    vocab_size: int  # the largest id plus 1


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], **variables: Any) -> list[int]:
    """Token ids of a conversation, up to the beginning of the model's turn.

    `variables` are the template's, such as enable_thinking=False.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses the messages.
    """
    return tokenizer.encode(tokenizer.render_chat(messages, **variables))


def until_end(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[list[int], bool]:
    """The ids before the first end-of-sequence token, and whether there is such a token."""
    for index, token in enumerate(ids):
        if token in tokenizer.eos_ids:
            return list(ids[:index]), True
    return list(ids), False


def decode_completion(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of a completion before its first end-of-sequence token."""
    return tokenizer.decode(until_end(tokenizer, ids)[0])


def model_tokenizer(config: ModelConfig) -> Tokenizer:
    """The tokenizer of `model.checkpoint`, or the digit alphabet if there is no checkpoint.

    Raises:
        UserError: the checkpoint's tokenizer cannot be read.
    """
    return load_tokenizer(config.checkpoint) if config.checkpoint else DIGITS


def _digit_alphabet() -> Tokenizer:
    """Sixteen characters, one token each: padding, end of sequence, then `ALPHABET`."""
    tokens = ("<pad>", "<eos>", *ALPHABET)
    ids = {character: index for index, character in enumerate(tokens)}

    def encode(text: str) -> list[int]:
        unknown = sorted(set(text) - set(ALPHABET))
        if unknown:
            raise UserError(
                f"{text!r} holds {''.join(unknown)!r}; the digit tasks' alphabet is {ALPHABET!r}"
            )
        return [ids[character] for character in text]

    def decode(ids: Sequence[int]) -> str:
        # The model's vocabulary may be larger, and a random policy samples tokens of the rest.
        return "".join(tokens[index] if index < len(tokens) else _UNKNOWN for index in ids)

    def render_chat(
        messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        raise UserError(
            "the digit tasks' alphabet has no chat template; set model.checkpoint to a checkpoint "
            "with one, or dataset.chat to False"
        )

    return Tokenizer(encode, decode, render_chat, eos_ids=(1,), pad_id=0, vocab_size=len(tokens))


DIGITS = _digit_alphabet()


@functools.lru_cache(maxsize=4)
def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face checkpoint from its files, never from the network.

    Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
    generation_config.json and config.json; only the first is required. A completion ends with
    eos_token of tokenizer_config.json or any eos_token_id of generation_config.json (of config.json
    if that file names none).

    Raises:
        UserError: a file is missing or damaged, or no file names an end-of-sequence token.
    """
    directory = Path(directory)
    backend = _read_backend(directory)
    config = _read_json(directory / "tokenizer_config.json")
    _add_listed_tokens(backend, config, directory)
    special = _special_tokens(config, _read_json(directory / "special_tokens_map.json"))
    eos_ids = _eos_ids(backend, directory, special)
    pad_id = backend.token_to_id(special["pad_token"]) if "pad_token" in special else None
    used = np.array(list(backend.get_vocab(with_added_tokens=True).values()))
    return Tokenizer(
        encode=lambda text: backend.encode(text, add_special_tokens=False).ids,
        decode=_decoder(backend, used),
        render_chat=load_chat_template(directory, config.get("chat_template"), special),
        eos_ids=eos_ids,
        pad_id=eos_ids[0] if pad_id is None else pad_id,
        vocab_size=int(used.max()) + 1,
    )


def _read_backend(directory: Path) -> Any:
    import tokenizers

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{directory} holds no tokenizer.json; model.checkpoint must be a Hugging Face "
            "checkpoint's directory with its fast tokenizer"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{path} is damaged: {one_line(error)}") from error
    # Some checkpoints ship settings of their author's last call.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds a {type(value).__name__}, not an object")
    return value


def _add_listed_tokens(backend: Any, config: dict[str, Any], directory: Path) -> None:
    """Adds the tokens that tokenizer_config.json lists and tokenizer.json lacks."""
    import tokenizers

    listed = config.get("added_tokens_decoder", {})
    for text, token in sorted(listed.items(), key=lambda item: int(item[0])):
        if backend.token_to_id(token["content"]) is None:
            flags = {
                name: token.get(name, False)
                for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            backend.add_tokens([tokenizers.AddedToken(token["content"], **flags)])
        actual = backend.token_to_id(token["content"])
        if actual != int(text):
            raise UserError(
                f"{directory / 'tokenizer_config.json'} gives {token['content']!r} the id {text}, "
                f"tokenizer.json {actual}"
            )


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    """Special tokens such as bos_token by name; the first source with a name decides."""
    tokens: dict[str, str] = {}
    for source in sources:
        for name in _SPECIAL_TOKENS:
            token = source.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                tokens.setdefault(name, text)
    return tokens


def _eos_ids(backend: Any, directory: Path, special: dict[str, str]) -> tuple[int, ...]:
    files = ("generation_config.json", "config.json")
    declared = [_read_json(directory / name).get("eos_token_id") for name in files]
    ids: list[int] = []
    if "eos_token" in special:
        eos_id = backend.token_to_id(special["eos_token"])
        if eos_id is None:
            raise UserError(
                f"{directory / 'tokenizer.json'} has no token {special['eos_token']!r}, which "
                "tokenizer_config.json names as the end of a sequence"
            )
        ids.append(eos_id)
    listed = next((value for value in declared if value is not None), [])
    ids += listed if isinstance(listed, list) else [listed]
    if not ids:
        raise UserError(
            f"no file of {directory} names an end-of-sequence token (eos_token in "
            "tokenizer_config.json or eos_token_id in generation_config.json)"
        )
    return tuple(dict.fromkeys(ids))


def _decoder(backend: Any, used: np.ndarray) -> Callable[[Sequence[int]], str]:
    """Makes `decode`. An id without a token becomes U+FFFD; the library would drop it."""
    has_token = np.zeros(used.max() + 1, bool)
    has_token[used] = True

    def decode(ids: Sequence[int]) -> str:
        row = np.asarray(ids, np.int64)
        inside = row < len(has_token)
        gaps = np.flatnonzero(~(inside & has_token[np.where(inside, row, 0)]))
        first, *others = np.split(row, gaps)
        pieces = [first, *(piece[1:] for piece in others)]
        texts = (backend.decode(piece.tolist(), skip_special_tokens=False) for piece in pieces)
        return _UNKNOWN.join(texts)

    return decode
