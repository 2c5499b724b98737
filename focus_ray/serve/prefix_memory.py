"""What one router remembers of the prompts it sent: whose beginning lies where.

Nothing is published by replicas. A replica may have dropped a prefix that is remembered here, and
may hold others that another router sent; either costs a prefill and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

MAX_CHUNKS_PER_REPLICA = 8192
"""Half a million tokens of prompts, in about a megabyte of memory."""


class PrefixMemory:
    """Chunk hashes by replica, those used longest ago forgotten first."""

    def __init__(self, max_chunks_per_replica: int = MAX_CHUNKS_PER_REPLICA) -> None:
        self._max_chunks = max_chunks_per_replica
        self._held: dict[str, OrderedDict[bytes, None]] = {}

    def remember(self, replica_id: str, chunks: Sequence[bytes]) -> None:
        """A prompt with these chunks was sent there."""
        held = self._held.setdefault(replica_id, OrderedDict())
        for chunk in reversed(chunks):  # so that the end of a prompt is forgotten before its start
            held[chunk] = None
            held.move_to_end(chunk)
        while len(held) > self._max_chunks:
            held.popitem(last=False)

    def num_held(self, replica_id: str, chunks: Sequence[bytes]) -> int:
        """How many of a prompt's first chunks were sent there before."""
        held = self._held.get(replica_id, ())
        if not chunks or chunks[0] not in held:  # as mostly
            return 0
        return next((place for place, chunk in enumerate(chunks) if chunk not in held), len(chunks))

    def retain(self, replica_ids: Collection[str]) -> None:
        """Forget all other replicas."""
        self._held = {name: held for name, held in self._held.items() if name in replica_ids}
