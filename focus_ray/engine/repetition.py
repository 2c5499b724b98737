"""Notice that an output has begun to repeat itself. Token ids only.

The rule is that of ``RepetitionDetection``: for some pattern size in its range, the last
``min_count * size`` tokens are one pattern ``min_count`` times in a row. That is the same as saying
that each of the last ``(min_count - 1) * size`` tokens equals the one ``size`` places before it,
which is what is compared here.
"""

from __future__ import annotations

from collections.abc import Sequence

from focus_ray.sampling import RepetitionDetection


def is_repeating(token_ids: Sequence[int], rule: RepetitionDetection) -> bool:
    """Whether ``token_ids`` end in a repetition."""
    return _ends_in_repetition(token_ids, len(token_ids), rule)


def first_repetition(
    token_ids: Sequence[int], new_from: int, rule: RepetitionDetection
) -> int | None:
    """Where a repetition is first complete among tokens that arrived together.

    Args:
        token_ids: all tokens of the output.
        new_from: how many of them were looked at before.

    Returns:
        The number of tokens up to and including the one that completes the first repetition at or
        after ``new_from``; None if there is none.
    """
    for end in range(new_from + 1, len(token_ids) + 1):
        if _ends_in_repetition(token_ids, end, rule):
            return end
    return None


def _ends_in_repetition(token_ids: Sequence[int], end: int, rule: RepetitionDetection) -> bool:
    longest = min(rule.max_pattern_size, end // rule.min_count)
    for size in range(rule.min_pattern_size, longest + 1):
        if token_ids[end - 1] != token_ids[end - 1 - size]:
            continue  # settles nearly every size without copying
        start = end - (rule.min_count - 1) * size
        if token_ids[start:end] == token_ids[start - size : end - size]:
            return True
    return False
