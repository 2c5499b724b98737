"""What is wrong with a configuration, in sentences: field, value, remedy. Never a secret."""

from __future__ import annotations

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from focus_ray.openai.strict import path_of, shortened

SECRET_FIELDS = {"api_keys", "api_key_hashes"}


def in_words(error: ValidationError) -> str:
    """All findings, separated by semicolons."""
    return "; ".join(map(_sentence, error.errors(include_url=False)))


def _sentence(error: ErrorDetails) -> str:
    path, message = path_of(error["loc"], {}), error["msg"].removeprefix("Value error, ")
    if path is None:
        return message
    if error["type"] == "extra_forbidden":
        return f"{path}: no such field; correct its name or leave it out"
    sentence = f"{path}: {message[:1].lower()}{message[1:]}"
    # Rules of ours quote the value where it helps, and a missing one is not there to be quoted.
    if error["type"] in ("value_error", "missing") or error["loc"][0] in SECRET_FIELDS:
        return sentence
    return f"{sentence}, got {shortened(repr(error['input']))}"
