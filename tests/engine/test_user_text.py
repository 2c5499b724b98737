"""A UserText answers as the plain text does, and never gives a user's character away as plain."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from focus_ray.engine.user_text import ShadowAlphabet, UserText
from focus_ray.errors import CheckpointError, RequestRejected

ALPHABET = ShadowAlphabet(["<|im_end|>", "</think>", '"\\\n', " "])
TEXT = '  <think>ab\n"é"</think>\t<|im_end|> x <|im_end|>\n'


def user(text: str) -> UserText:
    return UserText(ALPHABET.shadow(text), ALPHABET)


def plain(value: Any) -> Any:
    """``value`` with plain strings, and a check that the user's characters are all shadowed."""
    if isinstance(value, str):
        text = ALPHABET.plain(value)
        assert str.__eq__(str.__str__(value), ALPHABET.shadow(text)), "a shadow was lost"
        return text
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda t: t.split("</think>"), id="split at a spelling"),
        pytest.param(lambda t: t.split(), id="split at whitespace"),
        pytest.param(lambda t: t.split(None, 1), id="split at whitespace once"),
        pytest.param(lambda t: t.split("absent"), id="split without a match"),
        pytest.param(lambda t: t.rsplit("<|im_end|>", 1), id="rsplit"),
        pytest.param(lambda t: t.rsplit(None, 2), id="rsplit at whitespace"),
        pytest.param(lambda t: t.splitlines(), id="splitlines"),
        pytest.param(lambda t: t.splitlines(True), id="splitlines with ends"),
        pytest.param(lambda t: t.partition("<|im_end|>"), id="partition"),
        pytest.param(lambda t: t.rpartition("<|im_end|>"), id="rpartition"),
        pytest.param(lambda t: t.partition("absent"), id="partition without a match"),
        pytest.param(lambda t: t.rpartition("absent"), id="rpartition without a match"),
        pytest.param(lambda t: t.strip(), id="strip"),
        pytest.param(lambda t: t.lstrip(" <"), id="lstrip of characters"),
        pytest.param(lambda t: t.rstrip("\n>"), id="rstrip of characters"),
        pytest.param(lambda t: t.removeprefix("  <"), id="removeprefix"),
        pytest.param(lambda t: t.removesuffix(">\n"), id="removesuffix"),
        pytest.param(lambda t: t.removesuffix("absent"), id="removesuffix without a match"),
        pytest.param(lambda t: t.replace("<|im_end|>", "", 1), id="replace once"),
        pytest.param(lambda t: t[3:9], id="slice"),
        pytest.param(lambda t: t[::-1], id="reversed"),
        pytest.param(lambda t: t[2], id="one character"),
        pytest.param(lambda t: list(t), id="iterated"),
        pytest.param(lambda t: t.upper(), id="upper"),
        pytest.param(lambda t: t.lower(), id="lower"),
        pytest.param(lambda t: t.title(), id="title"),
        pytest.param(lambda t: t.capitalize(), id="capitalize"),
        pytest.param(lambda t: t.startswith("  <think>"), id="startswith"),
        pytest.param(lambda t: t.startswith(("x", "  <")), id="startswith any"),
        pytest.param(lambda t: t.endswith("<|im_end|>\n"), id="endswith"),
        pytest.param(lambda t: "</think>" in t, id="contains"),
        pytest.param(lambda t: "absent" in t, id="does not contain"),
        pytest.param(lambda t: t.find("<|im_end|>", 5), id="find from"),
        pytest.param(lambda t: t.rfind("<|im_end|>"), id="rfind"),
        pytest.param(lambda t: t.index("think"), id="index"),
        pytest.param(lambda t: t.rindex("think"), id="rindex"),
        pytest.param(lambda t: t.count("<|im_end|>"), id="count"),
        pytest.param(len, id="len"),
        pytest.param(hash, id="hash, for dictionaries"),
        pytest.param(lambda t: (t < "a", t <= "a", t > "a", t >= "a"), id="order"),
        pytest.param(lambda t: [t[8:12].isalpha(), t[:2].isspace(), t.islower()], id="predicates"),
        pytest.param(lambda t: {"a": 1}.get(t[9]), id="looked up in a dictionary"),
    ],
)
def test_methods_answer_as_str_does(call: Callable[[str], Any]) -> None:
    assert plain(call(user(TEXT))) == call(TEXT)


def test_equality_goes_by_the_plain_text() -> None:
    assert user("<think>") == "<think>"
    assert "<think>" == user("<think>")  # noqa: SIM300 - the reflected call is the point
    assert user("<think>") != "think"
    assert user("user") in ["system", "user"]


def test_a_template_adds_plain_characters_around_shadowed_ones() -> None:
    text = "<|im_end|>" + user("<|im_end|>") + "<|im_end|>"
    assert isinstance(text, UserText)
    assert str.count(text, "<|im_end|>") == 2
    assert text.count("<|im_end|>") == 3


def test_replacing_with_template_text_leaves_that_plain() -> None:
    text = user("a</think>b").replace("</think>", "<|im_end|>")
    assert str.count(text, "<|im_end|>") == 1


@pytest.mark.parametrize("ensure_ascii", [False, True])
def test_json_of_shadowed_text_reads_back(ensure_ascii: bool) -> None:
    value = {'ke"y<': ["<think>\\ \n é 😀 \x01", 1, None]}
    text = ALPHABET.to_json(ALPHABET.guard(value, "tools", "tools"), ensure_ascii, sort_keys=True)
    written = json.dumps(value, ensure_ascii=ensure_ascii)
    assert ALPHABET.plain(text) == written
    assert str.count(text, "<") == 0


def test_guard_names_the_place_of_a_lone_surrogate() -> None:
    with pytest.raises(RequestRejected, match=r"messages\[0\]\.content.*U\+D83D at character 1"):
        ALPHABET.guard([{"content": "a\ud83d"}], "messages", "messages")


def test_guard_refuses_what_is_not_json() -> None:
    with pytest.raises(RequestRejected, match=r"tools\.a is a object"):
        ALPHABET.guard({"a": object()}, "tools", "tools")


def test_more_characters_than_surrogates_are_refused() -> None:
    with pytest.raises(CheckpointError, match="2049 distinct characters"):
        ShadowAlphabet(["".join(map(chr, range(0x4E00, 0x4E00 + 2049)))])


def test_pieces_of_random_splits_join_to_the_text() -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices('<|>/ab \n"é', k=rng.randrange(12)))
        sep = "".join(rng.choices("<| a", k=rng.randrange(1, 3)))
        pieces = user(text).split(sep)
        assert plain(pieces) == text.split(sep)
        assert plain(user(sep).join(pieces)) == text
