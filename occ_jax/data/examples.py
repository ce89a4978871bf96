"""The problem records that generated tasks and prepared sets share, and prompts made of them.

Leaves generating and reading problems to `occ_jax.data.tasks` and `occ_jax.data.prepared`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from occ_jax.config import Config, DatasetConfig
from occ_jax.data.chat import Message
from occ_jax.data.tokenizer import Tokenizer, encode_chat


class Example(NamedTuple):
    """One verifiable problem."""

    prompt: str | tuple[Message, ...]  # a problem's text, or the whole conversation as published
    answer: str  # the right answer, in the form that verifiers read
    source: str  # name of its task or prepared set
    id: str  # unique within its source
    completion: str = ""  # a right completion with every intermediate step (digit tasks only)


class Prompt(NamedTuple):
    """An example with the tokens that the policy reads."""

    example: Example
    tokens: tuple[int, ...]


def make_prompt(config: Config, tokenizer: Tokenizer, example: Example) -> Prompt:
    """Templates and tokenises an example; digit tasks and `dataset.chat` False use no template.

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
    """The prompt without roles and special tokens: for logs and for models without a template."""
    if not config.dataset.name and isinstance(example.prompt, str):
        return example.prompt
    return "\n\n".join(message.content for message in _conversation(config.dataset, example))


def _conversation(dataset: DatasetConfig, example: Example) -> tuple[Message, ...]:
    if isinstance(example.prompt, str):
        # Not str.format: problems and templates are full of LaTeX's braces.
        messages = (Message("user", dataset.template.replace("{problem}", example.prompt)),)
    else:
        messages = example.prompt
    if dataset.system and messages[0].role != "system":
        return (Message("system", dataset.system), *messages)
    return messages
