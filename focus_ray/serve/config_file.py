"""Files of ``focus-ray serve --config``: the arguments of the application, in YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from focus_ray.cluster.strict_yaml import load_documents
from focus_ray.serve.args import ServeArgs


def load_args(path: Path) -> ServeArgs:
    """The arguments that a file holds.

    Raises:
        ValueError: it cannot be read, or what it says is wrong; the message names the file.
    """
    documents = load_documents(path)
    if len(documents) > 1:
        raise ValueError(f"{path} holds {len(documents)} documents; leave one of them in it")
    data = documents[0] if documents else None
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} holds no fields; write for example 'engine: {{model: sdar-tiny}}'"
        )
    if "applications" in data:
        raise ValueError(
            f"{path} is a configuration of Ray Serve; deploy it with 'serve deploy', or give the "
            "args of its application to --config"
        )
    return checked_args(data, str(path))


def checked_args(data: Any, where: str) -> ServeArgs:
    """The arguments in ``data``, which stands ``where`` an error says.

    Raises:
        ValueError: what it says is wrong.
    """
    try:
        return ServeArgs.model_validate(data)
    except ValidationError as error:
        words = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {words}") from None
