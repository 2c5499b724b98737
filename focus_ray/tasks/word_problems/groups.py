"""Problems about rows, passengers, batches, shelves and animals."""

from __future__ import annotations

import random

from focus_ray.tasks.vocabulary import person, thing
from focus_ray.tasks.word_problems.problem import Problem
from focus_ray.tasks.wording import capitalize


def seats(rng: random.Random) -> Problem:
    """Rows of seats, some empty, people in groups."""
    rows, columns = rng.randint(3, 9), rng.randint(3, 9)
    total = rows * columns
    empty = rng.randint(1, min(12, total - 6))
    taken = total - empty
    hall = rng.choice(("classroom", "hall", "theater", "bus"))
    question = f"A {hall} has {rows} rows of {columns} seats. {empty} seats are empty."
    steps = [
        f"There are {rows} * {columns} = {total} seats.",
        f"Of these, {total} - {empty} = {taken} seats are taken.",
    ]
    divisors = [size for size in range(2, 10) if taken % size == 0]
    if divisors and rng.random() < 0.6:
        size = rng.choice(divisors)
        steps.append(
            f"With {size} people in each group there are {taken} / {size} = {taken // size}."
        )
        question += f" The people form groups of {size}. How many groups are there?"
        return Problem(question, steps, taken // size)
    return Problem(f"{question} How many seats are taken?", steps, taken)


def baking(rng: random.Random) -> Problem:
    """Batches, then two ways of losing some."""
    baker = person(rng)
    sweets = rng.choice("cookies muffins cupcakes rolls pancakes".split())
    batches, each = rng.randint(2, 9), rng.randint(6, 24)
    total = batches * each
    eaten = rng.randint(2, total // 2)
    given = rng.randint(2, total - eaten - 1)
    question = rng.choice(
        (
            f"{baker.name} bakes {batches} batches of {sweets} with {each} {sweets} in each batch. "
            f"{baker.He} eats {eaten} and gives {given} to the neighbors. How many {sweets} are "
            "left?",
            f"{baker.name} made {batches} trays of {each} {sweets}. {baker.He} sold {eaten} of "
            "them "
            f"and gave away {given}. How many {sweets} does {baker.he} still have?",
        )
    )
    first = total - eaten
    steps = [
        f"{baker.name} makes {batches} * {each} = {total} {sweets}.",
        f"Taking away {eaten} leaves {total} - {eaten} = {first}.",
        f"Taking away {given} leaves {first} - {given} = {first - given}.",
    ]
    return Problem(question, steps, first - given)


def passengers(rng: random.Random) -> Problem:
    """People get on and off."""
    aboard = rng.randint(5, 40)
    vehicle = rng.choice(("bus", "train", "boat"))
    sentences = [
        rng.choice(
            (
                f"A {vehicle} starts with {aboard} passengers.",
                f"There are {aboard} people on a {vehicle}.",
            )
        )
    ]
    steps = [f"It starts with {aboard} passengers."]
    for stop in ("first", "second", "third")[: rng.randint(1, 3)]:
        off, on = rng.randint(1, max(1, aboard - 2)), rng.randint(1, 20)
        sentences.append(f"At the {stop} stop, {off} get off and {on} get on.")
        steps.append(f"{capitalize(stop)} stop: {aboard} - {off} = {aboard - off}.")
        steps.append(f"Then {aboard - off} + {on} = {aboard - off + on}.")
        aboard += on - off
    ask = rng.choice(
        (f"How many passengers are on the {vehicle} now?", "How many passengers are there now?")
    )
    return Problem(" ".join([*sentences, ask]), steps, aboard)


def fraction(rng: random.Random) -> Problem:
    """A half to a fifth given away, some more lost."""
    owner = person(rng)
    many = thing(rng).many
    divisor = rng.choice((2, 3, 4, 5))
    name = {2: "half", 3: "one third", 4: "one quarter", 5: "one fifth"}[divisor]
    part = rng.randint(4, 40)
    total = divisor * part
    rest = total - part
    lost = rng.randint(1, rest - 1)
    relative = rng.choice(("sister", "teacher", "friend", "neighbor"))
    steps = [f"{capitalize(name)} of {total} is {total} / {divisor} = {part}."]
    if rng.random() < 0.15:
        return Problem(f"What is {name} of {total}?", steps, part)
    question = (
        f"{owner.name} has {total} {many}. {owner.He} gives {name} of them to {owner.his} "
        f"{relative} "
        f"and then loses {lost}. How many {many} are left?"
    )
    steps += [
        f"That leaves {total} - {part} = {rest}.",
        f"After losing {lost} there are {rest} - {lost} = {rest - lost}.",
    ]
    return Problem(question, steps, rest - lost)


def legs(rng: random.Random) -> Problem:
    """Animals with two and with four legs."""
    two, four = rng.choice(
        (("chickens", "cows"), ("ducks", "goats"), ("geese", "sheep"), ("turkeys", "horses"))
    )
    x, y = rng.randint(2, 30), rng.randint(2, 20)
    question = rng.choice(
        (
            f"A farmer has {x} {two} and {y} {four}. How many legs do the animals have in total?",
            f"There are {x} {two} and {y} {four} on a farm. How many legs are there altogether?",
        )
    )
    steps = [
        f"The {two} have {x} * 2 = {x * 2} legs.",
        f"The {four} have {y} * 4 = {y * 4} legs.",
        f"In total there are {x * 2} + {y * 4} = {x * 2 + y * 4} legs.",
    ]
    return Problem(question, steps, x * 2 + y * 4)


def library(rng: random.Random) -> Problem:
    """Shelves of books, some borrowed, some returned."""
    shelves, each = rng.randint(3, 15), rng.randint(5, 30)
    total = shelves * each
    borrowed = rng.randint(5, min(60, total - 1))
    returned = rng.randint(1, borrowed)
    question = (
        f"A library has {shelves} shelves with {each} books on each shelf. People borrow "
        f"{borrowed} "
        f"books and return {returned} of them. How many books are in the library now?"
    )
    out = total - borrowed
    steps = [
        f"The shelves hold {shelves} * {each} = {total} books.",
        f"After {borrowed} are borrowed there are {total} - {borrowed} = {out}.",
        f"After {returned} are returned there are {out} + {returned} = {out + returned}.",
    ]
    return Problem(question, steps, out + returned)


def packing(rng: random.Random) -> Problem:
    """How many containers hold a given number."""
    many = thing(rng).many
    each, needed = rng.randint(2, 12), rng.randint(2, 15)
    total = each * needed
    question = rng.choice(
        (
            f"A box holds {each} {many}. How many boxes are needed for {total} {many}?",
            f"{person(rng).name} has {total} {many} and puts {each} into each bag. How many bags "
            "are "
            "filled?",
        )
    )
    return Problem(question, [f"That takes {total} / {each} = {needed}."], needed)
