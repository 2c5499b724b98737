"""Stories of one pile of things that grows and shrinks, told in many ways.

These are the problems people make up themselves, so verbs, tense, person, sentence joints and
order vary most here.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from focus_ray.tasks.vocabulary import CONTAINERS, Noun, Person, people, thing
from focus_ray.tasks.word_problems.problem import Problem
from focus_ray.tasks.wording import capitalize, join


class Event(NamedTuple):
    """Something that happens to the pile.

    ``clause`` has no subject (``"gives 4 to Anna"``) unless ``own_subject``; ``steps`` say in the
    solution how the count changes to ``count``.
    """

    clause: str
    steps: list[str]
    total: int
    own_subject: bool = False


@dataclass(frozen=True)
class Telling:
    """Who owns the pile, in the question and in the solution, and in which tense it is told."""

    owner: Person
    things: Noun
    past: bool
    first_person: bool
    friends: list[Person]

    def verb(self, present: str, past: str) -> str:
        return past if self.past else present

    @property
    def subject(self) -> str:
        return "I" if self.first_person else self.owner.name

    @property
    def pronoun(self) -> str:
        return "I" if self.first_person else self.owner.He

    @property
    def him(self) -> str:
        return "me" if self.first_person else self.owner.him

    @property
    def his(self) -> str:
        return "my" if self.first_person else self.owner.his

    @property
    def solver_subject(self) -> str:
        return "You" if self.first_person else self.owner.name

    @property
    def solver_he(self) -> str:
        return "you" if self.first_person else self.owner.he

    @property
    def has(self) -> str:
        return "have" if self.first_person else "has"


def _gains(rng: random.Random, tell: Telling, count: int) -> Event:
    more = rng.randint(2, 40)
    things, verb = tell.things.many, tell.verb
    found_at = rng.choice(("at school", "in the park", "under the bed", "in a drawer", "at home"))
    clause = rng.choice(
        (
            f"{verb('buys', 'bought')} {more} more",
            f"{verb('buys', 'bought')} {more} more {things}",
            f"{verb('gets', 'got')} another {more}",
            f"{verb('finds', 'found')} {more} {things} {found_at}",
            f"{verb('wins', 'won')} {more} more {things}",
            f"{verb('picks', 'picked')} {more} more",
            f"{verb('receives', 'received')} {more} {things} from {tell.friends[0].name}",
        )
    )
    total = count + more
    step = rng.choice(
        (
            f"With {more} more, {tell.solver_he} {tell.has} {count} + {more} = {total} {things}.",
            f"{capitalize(tell.solver_he)} {tell.has} {more} more now: {count} + {more} = {total}.",
            f"Adding {more} makes {count} + {more} = {total}.",
        )
    )
    return Event(clause, [step], total)


def _friend_gives(rng: random.Random, tell: Telling, count: int) -> Event:
    more, friend, things = rng.randint(2, 30), tell.friends[0].name, tell.things.many
    gives = tell.verb("gives", "gave")
    clause = rng.choice(
        (
            f"{friend} {gives} {tell.him} {more} more",
            f"{friend} {gives} {tell.him} {more} {things}",
            f"then {friend} {gives} {tell.him} another {more} {things}",
        )
    )
    total = count + more
    step = f"{friend} adds {more}, so {count} + {more} = {total}."
    return Event(clause, [step], total, own_subject=True)


def _gives(rng: random.Random, tell: Telling, count: int) -> Event:
    away, friend, things = rng.randint(1, count - 2), tell.friends[1].name, tell.things.many
    gives = tell.verb("gives", "gave")
    clause = rng.choice(
        (
            f"{gives} {away} of them to {friend}",
            f"{gives} {away} to {friend}",
            f"{gives} {friend} {away} {things}",
            f"{gives} away {away}",
            f"{gives} {away} {things} to {tell.his} {rng.choice(('sister', 'brother', 'friend'))}",
        )
    )
    left = count - away
    step = rng.choice(
        (
            f"{capitalize(tell.solver_he)} {'give' if tell.first_person else 'gives'} away {away}, "
            f"leaving {count} - {away} = {left}.",
            f"After giving away {away}, {tell.solver_he} {tell.has} {count} - {away} = {left} "
            f"{things}.",
        )
    )
    return Event(clause, [step], left)


def _loses(rng: random.Random, tell: Telling, count: int) -> Event:
    lost = rng.randint(1, count - 2)
    present, past, base = rng.choice(
        (
            ("loses", "lost", "losing"),
            ("sells", "sold", "selling"),
            ("throws away", "threw away", "throwing away"),
            ("breaks", "broke", "breaking"),
            ("uses", "used", "using"),
            ("eats", "ate", "eating"),
        )
    )
    verb = tell.verb(present, past)
    clause = rng.choice(
        (f"{verb} {lost} of them", f"{verb} {lost}", f"{verb} {lost} {tell.things.many}")
    )
    left = count - lost
    step = rng.choice(
        (
            f"After {base} {lost} there are {count} - {lost} = {left}.",
            f"That takes away {lost}: {count} - {lost} = {left}.",
        )
    )
    return Event(clause, [step], left)


def _buys_containers(rng: random.Random, tell: Telling, count: int) -> Event:
    number, each = rng.randint(2, 9), rng.randint(2, 12)
    container, things = rng.choice(CONTAINERS), tell.things.many
    verb = tell.verb(*rng.choice((("buys", "bought"), ("gets", "got"), ("finds", "found"))))
    clause = rng.choice(
        (
            f"{verb} {number} {container.many} with {each} {things} in each",
            f"{verb} {number} {container.many} of {each} {things} each",
            f"{verb} {number} {container.many} with {each} {things} each",
            f"{verb} {number} {container.many} containing {each} {things} each",
            f"{verb} {number} more {container.many}, each with {each} {things}",
        )
    )
    inside = number * each
    total = count + inside
    steps = [
        f"The {container.many} hold {number} * {each} = {inside} {things}.",
        rng.choice(
            (
                f"Now {tell.solver_he} {tell.has} {count} + {inside} = {total}.",
                f"Together with the {container.many} that makes {count} + {inside} = {total}.",
            )
        ),
    ]
    return Event(clause, steps, total)


def _doubles(rng: random.Random, tell: Telling, count: int) -> Event:
    things = tell.things.many
    clause = f"then the number of {things} {tell.verb('doubles', 'doubled')}"
    step = f"Doubling gives {count} * 2 = {count * 2}."
    return Event(clause, [step], count * 2, own_subject=True)


def _halves(rng: random.Random, tell: Telling, count: int) -> Event:
    relative = rng.choice(("sister", "brother", "friend", "cousin"))
    clause = f"{tell.verb('gives', 'gave')} half of them to {tell.his} {relative}"
    half = count // 2
    step = f"Half of {count} is {count} / 2 = {half}, so {half} are left."
    return Event(clause, [step], half)


Draw = Callable[[random.Random, Telling, int], Event]


def _possible(count: int) -> list[Draw]:
    """Events that make sense with ``count`` things on the pile."""
    draws: list[Draw] = [_gains, _gains, _friend_gives, _buys_containers, _buys_containers]
    if count >= 6:
        draws += [_gives, _gives, _loses, _loses]
    if count <= 60:
        draws.append(_doubles)
    if count >= 4 and count % 2 == 0:
        draws.append(_halves)
    return draws


def _opening(rng: random.Random, tell: Telling, count: int) -> str:
    pile, subject = tell.things.counted(count), tell.subject
    if tell.first_person:
        return rng.choice((f"I had {pile}.", f"I started with {pile}."))
    if tell.past:
        return rng.choice((f"{subject} had {pile}.", f"At first, {subject} had {pile}."))
    return rng.choice(
        (
            f"{subject} has {pile}.",
            f"{subject} has {pile}.",
            f"{subject} starts with {pile}.",
            f"There are {pile} on {subject}'s table.",
        )
    )


def _sentences(rng: random.Random, tell: Telling, events: list[Event]) -> list[str]:
    """Join clauses to sentences: alone, or two or three of one subject with *and*."""
    sentences: list[str] = []
    index = 0
    while index < len(events):
        event = events[index]
        if event.own_subject:
            sentences.append(capitalize(event.clause) + ".")
            index += 1
            continue
        run = [event.clause]
        while (
            index + len(run) < len(events)
            and len(run) < 3
            and not events[index + len(run)].own_subject
            and rng.random() < 0.4
        ):
            run.append(events[index + len(run)].clause)
        index += len(run)
        subject = rng.choice((tell.pronoun, tell.pronoun, tell.pronoun, tell.subject))
        lower = tell.pronoun if tell.first_person else tell.owner.he
        opening = rng.choice((f"{subject} ", f"{subject} ", f"Then {lower} ", f"Later {lower} "))
        joint = join(run)
        if len(run) == 2 and rng.random() < 0.3:
            joint = f"{run[0]} and then {run[1]}"
        sentences.append(opening + joint + ".")
    return sentences


def _ask(rng: random.Random, tell: Telling) -> str:
    things = tell.things.many
    if tell.first_person:
        return rng.choice(
            (
                f"How many {things} do I have now?",
                f"How many {things} do I have left?",
                f"How many {things} are there now?",
            )
        )
    name, he = tell.owner.name, tell.owner.he
    return rng.choice(
        (
            f"How many {things} does {name} have now?",
            f"How many {things} does {he} have now?",
            f"How many {things} does {he} have in the end?",
            f"How many {things} does {name} have left?",
            f"How many {things} are left?",
            f"How many does {he} have now?",
        )
    )


def _happenings(
    rng: random.Random, tell: Telling, count: int, num_events: int
) -> tuple[list[Event], int]:
    events: list[Event] = []
    last: Draw | None = None
    for _ in range(num_events):
        draw = rng.choice([draw for draw in _possible(count) if draw is not last])
        event = draw(rng, tell, count)
        events.append(event)
        count, last = event.total, draw
    return events, count


def pile_story(rng: random.Random) -> Problem:
    """One owner, one pile, one to six events."""
    first_person = rng.random() < 0.1
    owner, *friends = people(rng, 3)
    past = first_person or rng.random() < 0.3
    tell = Telling(owner, thing(rng), past, first_person, friends)
    count = rng.randint(3, 60)
    opening = _opening(rng, tell, count)
    start = rng.choice(
        (
            f"{tell.solver_subject} {'start' if first_person else 'starts'} with "
            f"{tell.things.counted(count)}.",
            f"At first there are {tell.things.counted(count)}."
            if count != 1
            else "At first there is 1.",
        )
    )
    events, result = _happenings(rng, tell, count, rng.choice((1, 2, 2, 2, 3, 3, 4, 5, 6)))
    question = " ".join([opening, *_sentences(rng, tell, events), _ask(rng, tell)])
    steps = [start, *(step for event in events for step in event.steps)]
    return Problem(question, steps, result)


def two_piles(rng: random.Random) -> Problem:
    """Two owners with a short story each, then their sum or difference."""
    first, second, *friends = people(rng, 4)
    things = thing(rng)
    past = rng.random() < 0.2
    sentences: list[str] = []
    steps: list[str] = []
    counts: list[int] = []
    for owner in (first, second):
        tell = Telling(owner, things, past, False, friends)
        count = rng.randint(3, 40)
        sentences.append(_opening(rng, tell, count))
        steps.append(f"{owner.name} starts with {things.counted(count)}.")
        events, count = _happenings(rng, tell, count, rng.randint(1, 2))
        sentences += _sentences(rng, tell, events)
        steps += [step for event in events for step in event.steps]
        steps[-1] = steps[-1][:-1] + f" for {owner.name}."
        counts.append(count)
    x, y = counts
    if x == y or rng.random() < 0.5:
        ask = rng.choice(
            (
                f"How many {things.many} do they have together?",
                f"How many {things.many} do {first.name} and {second.name} have in total?",
                f"How many {things.many} do they have altogether?",
            )
        )
        steps.append(f"Together they have {x} + {y} = {x + y} {things.many}.")
        result = x + y
    else:
        (low, poor), (high, rich) = sorted(((x, first.name), (y, second.name)))
        result = high - low
        ask = f"How many more {things.many} does {rich} have than {poor}?"
        steps.append(f"{rich} has {high} - {low} = {result} more {things.many} than {poor}.")
    return Problem(" ".join([*sentences, ask]), steps, result)
