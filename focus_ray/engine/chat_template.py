"""Render a checkpoint's chat template and keep apart what users wrote.

The template runs in Jinja's sandbox with the names that transformers offers to templates:
``raise_exception``, ``strftime_now``, a ``tojson`` that does not escape HTML, loop controls and
``generation`` blocks. No tokens here; see ``tokenizer.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from focus_ray.engine.user_text import ShadowAlphabet
from focus_ray.errors import CheckpointError, RequestRejected

Messages = Sequence[Mapping[str, Any]]

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})


class ChatTemplate:
    """One compiled template.

    Args:
        source: the Jinja text.
        alphabet: how user text is marked.
        named_tokens: spellings a template may ask for by name, as ``bos_token``.

    Raises:
        CheckpointError: the template is no valid Jinja.
    """

    def __init__(
        self, source: str, alphabet: ShadowAlphabet, named_tokens: Mapping[str, str]
    ) -> None:
        self._alphabet = alphabet
        self._named_tokens = dict(named_tokens)
        try:
            self._template = _environment(alphabet).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the checkpoint's chat template is no valid Jinja: line {error.lineno}: {error}"
            ) from error

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> str:
        """The conversation as text, its user-written characters in the shadow alphabet.

        Raises:
            RequestRejected: the template refuses the messages, or a string is no valid Unicode.
        """
        kwargs = dict(chat_template_kwargs or {})
        if taken := sorted(_RESERVED & kwargs.keys()):
            raise RequestRejected(
                f"chat_template_kwargs sets {', '.join(taken)}, which the request itself sets; "
                "leave it out",
                param="chat_template_kwargs",
            )
        guard = self._alphabet.guard
        try:
            values: dict[str, Any] = {
                "messages": guard([dict(m) for m in messages], "messages", "messages"),
                "tools": guard(
                    None if tools is None else [dict(t) for t in tools], "tools", "tools"
                ),
                "add_generation_prompt": add_generation_prompt,
            }
            for name, value in kwargs.items():
                path = f"chat_template_kwargs.{name}"
                values[name] = guard(value, path, "chat_template_kwargs")
            return self._template.render({**self._named_tokens, **values})
        except RequestRejected:
            raise
        except RecursionError:
            raise RequestRejected("messages are nested too deeply", param="messages") from None
        except Exception as error:  # whatever a template raises is about these messages
            words = self._alphabet.plain(str(error)) or type(error).__name__
            raise RequestRejected(
                f"the model's chat template refuses these messages: {words}", param="messages"
            ) from error


def _environment(alphabet: ShadowAlphabet) -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
    )

    def join(pieces: Iterable[str]) -> str:
        return alphabet.wrap("".join(pieces))

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(str(message))

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(alphabet.plain(format))

    # Macros and set blocks join their output with this; it keeps the marks of user text.
    environment.concat = join  # type: ignore[method-assign]
    environment.code_generator_class = _ConcatKeepsMarks
    environment.filters["tojson"] = alphabet.to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


class _ConcatKeepsMarks(CodeGenerator):
    """Compile ``a ~ b`` to the environment's own join."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _GenerationBlock(Extension):
    """``{% generation %}`` marks text for training; serving prints what it encloses."""

    tags = {"generation"}  # noqa: RUF012 - the type Jinja declares

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
