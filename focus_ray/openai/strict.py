"""JSON bodies read strictly: nothing is guessed, converted or ignored.

A request body is parsed once, from bytes, by pydantic's own JSON reader: broken JSON, broken
UTF-8, a lone surrogate, a number out of range or nesting without end are refused there. Types are
strict ("12" is not 12, true is not 1) and fields unknown to the model are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from focus_ray.errors import RequestRejected

MAX_QUOTED_CHARS = 80


class StrictModel(BaseModel):
    """A part of a request body. ``null`` means absent wherever a field has a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Body = TypeVar("Body", bound=StrictModel)
Item = TypeVar("Item")

# A list that is wrong in a million places is described once, at its first fault.
Listed = Annotated[list[Item], Field(fail_fast=True)]


def parse_body(model: type[Body], raw: bytes) -> Body:
    """Read a request body.

    Raises:
        RequestRejected: naming the first field at fault.
    """
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        refuse(error.errors(include_url=False))


def refuse(errors: Iterable[ErrorDetails], rename: dict[str, str] | None = None) -> NoReturn:
    """Raise the first of pydantic's findings in the API's words.

    Args:
        errors: as ``ValidationError.errors()`` gives them; at least one.
        rename: names the client used, by the names of the model that found the fault.
    """
    # An unknown field often explains the fault that stands before it: name that one first.
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestRejected):  # a rule over several fields, which names the one
        raise cause
    param = path_of(first["loc"], rename or {})
    raise RequestRejected(_sentence(first, param), param)


def shortened(text: str) -> str:
    """As much of a client's own text as an answer repeats."""
    return text if len(text) <= MAX_QUOTED_CHARS else f"{text[:MAX_QUOTED_CHARS]}..."


def neutral(*values: object) -> AfterValidator:
    """A parameter we know and do not support: accepted only where it changes nothing."""

    allowed = " or ".join(_quote(value) for value in values) or "null"

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            raise PydanticCustomError(
                "unsupported_value",
                "{value} is not supported; leave it out or send {neutral}",
                {"value": _quote(value), "neutral": allowed},
            )
        return value

    return AfterValidator(check)


def path_of(location: tuple[int | str, ...], rename: dict[str, str]) -> str | None:
    """``("messages", 0, "<list>", 1, "text")`` as ``messages[0][1].text``; None of the whole.

    Parts in angle brackets after the first are branches of a union, which no client ever wrote. A
    client's own names may be of any length; they are cut.
    """
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not path or not part.startswith("<"):
            name = shortened(part if path else rename.get(part, part))
            path += f".{name}" if path else name
    return path if location else None


def _sentence(error: ErrorDetails, param: str | None) -> str:
    message = error["msg"].removeprefix("Value error, ")
    match error["type"]:
        case "json_invalid":
            return f"The request body is not valid JSON: {message.removeprefix('Invalid JSON: ')}"
        case "model_type" if param is None:
            return "The request body must be a JSON object"
        case "extra_forbidden":
            return f"Unsupported parameter: {param!r}; this server does not know it"
        case "missing":
            return f"Missing required parameter: {param!r}"
        case "unsupported_value" | "wrong_type":
            return f"{param}: {message}"
    if param is None:  # a rule over several fields; its message names them
        return message
    return f"{param}: {message[:1].lower()}{message[1:]}, got {_quote(error['input'])}"


def _quote(value: object) -> str:
    return shortened(repr(value))
