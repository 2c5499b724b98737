"""Read the tokenizer files of a checkpoint: JSON in, one frozen value out, no remote code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focus_ray.errors import CheckpointError

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_UNNAMED_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says about its tokenizer.

    Args:
        definition: ``tokenizer.json``, with the added tokens of ``tokenizer_config.json`` that it
            lacks, and with every token named below marked special.
        named_tokens: spellings by role, as ``eos_token``.
        aliases: further spellings of added tokens, with their ids (``added_tokens.json``).
        chat_templates: Jinja sources by name; the usual one is called ``default``.
    """

    definition: dict[str, Any]
    named_tokens: Mapping[str, str]
    aliases: Mapping[str, int]
    chat_templates: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles | None:
        """The files of ``folder``; None if it holds no tokenizer at all.

        Raises:
            CheckpointError: a file cannot be read, or only a slow tokenizer's files are there.
        """
        if not (folder / "tokenizer.json").is_file():
            other = [
                name
                for name in ("tokenizer_config.json", "vocab.json", "tokenizer.model", "vocab.txt")
                if (folder / name).is_file()
            ]
            if not other:
                return None
            raise CheckpointError(
                f"{folder} holds {', '.join(other)} but no tokenizer.json; save the fast tokenizer "
                "there with transformers' save_pretrained"
            )
        definition = _read_object(folder / "tokenizer.json")
        config = _read_object(folder / "tokenizer_config.json")
        roles = _read_object(folder / "special_tokens_map.json") | config
        aliases = _read_object(folder / "added_tokens.json")
        named_tokens = {
            role: spelling for role in _NAMED_TOKENS if (spelling := _spelling(roles.get(role)))
        }
        specials = set(named_tokens.values())
        for name in _UNNAMED_TOKEN_LISTS:
            listed = roles.get(name) or []
            specials.update(
                _spelling(token)
                for token in (listed.values() if isinstance(listed, dict) else listed)
            )
        _add_missing(definition, config.get("added_tokens_decoder") or {})
        for token in definition["added_tokens"]:
            token["special"] = token["special"] or token["content"] in specials
        return cls(definition, named_tokens, aliases, _chat_templates(folder, config))


def _add_missing(definition: dict[str, Any], decoder: Mapping[str, Mapping[str, Any]]) -> None:
    """Append the added tokens that only ``added_tokens_decoder`` of the config knows.

    Where both name an id but spell it differently, ``tokenizer.json`` wins.
    """
    tokens: list[dict[str, Any]] = definition.setdefault("added_tokens", [])
    ids = {token["id"] for token in tokens}
    spellings = {token["content"] for token in tokens}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for token_id, token in decoder.items():
        if int(token_id) not in ids and token["content"] not in spellings:
            known = {name: value for name, value in token.items() if not name.startswith("__")}
            tokens.append(flags | {"special": False} | known | {"id": int(token_id)})
    tokens.sort(key=lambda token: token["id"])


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    file = folder / "chat_template.jinja"
    if file.is_file():  # as transformers: the file wins
        return {"default": file.read_text(encoding="utf-8")}
    templates = config.get("chat_template")
    if isinstance(templates, str):
        return {"default": templates}
    return {entry["name"]: entry["template"] for entry in templates or []}


def _spelling(token: Any) -> str:
    """The text of a token given as a string or as the object transformers writes; '' if none."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object")
    return value
