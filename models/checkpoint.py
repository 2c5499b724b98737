"""From the name of a checkpoint to a folder on this machine, and the JSON files in it."""

from __future__ import annotations

import json
import os
import re
from importlib.resources import files
from pathlib import Path

from huggingface_hub import snapshot_download

from focus_ray.errors import CheckpointError

CONFIG_FILE = "config.json"

# Weights, configuration, tokenizer and chat template; never code.
DOWNLOAD_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def bundled_models() -> tuple[str, ...]:
    """Names of the models that come with this package."""
    return tuple(
        sorted(
            folder.name
            for folder in _bundled_folder().glob("*")
            if (folder / CONFIG_FILE).is_file()
        )
    )


def resolve_checkpoint(name: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint, downloaded first if ``name`` is a hub id.

    Args:
        name: a bundled name, else a local directory, else ``owner/name`` on the Hugging Face hub.
        revision: branch, tag or commit on the hub; without meaning for the other two.

    Returns:
        A folder that holds ``config.json``.

    Raises:
        CheckpointError: nothing of that name; says what was tried.
    """
    if name in bundled_models():
        return _bundled_folder() / name
    tried = [f"bundled models ({', '.join(bundled_models()) or 'none'})"]
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            raise CheckpointError(f"directory {folder} holds no {CONFIG_FILE}")
        return folder
    tried.append(f"directory {folder}")
    if _HUB_ID.fullmatch(name):
        try:
            return Path(
                snapshot_download(name, revision=revision, allow_patterns=list(DOWNLOAD_PATTERNS))
            )
        except Exception as error:  # the hub client's errors have no common base
            offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
            raise CheckpointError(
                f"no checkpoint {name!r}: tried {', '.join(tried)}, and the Hugging Face hub"
                f"{offline}, which said: {error}"
            ) from error
    raise CheckpointError(
        f"no checkpoint {name!r}: tried {', '.join(tried)}; a hub id has the form owner/name"
    )


def read_json(path: Path) -> dict[str, object] | None:
    """The object in a JSON file; None if there is no such file.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _bundled_folder() -> Path:
    return Path(str(files("focus_ray.models"))) / "bundled"
