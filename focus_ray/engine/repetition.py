"""Notice that an output has begun to repeat itself. Token ids only.

The rule is that of ``RepetitionDetection``: for some pattern size in its range, the last
``min_count * size`` tokens are one pattern ``min_count`` times in a row. That is the same as saying
that each of the last ``(min_count - 1) * size`` tokens equals the one ``size`` places before it.
How many in a row do is counted for every size at once (S sizes), so that a token costs the same
whatever came before: looking back instead took 3 ms a token where a client asked for the widest
rule and the output almost repeated itself.
"""

from __future__ import annotations

import numpy as np

from focus_ray.sampling import RepetitionDetection


class RepetitionWatch:
    """Watches one completion, from its first token on."""

    def __init__(self, rule: RepetitionDetection) -> None:
        sizes_S = np.arange(rule.min_pattern_size, rule.max_pattern_size + 1)
        self._needed_S = (rule.min_count - 1) * sizes_S
        self._equal_S = np.zeros_like(sizes_S)  # tokens in a row that equal the one a size before
        self._newest_first = np.full(rule.max_pattern_size, -1)
        self._shortest = rule.min_pattern_size

    def append(self, token_id: int) -> bool:
        """Take up a token; True if the tokens so far end in a repetition."""
        before_S = self._newest_first[self._shortest - 1 :]
        self._equal_S = (self._equal_S + 1) * (before_S == token_id)
        self._newest_first[1:] = self._newest_first[:-1]
        self._newest_first[0] = token_id
        return bool((self._equal_S >= self._needed_S).any())
