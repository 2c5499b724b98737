"""Lists of words and numbers: sort, reverse, copy, count, spell."""

from __future__ import annotations

import random
from collections.abc import Sequence

from focus_ray.tasks.task import Task, exact, final
from focus_ray.tasks.vocabulary import ANIMALS, THINGS, WORDS, invented_word


def sorting(rng: random.Random) -> Task:
    """Numbers up or down, words by alphabet."""
    if rng.random() < 0.65:
        values = rng.sample(range(1, rng.choice((20, 100, 100, 1000))), rng.randint(3, 8))
        descending = rng.random() < 0.4
        way = "descending" if descending else "ascending"
        ends = "largest to smallest" if descending else "smallest to largest"
        listed = ", ".join(map(str, values))
        question = rng.choice(
            (
                f"Sort these numbers in {way} order: {listed}",
                f"Arrange the numbers from {ends}: {listed}",
                f"Sort {listed} in {way} order.",
                f"Sort these numbers from {ends}: {listed}",
                *(() if descending else (f"Sort these numbers: {listed}", f"Sort {listed}")),
            )
        )
        answer = ", ".join(map(str, sorted(values, reverse=descending)))
        return exact("sorting", question, answer)
    words = rng.sample(WORDS, rng.randint(3, 7))
    listed = ", ".join(words)
    question = rng.choice(
        (
            f"Sort these words alphabetically: {listed}",
            f"Put the words in alphabetical order: {listed}",
            f"Sort these words: {listed}",
        )
    )
    return exact("sorting", question, ", ".join(sorted(words)))


def _words(rng: random.Random, low: int, high: int, invented: float) -> list[str]:
    return [
        invented_word(rng) if rng.random() < invented else rng.choice(WORDS)
        for _ in range(rng.randint(low, high))
    ]


def reversing(rng: random.Random) -> Task:
    """The words in the opposite order."""
    words = _words(rng, 3, 8, invented=0.2)
    separator = rng.choice((" ", " ", ", "))
    listed = separator.join(words)
    question = rng.choice(
        (
            f"Reverse the order of the words: {listed}",
            f"Write these words in reverse order: {listed}",
            f"Reverse this list of words: {listed}",
            f"Reverse this list: {listed}",
        )
    )
    return exact("reversing", question, separator.join(reversed(words)))


def copying(rng: random.Random) -> Task:
    """Repeat, pick the first or last, or put commas between."""
    words = _words(rng, 2, 8, invented=0.4)
    listed = " ".join(words)
    kind = rng.choice(("repeat", "first", "last", "commas", "upper"))
    if kind == "repeat":
        question = rng.choice((f"Repeat exactly: {listed}", f"Say the following: {listed}"))
        return exact("copying", question, listed)
    if kind == "commas":
        return exact("copying", f"Put a comma between these words: {listed}", ", ".join(words))
    if kind == "upper":
        words = words[:4]
        return exact(
            "copying",
            f"Capitalize each word: {' '.join(words)}",
            " ".join(map(str.capitalize, words)),
        )
    word = words[0] if kind == "first" else words[-1]
    return exact("copying", f"What is the {kind} word of: {listed}", word)


def counting(rng: random.Random) -> Task:
    """How often a word occurs, or how many words there are, counted aloud."""
    if rng.random() < 0.6:
        kinds = rng.sample([*(thing.one for thing in THINGS), *ANIMALS], rng.randint(2, 4))
        words = [rng.choice(kinds) for _ in range(rng.randint(5, 14))]
        wanted = rng.choice(kinds)
        listed = ", ".join(words)
        question = rng.choice(
            (
                f"How many times does the word {wanted} appear in this list: {listed}?",
                f"Count the word {wanted} in: {listed}",
                f"How often does {wanted} occur in: {listed}?",
            )
        )
        return final(
            "counting", question, _count_aloud(words, wanted, ", ", " "), words.count(wanted)
        )
    words = rng.sample(WORDS, rng.randint(3, 12))
    question = f"How many words are in this list: {', '.join(words)}?"
    counted = " ".join(f"{i + 1} {word}" for i, word in enumerate(words))
    return final("counting", question, f"Counting: {counted}.", len(words))


def spelling(rng: random.Random) -> Task:
    """A word with dashes, or how often a letter occurs in it."""
    word = rng.choice(WORDS) if rng.random() < 0.7 else invented_word(rng)
    if rng.random() < 0.5:
        question = rng.choice((f"Spell the word {word} with dashes.", f"How do you spell {word}?"))
        return exact("spelling", question, "-".join(word))
    letter = rng.choice(word)
    question = rng.choice(
        (
            f"How many times does the letter {letter} appear in {word}?",
            f"How many letters {letter} are in the word {word}?",
        )
    )
    return final("spelling", question, _count_aloud(word, letter, "-", ""), word.count(letter))


def _count_aloud(items: Sequence[str], wanted: str, separator: str, gap: str) -> str:
    """``a, b (1), c, b (2)``: every match carries its running number."""
    seen, said = 0, []
    for item in items:
        if item == wanted:
            seen += 1
            said.append(f"{item}{gap}({seen})")
        else:
            said.append(item)
    return separator.join(said)
