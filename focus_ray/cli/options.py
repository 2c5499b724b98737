"""Flags made from the fields of a configuration, so that each is described in one place.

A command takes ``engine: EngineConfig`` and is decorated with ``flags_of``; its command line then
has a flag for every field. What the user does not give is left to the model's defaults.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

Config = TypeVar("Config", bound=BaseModel)
Command = Callable[..., None]


def flags_of(
    model: type[BaseModel], parameter: str, names: Iterable[str]
) -> Callable[[Command], Command]:
    """Replace the keyword ``parameter`` of a command by one flag per field of ``model``.

    Args:
        names: the fields that get a flag, in the order of the help text.
    """
    fields = {name: model.model_fields[name] for name in names}

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_flags(**values: Any) -> None:
            given = {name: value for name in fields if _is_given(value := values.pop(name))}
            command(**values, **{parameter: from_flags(model, given)})

        signature = inspect.signature(command, eval_str=True)
        own = [value for name, value in signature.parameters.items() if name != parameter]
        flags = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=_annotation(name, field),
            )
            for name, field in fields.items()
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + flags
        with_flags.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_flags.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_flags

    return decorate


def from_flags(model: type[Config], given: dict[str, Any]) -> Config:
    """``model`` from what was given; a bad value is reported with its flag."""
    try:
        return model(**given)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise typer.BadParameter(message) from None
        flag = flag_of(str(first["loc"][0]))
        raise typer.BadParameter(f"{flag}: {message}, got {first['input']!r}") from None


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_given(value: Any) -> bool:
    return value is not None and value != []


def _annotation(name: str, field: FieldInfo) -> Any:
    """``Annotated[type | None, typer.Option(...)]``; lists for tuples, as flags repeat."""
    kind: Any = field.annotation
    choices = [part for part in get_args(kind) if part is not type(None)]
    optional = type(None) in get_args(kind)
    if optional and len(choices) == 1:
        kind = choices[0]
    if get_origin(kind) is Annotated:  # pydantic checks the bounds
        kind = get_args(kind)[0]
    if get_origin(kind) is tuple:
        kind = list[str]
    flag = flag_of(name)
    if kind is bool:
        flag = f"{flag}/--no-{name.replace('_', '-')}"
    default = field.get_default(call_default_factory=True)
    help_text = field.description or ""
    if default is not None and default != ():
        help_text += f" Default: {default}."
    return Annotated[kind | None, typer.Option(flag, help=help_text, show_default=False)]
