"""Sixteen characters, one token each: the vocabulary of the digit tasks."""

from __future__ import annotations

from collections.abc import Iterable

ALPHABET = "0123456789+=>,"
PAD_ID = 0
EOS_ID = 1
VOCAB_SIZE = len(ALPHABET) + 2

_IDS = {character: index + 2 for index, character in enumerate(ALPHABET)}


def encode(text: str) -> list[int]:
    """Token ids of a text, no special tokens added.

    Raises:
        ValueError: a character outside the alphabet.
    """
    unknown = sorted(set(text) - set(ALPHABET))
    if unknown:
        raise ValueError(
            f"{text!r} holds {''.join(unknown)!r}; the digit tasks' alphabet is {ALPHABET!r}"
        )
    return [_IDS[character] for character in text]


def decode(ids: Iterable[int]) -> str:
    """The text before the first end-of-sequence token, padding dropped.

    Ids beyond the alphabet, which a model with a larger vocabulary may sample, read as U+FFFD.
    """
    characters: list[str] = []
    for token in ids:
        if token == EOS_ID:
            break
        if token != PAD_ID:
            characters.append(ALPHABET[token - 2] if token < VOCAB_SIZE else "\ufffd")
    return "".join(characters)
