"""One record for generated tasks and prepared sets: nothing after them cares which it is."""

from __future__ import annotations

from typing import Any, NamedTuple

from occ_jax.config import Config, DatasetConfig
from occ_jax.data.chat import Message
from occ_jax.data.tokenizer import Tokenizer, encode_chat


class Example(NamedTuple):
    """One verifiable problem."""

    prompt: str | tuple[Message, ...]  # a problem's text, or the whole conversation as published
    answer: str  # the right one, as a verifier reads it
    source: str  # the task or prepared set it is of
    id: str  # unique within its source
    completion: str = ""  # a right one with every intermediate step, where known (digit tasks)


class Prompt(NamedTuple):
    """An example as the policy reads it."""

    example: Example
    tokens: tuple[int, ...]


def make_prompt(config: Config, tokenizer: Tokenizer, example: Example) -> Prompt:
    """Templates and tokenises; digit tasks and `dataset.chat` False take the text as it is.

    Raises:
        UserError: the tokenizer cannot spell the text, or has no chat template.
    """
    dataset = config.dataset
    if dataset.name and dataset.chat:
        variables: dict[str, Any] = (
            {} if dataset.thinking == "template" else {"enable_thinking": dataset.thinking == "on"}
        )
        tokens = encode_chat(tokenizer, _conversation(dataset, example), **variables)
    else:
        tokens = tokenizer.encode(prompt_text(config, example))
    return Prompt(example, tuple(tokens))


def prompt_text(config: Config, example: Example) -> str:
    """What is asked, without roles and special tokens: for people, logs and models without chat."""
    if not config.dataset.name and isinstance(example.prompt, str):
        return example.prompt
    return "\n\n".join(turn.content for turn in _conversation(config.dataset, example))


def _conversation(dataset: DatasetConfig, example: Example) -> tuple[Message, ...]:
    if isinstance(example.prompt, str):
        # Not str.format: problems and templates are full of LaTeX's braces.
        turns = (Message("user", dataset.template.replace("{problem}", example.prompt)),)
    else:
        turns = example.prompt
    if dataset.system and turns[0].role != "system":
        return (Message("system", dataset.system), *turns)
    return turns
