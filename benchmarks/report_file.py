"""What a benchmark found, as a file."""

from __future__ import annotations

import json
from pathlib import Path


def write_json(path: Path, found: object) -> None:
    """All numbers; folders are made."""
    write_text(path, json.dumps(found, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text, such as a picture as SVG; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def refuse_folder(flag: str, path: Path | None) -> None:
    """Refuse what cannot become a file, before anything is measured.

    Raises:
        ValueError: names the flag.
    """
    if path is not None and path.is_dir():
        raise ValueError(f"{flag} {path} is a folder; give the name of a file")
