"""Stop strings against a plain definition on the whole text, however it is split."""

from __future__ import annotations

import random

import pytest

from focus_ray.engine.stop_strings import StopStrings


def cut(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """The definition: the match that ends first, the longest of those that end together."""
    for end in range(1, len(text) + 1):
        for pattern in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(pattern):
                return text[: end if include else end - len(pattern)], pattern
    return text, None


def feed(stops: StopStrings, pieces: list[str]) -> str:
    shown = "".join(stops.append(piece) for piece in pieces)
    return shown + stops.finish()


@pytest.mark.parametrize(
    ("stop", "pieces", "shown", "matched"),
    [
        pytest.param([], ["ab", "c"], "abc", None, id="no stop strings"),
        pytest.param(["END"], ["a E", "N", "D b"], "a ", "END", id="over three pieces"),
        pytest.param(["END"], ["a E", "NE"], "a ENE", None, id="a beginning that came to nothing"),
        pytest.param(["aab"], ["aaab"], "a", "aab", id="overlapping beginnings"),
        pytest.param(["abcd", "bc"], ["abcd"], "a", "bc", id="the one complete first wins"),
        pytest.param(["b", "ab"], ["xab"], "x", "ab", id="the longest of those ending together"),
        pytest.param(["\n\n"], ["a\n", "\nb"], "a", "\n\n", id="newlines"),
        pytest.param(["好"], ["你", "好"], "你", "好", id="one wide character"),
        pytest.param(["a", "a"], ["ba"], "b", "a", id="the same string twice"),
    ],
)
def test_examples(stop: list[str], pieces: list[str], shown: str, matched: str | None) -> None:
    stops = StopStrings(stop)
    assert feed(stops, pieces) == shown
    assert stops.matched == matched


def test_stop_string_stays_in_the_text_on_request() -> None:
    stops = StopStrings(["END"], include=True)
    assert feed(stops, ["a EN", "D b"]) == "a END"


def test_nothing_is_shown_after_a_match() -> None:
    stops = StopStrings(["."])
    assert stops.append("a.b") == "a"
    assert stops.append("c") == ""
    assert stops.finish() == ""


def test_holds_back_no_more_than_a_possible_beginning() -> None:
    stops = StopStrings(["abc", "bd"])
    assert stops.append("xab") == "x"
    assert stops.append("x") == "abx"
    assert stops.append("b") == ""
    assert stops.finish() == "b"


def test_any_split_equals_the_definition() -> None:
    rng = random.Random(0)
    num_matched = 0
    for _ in range(3000):
        text = "".join(rng.choices("abc", weights=[5, 3, 1], k=rng.randrange(25)))
        stop = ["".join(rng.choices("abc", k=rng.randrange(1, 6))) for _ in range(rng.randrange(4))]
        include = rng.random() < 0.5
        edges = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(6)))
        starts, ends = [0, *edges], [*edges, len(text)]
        pieces = [text[a:b] for a, b in zip(starts, ends, strict=True)]
        stops = StopStrings(stop, include)
        assert (feed(stops, pieces), stops.matched) == cut(text, stop, include), (text, stop)
        num_matched += stops.matched is not None
    assert 500 < num_matched < 2500
