"""Files of ``focus-ray serve --config``: the arguments of the application, in YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from focus_ray.serve.args import ServeArgs


def load_args(path: Path) -> ServeArgs:
    """The arguments that a file holds.

    Raises:
        ValueError: it cannot be read, or what it says is wrong; the message names the file.
    """
    try:
        data = yaml.load(path.read_text(), _StrictLoader)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} holds no fields; write for example 'engine: {{model: sdar-tiny}}'"
        )
    if "applications" in data:
        raise ValueError(
            f"{path} is a configuration of Ray Serve; deploy it with 'serve deploy', or give the "
            "args of its application to --config"
        )
    try:
        return ServeArgs.model_validate(data)
    except ValidationError as error:
        words = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path}: {words}") from None


class _StrictLoader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """YAML lets a key come twice, and the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the field {key.value!r} stands twice", key.start_mark
                )
            names.add(str(key.value))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping
