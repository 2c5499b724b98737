"""What a router knows of a request before any replica has seen it. Bytes, not tokens.

The tokenizer lives in the replicas (decision 3), so lengths of texts are estimates here, and a
prompt's beginning is recognised by the hashes of its pieces.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

from focus_ray.openai.messages import ChatPrompt, Prompt, Submission, TextPrompt, TokenPrompt

BYTES_PER_TOKEN = 4
"""Of text in UTF-8, roughly, over languages and tokenizers."""

CHUNK_TOKENS = 64
MAX_CHUNKS = 256
"""Prompts are told apart by so many chunks; what lies behind them is not looked at."""

BYTES_PER_ID = 4
HASH_BYTES = 8


@dataclass(frozen=True)
class RequestFacts:
    """One submission, as routers weigh it.

    Args:
        prompt_tokens: length of the prompt, estimated where it is text.
        max_tokens: most tokens of a completion; None where only the context ends it.
        num_completions: sequences that it becomes.
        chunks: hashes of the prompt's chunks, each of everything up to its end, so that equal
            hashes mean equal beginnings.
        session: key of requests that belong together, if the client gave one.
    """

    prompt_tokens: int = 0
    max_tokens: int | None = None
    num_completions: int = 1
    chunks: tuple[bytes, ...] = ()
    session: str | None = None


def facts_of(submission: Submission) -> RequestFacts:
    """What routing needs to know of a submission."""
    kind, content, unit = _as_bytes(submission.prompt)
    return RequestFacts(
        prompt_tokens=-(-len(content) // unit),
        max_tokens=submission.params.max_tokens,
        num_completions=submission.params.n,
        chunks=tuple(_chain(kind, content, unit * CHUNK_TOKENS)),
        session=submission.session,
    )


def _as_bytes(prompt: Prompt) -> tuple[bytes, bytes, int]:
    """A prompt's kind, its content, and the bytes that a token of it takes.

    The content of a conversation that goes on begins with that of the conversation before.
    """
    match prompt:
        case TokenPrompt(token_ids):
            content = b"".join(token.to_bytes(BYTES_PER_ID) for token in token_ids)
            return b"ids", content, BYTES_PER_ID
        case TextPrompt(text, add_special_tokens):
            kind = b"framed text" if add_special_tokens else b"text"
            return kind, _utf8(text), BYTES_PER_TOKEN
        case ChatPrompt(messages, _, template_kwargs):
            turns = ("\x1e".join(itertools.chain(*turn.items())) for turn in messages)
            kind = b"chat" + _utf8(repr(sorted(template_kwargs.items())))
            return kind, _utf8("\x1d".join(turns)), BYTES_PER_TOKEN


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _chain(kind: bytes, content: bytes, chunk_bytes: int) -> Iterator[bytes]:
    """Hashes of whole chunks, each of the chunk and the hash before it."""
    before = blake2b(kind, digest_size=HASH_BYTES).digest()
    last = min(len(content), MAX_CHUNKS * chunk_bytes) - chunk_bytes
    for start in range(0, last + 1, chunk_bytes):
        chunk = content[start : start + chunk_bytes]
        before = blake2b(before + chunk, digest_size=HASH_BYTES).digest()
        yield before
