"""Cut a text stream at the first stop string, however the stream is split. Text only.

The stop string that is complete first ends the text; where several end at the same character, the
longest does. Each stop string is matched by a Knuth-Morris-Pratt automaton, so a character costs
constant time and the state between two pieces is one number per stop string.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one completion.

    Args:
        stop: non-empty strings that end the text.
        include: leave the stop string that matched at the end of the text.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        self._automata = [_Automaton(pattern) for pattern in sorted(stop, key=len, reverse=True)]
        self._first_characters = {pattern[0] for pattern in stop}
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def append(self, text: str) -> str:
        """Take up new text; return what may be shown now.

        Text that may be the beginning of a stop string is held back. After a match, which
        ``matched`` tells, nothing more is shown.
        """
        if self.matched is not None:
            return ""
        if not self._held and self._first_characters.isdisjoint(text):
            return text
        pending = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            for automaton in self._automata:
                if automaton.completes(character) and self.matched is None:
                    self.matched = automaton.pattern
            if self.matched is not None:
                self._held = ""
                return pending[: end if self._include else end - len(self.matched)]
        shown = len(pending) - max(automaton.matched_len for automaton in self._automata)
        self._held = pending[shown:]
        return pending[:shown]

    def finish(self) -> str:
        """Return what is still held back: no more text will come."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """How much of ``pattern`` the text read so far ends with."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched_len = 0
        self._fallback = [0]  # by matched_len - 1: the next shorter beginning that still fits
        for character in pattern[1:]:
            fit = self._fit(self._fallback[-1], character)
            self._fallback.append(fit)

    def completes(self, character: str) -> bool:
        """Read one character; True if the pattern ends with it. Not to be read on after that."""
        self.matched_len = self._fit(self.matched_len, character)
        return self.matched_len == len(self.pattern)

    def _fit(self, matched_len: int, character: str) -> int:
        while matched_len and self.pattern[matched_len] != character:
            matched_len = self._fallback[matched_len - 1]
        return matched_len + (self.pattern[matched_len] == character)
