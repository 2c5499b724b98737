"""YAML documents, read strictly, and the values in them that are left for the user to set."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_PLACEHOLDER = re.compile(r"<[A-Z][A-Z0-9_]*>")
_REMARK = re.compile(r"#\s*SET:\s*(.*)")


def load_documents(path: Path) -> list[Any]:
    """All documents of a file that are not empty.

    Raises:
        ValueError: it cannot be read, is no YAML, or gives a field twice; the message names it.
    """
    try:
        text = path.read_text()
        documents = list(yaml.load_all(text, _StrictLoader))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    return [document for document in documents if document is not None]


@dataclass(frozen=True)
class Unset:
    """A value that its user has yet to write, such as ``<IMAGE>``."""

    line: int
    placeholder: str
    remark: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.placeholder} is not set: {self.remark}"


def is_unset(value: object) -> bool:
    """Whether a value is left for the user to set."""
    return isinstance(value, str) and bool(_PLACEHOLDER.search(value))


def unset_values(text: str) -> Iterator[Unset]:
    """Every ``<NAME>`` outside of comments, with what its ``# SET:`` says.

    A remark stands behind the value, or in a line of its own somewhere above it.
    """
    above = "see the head of the file"
    for number, line in enumerate(text.splitlines(), 1):
        code, hash_mark, comment = line.partition("#")
        remark = _REMARK.match(hash_mark + comment)
        for placeholder in dict.fromkeys(_PLACEHOLDER.findall(code)):
            yield Unset(number, placeholder, remark[1] if remark else above)
        if remark and not code.strip():
            above = remark[1]


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
