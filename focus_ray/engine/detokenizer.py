"""Token ids of one completion to text that never changes once it is given out."""

from __future__ import annotations

from collections.abc import Sequence

from focus_ray.engine.tokenizer import Tokenizer
from focus_ray.sampling import SamplingParams


class Detokenizer:
    """Incremental decoding: the pieces together equal ``decode`` of all ids.

    Args:
        tokenizer: None gives no text at all.
        params: ``skip_special_tokens`` is what counts.
    """

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = params.skip_special_tokens
        self._token_ids: list[int] = []
        self._text_len = 0
        self._holds_back = False
        if tokenizer is not None:
            self._stream = tokenizer.new_decode_stream(params.skip_special_tokens)

    def append(self, token_ids: Sequence[int]) -> str:
        """Text that ``token_ids`` made final; part of a character is held back."""
        if self._tokenizer is None:
            return ""
        self._token_ids.extend(token_ids)
        text = ""
        for token_id in token_ids:
            piece = self._stream.step(token_id)
            self._holds_back = piece is None
            text += piece or ""
        self._text_len += len(text)
        return text

    def finish(self) -> str:
        """What is still held back, unfinished characters as U+FFFD."""
        if self._tokenizer is None or not self._holds_back:
            return ""
        self._holds_back = False
        whole = self._tokenizer.decode(self._token_ids, self._skip_special_tokens)
        return whole[self._text_len :]
