"""What one router has sent and not yet seen end. Clocks are the router's own.

Serve tells of a request in this order, mostly: chosen, routed (the replica accepted), completed.
But a request that was rejected is completed without having been routed, one that is quick may be
completed before it is routed, and one that is cancelled while it waits is never heard of again.
Calls of one HTTP request share their Serve id, which is all that ``completed`` brings.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import NamedTuple

MAX_AGE_S = 900.0
"""Nobody waits longer for an answer; what is older was lost."""


@dataclass(frozen=True)
class Sent:
    """A request at a replica.

    Args:
        name: ours, unique.
        call_id: Serve's, which several may share.
        tokens: what its sequences add to a step.
        prefill: what computing its prompt adds, spread over its steps.
        pages: KV pages it takes at first.
        num_sequences: its completions.
        at_s: when it was sent.
    """

    name: str
    call_id: str
    replica_id: str
    tokens: float
    prefill: float
    pages: int
    num_sequences: int
    at_s: float


class Unseen(NamedTuple):
    """Changes at a replica that what it published does not know; negative where more ended."""

    tokens: float = 0.0
    prefill: float = 0.0
    pages: int = 0


NOTHING = Unseen()


@dataclass
class _Call:
    """Open requests that share an id of Serve's, and completions told before their routing."""

    open: dict[str, Sent] = field(default_factory=dict)
    early: Counter[str] = field(default_factory=Counter)


class _Changes:
    """Requests that came and went at a replica, until what it published knows of them."""

    def __init__(self) -> None:
        self.num_open = 0
        self._recent: deque[tuple[float, int, Sent]] = deque()
        self._tokens = 0.0
        self._prefill = 0.0
        self._pages = 0

    def add(self, at_s: float, sign: int, sent: Sent) -> None:
        self.num_open += sign * sent.num_sequences
        self._recent.append((at_s, sign, sent))
        self._sum(sign, sent)

    def since(self, since_s: float) -> Unseen:
        """Forgets what was before."""
        while self._recent and self._recent[0][0] <= since_s:
            _, sign, sent = self._recent.popleft()
            self._sum(-sign, sent)
        return Unseen(self._tokens, self._prefill, self._pages) if self._recent else NOTHING

    def _sum(self, sign: int, sent: Sent) -> None:
        self._tokens += sign * sent.tokens
        self._prefill += sign * sent.prefill
        self._pages += sign * sent.pages


class RoutingLedger:
    """Open requests by name and by call, in the order of sending; changes by replica."""

    def __init__(self) -> None:
        self._open: dict[str, Sent] = {}
        self._calls: defaultdict[str, _Call] = defaultdict(_Call)
        self._changes: defaultdict[str, _Changes] = defaultdict(_Changes)

    def choose(self, sent: Sent) -> None:
        """Count a request where it is about to be sent, in place of where it was before."""
        self._forget(sent.name, sent.at_s)
        call = self._calls[sent.call_id]
        call.early.pop(sent.replica_id, None)  # of an attempt that was rejected
        call.open[sent.name] = sent
        self._open[sent.name] = sent
        self._changes[sent.replica_id].add(sent.at_s, 1, sent)
        self._sweep(sent.at_s)

    def routed(self, name: str, replica_id: str, now_s: float) -> None:
        """The replica accepted."""
        sent = self._open.get(name)
        if sent is None:
            return
        early = self._calls[sent.call_id].early
        if early[replica_id]:
            early[replica_id] -= 1
            self._forget(name, now_s)
        elif sent.replica_id != replica_id:
            self.choose(replace(sent, replica_id=replica_id, at_s=now_s))

    def completed(self, replica_id: str, call_id: str, now_s: float) -> None:
        """One of a call's requests ended there, or was rejected."""
        call = self._calls.get(call_id)
        if call is None:  # it was no request that is counted, or ended already
            return
        sent = next((sent for sent in call.open.values() if sent.replica_id == replica_id), None)
        if sent is None:
            call.early[replica_id] += 1
        else:
            self._forget(sent.name, now_s)

    def unseen(self, replica_id: str, since_s: float) -> Unseen:
        """What came and went after ``since_s``, which must not go back from call to call."""
        return self._changes[replica_id].since(since_s)

    def num_open(self, replica_id: str) -> int:
        """Sequences sent there that have not ended."""
        return self._changes[replica_id].num_open

    def retain(self, replica_ids: Collection[str]) -> None:
        """Forget what was sent to others: it ended with them."""
        gone = self._changes.keys() - set(replica_ids)
        if not gone:
            return
        for name in [sent.name for sent in self._open.values() if sent.replica_id in gone]:
            self._forget(name, 0.0)
        for replica_id in gone:
            del self._changes[replica_id]

    def _forget(self, name: str, now_s: float) -> None:
        sent = self._open.pop(name, None)
        if sent is None:
            return
        self._changes[sent.replica_id].add(now_s, -1, sent)
        call = self._calls[sent.call_id]
        del call.open[name]
        if not call.open:
            del self._calls[sent.call_id]

    def _sweep(self, now_s: float) -> None:
        while (oldest := next(iter(self._open.values()))).at_s < now_s - MAX_AGE_S:
            self._forget(oldest.name, now_s)
