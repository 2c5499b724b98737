"""One-step problems, comparisons and shares: who has how many."""

from __future__ import annotations

import random

from focus_ray.tasks.vocabulary import CONTAINERS, people, person, thing
from focus_ray.tasks.word_problems.problem import Problem


def short_story(rng: random.Random) -> Problem:
    """The simplest problems: one sentence of given numbers, one question."""
    owner, friend = people(rng, 2)
    things = thing(rng)
    x, y = rng.randint(2, 60), rng.randint(2, 60)
    name, he, many = owner.name, owner.he, things.many
    kind = rng.randrange(5)
    if kind == 0:
        question = rng.choice(
            (
                f"{name} has {x} {many} and {friend.name} has {y}. How many {many} do they have "
                "together?",
                f"If {name} has {x} {many} and {friend.name} has {y} {many}, how many are there in "
                "total?",
                f"There are {x} {many} in one {rng.choice(CONTAINERS).one} and {y} in another. "
                f"How many {many} are there altogether?",
            )
        )
        return Problem(question, [f"Together there are {x} + {y} = {x + y} {many}."], x + y)
    if kind == 1:
        x, y = max(x, y) + 1, min(x, y)
        question = rng.choice(
            (
                f"{name} has {x} {many} and gives {y} to {friend.name}. How many are left?",
                f"{name} had {x} {many}. {owner.He} lost {y} of them. How many {many} does {he} "
                "have left?",
                f"If I have {x} {many} and give away {y}, how many do I have left?",
                f"There were {x} {many} on the table. {name} took {y}. How many remain?",
            )
        )
        return Problem(question, [f"That leaves {x} - {y} = {x - y} {many}."], x - y)
    if kind == 2:
        x, y = rng.randint(2, 20), rng.randint(2, 20)
        holder = rng.choice(CONTAINERS)
        question = rng.choice(
            (
                f"{name} has {x} {holder.many} with {y} {many} in each. How many {many} does {he} "
                "have?",
                f"There are {x} {holder.many}. Each {holder.one} has {y} {many}. How many {many} "
                "are there in total?",
                f"Each {holder.one} holds {y} {many}. How many {many} are in {x} {holder.many}?",
            )
        )
        step = f"There are {x} * {y} = {x * y} {many} in the {holder.many}."
        return Problem(question, [step], x * y)
    if kind == 3:
        each, friends = rng.randint(2, 20), rng.randint(2, 12)
        total = each * friends
        question = rng.choice(
            (
                f"{name} shares {total} {many} equally among {friends} friends. How many does each "
                "friend get?",
                f"{total} {many} are divided equally between {friends} children. How many {many} "
                "does each child get?",
                f"{name} puts {total} {many} into {friends} equal groups. How many are in each "
                "group?",
            )
        )
        step = f"Each one gets {total} / {friends} = {each} {many}."
        return Problem(question, [step], each)
    price, paid = rng.randint(2, 20), rng.randint(2, 12)
    cost = price * paid
    question = rng.choice(
        (
            f"One {things.one} costs ${price}. How much do {paid} {many} cost?",
            f"{name} buys {paid} {many} for ${price} each. How much does {he} pay?",
            f"If one {things.one} is {price} dollars, what is the price of {paid} {many}?",
        )
    )
    return Problem(question, [f"The cost is {paid} * {price} = {cost} dollars."], cost)


def comparison(rng: random.Random) -> Problem:
    """Three owners: a number, a multiple of it, and a bit more or fewer."""
    a, b, c = (person_.name for person_ in people(rng, 3))
    many = thing(rng).many
    x, factor = rng.randint(3, 30), rng.randint(2, 5)
    y = x * factor
    offset, more = rng.randint(1, y - 1), rng.random() < 0.5
    z = y + offset if more else y - offset
    times = "twice" if factor == 2 and rng.random() < 0.6 else f"{factor} times"
    question = (
        f"{a} has {x} {many}. {b} has {times} as many {many} as {a}. "
        f"{c} has {offset} {'more' if more else 'fewer'} than {b}."
    )
    steps = [
        f"{b} has {x} * {factor} = {y} {many}.",
        f"{c} has {y} {'+' if more else '-'} {offset} = {z} {many}.",
    ]
    if rng.random() < 0.5:
        return Problem(f"{question} How many {many} does {c} have?", steps, z)
    total = x + y + z
    steps += [f"{a} and {b} have {x} + {y} = {x + y}.", f"All three have {x + y} + {z} = {total}."]
    return Problem(f"{question} How many {many} do they have together?", steps, total)


def equal_shares(rng: random.Random) -> Problem:
    """Two days of collecting, shared equally; one friend already had some."""
    owner = person(rng)
    friends, each = rng.randint(2, 8), rng.randint(3, 25)
    total = friends * each
    monday, extra = rng.randint(2, total - 2), rng.randint(1, 20)
    many = thing(rng).many
    question = (
        f"{owner.name} collects {monday} {many} on Monday and {total - monday} {many} on Tuesday. "
        f"The {many} are shared equally among {friends} friends. One friend already had {extra}. "
        f"How many {many} does that friend have now?"
    )
    steps = [
        f"{owner.name} collects {monday} + {total - monday} = {total} {many}.",
        f"Each friend gets {total} / {friends} = {each}.",
        f"That friend now has {each} + {extra} = {each + extra} {many}.",
    ]
    return Problem(question, steps, each + extra)
