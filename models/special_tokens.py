"""Ids of tokens that mean something to decoding, as a checkpoint's tokenizer files list them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from focus_ray.models.checkpoint import read_json

# SDAR's own files spell it in two ways, LLaDA2's in a third.
MASK_SPELLINGS = ("<|MASK|>", "<MASK>", "<|mask|>")


class SpecialTokens:
    """Read when first asked for: ``tokenizer.json`` is large, and most configs say enough.

    Args:
        path: folder of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def ids(self) -> dict[str, int]:
        """Every token that the files list beside the ordinary vocabulary."""
        return dict(self._listed())

    @cached_property
    def mask_token_id(self) -> int | None:
        """The mask's, under the name that the tokenizer gives it or a usual spelling."""
        own = self._named("mask_token")
        spellings = MASK_SPELLINGS if own is None else (own, *MASK_SPELLINGS)
        return next((self.ids[spelling] for spelling in spellings if spelling in self.ids), None)

    @cached_property
    def eos_token_id(self) -> int | None:
        """The end of a text, if the tokenizer names one."""
        own = self._named("eos_token")
        return None if own is None else self.ids.get(own)

    @cached_property
    def _settings(self) -> dict[str, object]:
        return read_json(self._path / "tokenizer_config.json") or {}

    def _named(self, name: str) -> str | None:
        token = self._settings.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        return token if isinstance(token, str) else None

    def _listed(self) -> Iterator[tuple[str, int]]:
        listed = read_json(self._path / "added_tokens.json") or {}
        yield from ((text, int(str(token_id))) for text, token_id in listed.items())
        entries = (read_json(self._path / "tokenizer.json") or {}).get("added_tokens")
        for entry in entries if isinstance(entries, list) else ():
            yield str(entry["content"]), int(entry["id"])
        decoder = self._settings.get("added_tokens_decoder")
        for token_id, entry in (decoder if isinstance(decoder, dict) else {}).items():
            yield str(entry["content"]), int(token_id)
