"""Chat templates: from messages to the text that a checkpoint was trained on.

A template is a program that comes with the weights, so it runs in jinja's sandbox and can read
only its arguments. Leaves tokenising to `occ_jax.data.tokenizer`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from occ_jax.errors import UserError, one_line


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


RenderChat = Callable[..., str]
"""(messages, *, add_generation_prompt=True, **variables) to text.

With a generation prompt, the text ends at the beginning of the model's turn.
"""


def load_chat_template(
    directory: Path, configured: Any, special_tokens: dict[str, str]
) -> RenderChat:
    """Loads the chat template of a checkpoint.

    Args:
        directory: the checkpoint; its chat_template.jinja takes precedence over `configured`.
        configured: "chat_template" of its tokenizer_config.json: a template, a list of named
            templates of which "default" is used, or None.
        special_tokens: variables for the template, such as {"bos_token": "<s>"}.

    Returns:
        A function that renders. It raises UserError if the checkpoint has no template, or if the
        template refuses the messages.

    Raises:
        UserError: the template is no valid program.
    """
    source, origin = configured, directory / "tokenizer_config.json"
    if (path := directory / "chat_template.jinja").is_file():
        source, origin = path.read_text(encoding="utf-8"), path
    elif isinstance(configured, list):
        source = {entry["name"]: entry["template"] for entry in configured}.get("default")
    render = None if source is None else _compile(source, origin)

    def render_chat(
        messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        if render is None:
            raise UserError(
                f"{directory} holds no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); set dataset.chat to False to use prompts as plain text"
            )
        context = {
            "messages": [message._asdict() for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **special_tokens,
            **variables,
        }
        try:
            return render(**context)
        except Exception as error:  # a template may raise anything
            raise UserError(
                f"the chat template of {origin} refuses a conversation of roles "
                f"{', '.join(message.role for message in messages)}: {one_line(error)}"
            ) from error

    return render_chat


def _compile(source: str, origin: Path) -> Callable[..., str]:
    """Compiles a template in the environment that templates are written for."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Ignores {% generation %}, which marks the model's text for loss masks of other code."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source).render
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template of {origin} is no valid program: line {error.lineno}: "
            f"{error.message}"
        ) from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
