"""Text to token ids and back: one contract, the digit tasks' alphabet, checkpoints' own tokenizers.

Special tokens are never added by `encode` and never hidden by `decode`: a chat template writes its
own, and what a policy samples between two digits must not vanish before a verifier reads it. Chat
templates are rendered in `occ_jax.data.chat`.
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
_PAD, _EOS = "<pad>", "<eos>"
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class Tokenizer(NamedTuple):
    """All that the rest of the package asks of a tokenizer."""

    encode: Callable[
        [str], list[int]
    ]  # token ids of a text; special tokens only where it spells them
    decode: Callable[[Sequence[int]], str]  # the text of token ids, special tokens spelled out
    render_chat: RenderChat  # messages to text, by the checkpoint's chat template
    eos_ids: tuple[int, ...]  # any of them ends a completion; the first closes a supervised one
    pad_id: int  # fills columns that are not valid
    vocab_size: int  # one more than the largest id


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], **variables: Any) -> list[int]:
    """Token ids of a conversation, up to where the model's turn begins.

    Args:
        tokenizer: whose chat template renders.
        messages: the conversation, oldest first.
        variables: for the template, such as enable_thinking=False.

    Raises:
        UserError: there is no chat template, or it refuses the messages.
    """
    return tokenizer.encode(tokenizer.render_chat(messages, **variables))


def until_end(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[list[int], bool]:
    """The ids before the first end-of-sequence token, and whether there is one."""
    ends = tokenizer.eos_ids
    for index, token in enumerate(ids):
        if token in ends:
            return list(ids[:index]), True
    return list(ids), False


def decode_completion(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of a completion, without its end and what follows."""
    return tokenizer.decode(until_end(tokenizer, ids)[0])


def model_tokenizer(config: ModelConfig) -> Tokenizer:
    """The tokenizer of `model.checkpoint`, or the digit alphabet where there is no checkpoint.

    Raises:
        UserError: the checkpoint's tokenizer cannot be read.
    """
    return load_tokenizer(config.checkpoint) if config.checkpoint else DIGITS


def _digit_alphabet() -> Tokenizer:
    """Sixteen characters, one token each: padding, end of sequence, then `ALPHABET`."""
    tokens = (_PAD, _EOS, *ALPHABET)
    ids = {character: index for index, character in enumerate(tokens)}

    def encode(text: str) -> list[int]:
        unknown = sorted(set(text) - set(ALPHABET))
        if unknown:
            raise UserError(
                f"{text!r} holds {''.join(unknown)!r}; the digit tasks' alphabet is {ALPHABET!r}"
            )
        return [ids[character] for character in text]

    def decode(ids: Sequence[int]) -> str:
        # The model's vocabulary may be the larger one, and a random policy samples such tokens.
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
    """The tokenizer of a Hugging Face checkpoint, from its own files and never the network.

    Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
    generation_config.json and config.json; only the first must be there. A completion ends with
    tokenizer_config.json's eos_token or any eos_token_id of generation_config.json (config.json
    where that file names none).

    Args:
        directory: the checkpoint.

    Raises:
        UserError: a file is missing or damaged, or no file names an end-of-sequence token.
    """
    directory = Path(directory)
    backend = _read_backend(directory)
    config = _read_json(directory / "tokenizer_config.json")
    _add_listed_tokens(backend, config, directory)
    special = _special_tokens(config, _read_json(directory / "special_tokens_map.json"))
    generation = _read_json(directory / "generation_config.json")
    model = _read_json(directory / "config.json")
    eos_ids = _eos_ids(backend, directory, special, generation, model)
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
    # Some checkpoints ship the settings of somebody's last call.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds a {type(found).__name__}, not an object")
    return found


def _add_listed_tokens(backend: Any, config: dict[str, Any], directory: Path) -> None:
    """Adds tokens that tokenizer_config.json lists and tokenizer.json does not have."""
    import tokenizers

    listed = config.get("added_tokens_decoder", {})
    for text, token in sorted(listed.items(), key=lambda item: int(item[0])):
        if backend.token_to_id(token["content"]) is None:
            flags = {
                name: token.get(name, False)
                for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            backend.add_tokens([tokenizers.AddedToken(token["content"], **flags)])
        found = backend.token_to_id(token["content"])
        if found != int(text):
            raise UserError(
                f"{directory / 'tokenizer_config.json'} gives {token['content']!r} the id {text}, "
                f"tokenizer.json {found}"
            )


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    """bos_token and its kin by name; the first file that names one decides."""
    found: dict[str, str] = {}
    for source in sources:
        for name in _SPECIAL:
            token = source.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                found.setdefault(name, text)
    return found


def _eos_ids(
    backend: Any,
    directory: Path,
    special: dict[str, str],
    generation: dict[str, Any],
    model: dict[str, Any],
) -> tuple[int, ...]:
    ids: list[int] = []
    if "eos_token" in special:
        own = backend.token_to_id(special["eos_token"])
        if own is None:
            raise UserError(
                f"{directory / 'tokenizer.json'} has no token {special['eos_token']!r}, which "
                "tokenizer_config.json names as the end of a sequence"
            )
        ids.append(own)
    for source in (generation, model):
        listed = source.get("eos_token_id")
        if listed is not None:
            ids += listed if isinstance(listed, list) else [listed]
            break
    if not ids:
        raise UserError(
            f"no file of {directory} names an end-of-sequence token (eos_token in "
            "tokenizer_config.json or eos_token_id in generation_config.json)"
        )
    return tuple(dict.fromkeys(ids))


def _decoder(backend: Any, used: np.ndarray) -> Callable[[Sequence[int]], str]:
    """Decodes; an id without a token, which the library would drop, reads as U+FFFD."""
    known = np.zeros(used.max() + 1, bool)
    known[used] = True

    def decode(ids: Sequence[int]) -> str:
        row = np.asarray(ids, np.int64)
        inside = row < len(known)
        gaps = np.flatnonzero(~(inside & known[np.where(inside, row, 0)]))
        pieces = np.split(row, gaps)
        text = [backend.decode(pieces[0].tolist(), skip_special_tokens=False)]
        text += [backend.decode(p[1:].tolist(), skip_special_tokens=False) for p in pieces[1:]]
        return _UNKNOWN.join(text)

    return decode
