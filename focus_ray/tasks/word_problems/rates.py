"""Problems about speed, time, ages, averages and measures."""

from __future__ import annotations

import random

from focus_ray.tasks.vocabulary import people, person, thing
from focus_ray.tasks.word_problems.problem import Problem
from focus_ray.tasks.wording import join


def _hours(count: int) -> str:
    return f"{count} {'hour' if count == 1 else 'hours'}"


def trip(rng: random.Random) -> Problem:
    """One or two parts at constant speed; the distance, or what is left of it."""
    driver = person(rng)
    verb = rng.choice(("drives", "rides", "travels", "cycles"))
    unit = rng.choice(("miles", "miles", "kilometers"))
    fast, long, slow, short = (
        rng.randint(2, 12) * 5,
        rng.randint(1, 5),
        rng.randint(2, 12) * 5,
        rng.randint(1, 5),
    )
    if rng.random() < 0.25:
        distance = fast * long
        question = rng.choice(
            (
                f"A train travels at {fast} {unit} per hour for {_hours(long)}. How far does it "
                "go?",
                f"{driver.name} {verb} for {_hours(long)} at {fast} {unit} per hour. How many "
                f"{unit} is that?",
            )
        )
        return Problem(
            question, [f"The distance is {fast} * {long} = {distance} {unit}."], distance
        )
    first, second = fast * long, slow * short
    gone = first + second
    question = (
        f"{driver.name} {verb} for {_hours(long)} at {fast} {unit} per hour and then for "
        f"{_hours(short)} at {slow} {unit} per hour."
    )
    steps = [
        f"The first part is {fast} * {long} = {first} {unit}.",
        f"The second part is {slow} * {short} = {second} {unit}.",
        f"Together that is {first} + {second} = {gone} {unit}.",
    ]
    if rng.random() < 0.6:
        ask = rng.choice(
            (f"How many {unit} is the whole trip?", f"How far does {driver.he} go in total?")
        )
        return Problem(f"{question} {ask}", steps, gone)
    left = rng.randint(5, 150)
    steps.append(f"There are {gone + left} - {gone} = {left} {unit} left.")
    question = f"A trip is {gone + left} {unit} long. {question} How many {unit} are left?"
    return Problem(question, steps, left)


def ages(rng: random.Random) -> Problem:
    """Ages as multiples and differences."""
    a, b, c = (someone.name for someone in people(rng, 3))
    x, factor, older = rng.randint(3, 15), rng.randint(2, 4), rng.randint(2, 12)
    y = x * factor
    z = y + older
    times = "twice" if factor == 2 and rng.random() < 0.6 else f"{factor} times"
    question = (
        f"{a} is {x} years old. {b} is {times} as old as {a}. {c} is {older} years older than {b}."
    )
    steps = [
        f"{b} is {x} * {factor} = {y} years old.",
        f"{c} is {y} + {older} = {z} years old.",
    ]
    draw = rng.random()
    if draw < 0.35:
        return Problem(f"{question} How old is {c}?", steps, z)
    if draw < 0.7:
        total = x + y + z
        steps += [f"{a} and {b} are {x} + {y} = {x + y}.", f"The sum is {x + y} + {z} = {total}."]
        ask = rng.choice(
            ("What is the sum of their ages?", "How old are the three of them together?")
        )
        return Problem(f"{question} {ask}", steps, total)
    later = rng.randint(2, 20)
    steps.append(f"In {later} years {c} will be {z} + {later} = {z + later}.")
    return Problem(f"{question} How old will {c} be in {later} years?", steps, z + later)


def rectangle(rng: random.Random) -> Problem:
    """Perimeter or area, perhaps with a price per meter."""
    owner = person(rng)
    width, length, price = rng.randint(3, 20), rng.randint(5, 30), rng.randint(2, 9)
    place = rng.choice("garden yard field park room".split())
    half, area = width + length, width * length
    shape = f"is {length} meters long and {width} meters wide"
    draw = rng.random()
    if draw < 0.2:
        question = f"A rectangle {shape}. What is its area?"
        return Problem(question, [f"The area is {length} * {width} = {area} square meters."], area)
    perimeter_steps = [
        f"One long side and one short side are {length} + {width} = {half} meters.",
        f"The perimeter is {half} * 2 = {half * 2} meters.",
    ]
    if draw < 0.4:
        question = f"A rectangular {place} {shape}. What is the perimeter of the {place}?"
        return Problem(question, perimeter_steps, half * 2)
    if draw < 0.7:
        cost = half * 2 * price
        question = (
            f"{owner.name} has a rectangular {place} that {shape}. A fence costs ${price} per "
            "meter. "
            f"How much does it cost to put a fence around the {place}?"
        )
        steps = [*perimeter_steps, f"The fence costs {half * 2} * {price} = {cost} dollars."]
        return Problem(question, steps, cost)
    cover = rng.choice(("grass", "tiles", "carpet"))
    question = (
        f"A rectangular {place} {shape}. {owner.name} covers it with {cover} that costs ${price} "
        "per "
        "square meter. What is the total cost?"
    )
    steps = [
        f"The area is {length} * {width} = {area} square meters.",
        f"The cost is {area} * {price} = {area * price} dollars.",
    ]
    return Problem(question, steps, area * price)


def reading(rng: random.Random) -> Problem:
    """A book at one pace, then at another."""
    reader = person(rng)
    days, pace, more_days, new_pace = (
        rng.randint(2, 7),
        rng.randint(5, 30),
        rng.randint(2, 10),
        rng.randint(5, 30),
    )
    read = days * pace
    left = new_pace * more_days
    pages = read + left
    question = (
        f"{reader.name} is reading a book with {pages} pages. {reader.He} reads {pace} pages a "
        "day for "
        f"{days} days."
    )
    steps = [
        f"In the first {days} days {reader.he} reads {days} * {pace} = {read} pages.",
        f"There are {pages} - {read} = {left} pages left.",
    ]
    if rng.random() < 0.3:
        return Problem(f"{question} How many pages are left?", steps, left)
    question += (
        f" After that {reader.he} reads {new_pace} pages a day. How many more days does "
        f"{reader.he} "
        "need to finish the book?"
    )
    steps.append(f"That takes {left} / {new_pace} = {more_days} days.")
    return Problem(question, steps, more_days)


def tank(rng: random.Random) -> Problem:
    """A tank with a pipe and a leak."""
    flow = rng.randint(4, 20)
    leak, minutes, start = rng.randint(1, flow - 1), rng.randint(2, 12), rng.randint(5, 80)
    gain = flow - leak
    question = (
        f"A tank holds {start} liters of water. A pipe adds {flow} liters per minute and a leak "
        "loses "
        f"{leak} liters per minute. How many liters are in the tank after {minutes} minutes?"
    )
    steps = [
        f"Each minute the tank gains {flow} - {leak} = {gain} liters.",
        f"In {minutes} minutes it gains {gain} * {minutes} = {gain * minutes} liters.",
        f"The tank then holds {start} + {gain * minutes} = {start + gain * minutes} liters.",
    ]
    return Problem(question, steps, start + gain * minutes)


def average(rng: random.Random) -> Problem:
    """The mean of three or four scores."""
    player = person(rng)
    games, mean = rng.randint(3, 4), rng.randint(20, 90)
    scores = [mean + rng.randint(-15, 9) for _ in range(games - 1)]
    scores.append(mean * games - sum(scores))
    question = rng.choice(
        (
            f"{player.name} scores {join([str(score) for score in scores])} points in {games} "
            "games. "
            f"What is {player.his} average score?",
            f"What is the average of {join([str(score) for score in scores])}?",
        )
    )
    steps: list[str] = []
    total = scores[0]
    for score in scores[1:]:
        steps.append(f"Adding {score} gives {total} + {score} = {total + score}.")
        total += score
    steps.append(f"The average is {total} / {games} = {mean}.")
    return Problem(question, steps, mean)


def machine(rng: random.Random) -> Problem:
    """Output per hour less what is broken."""
    made, hours, broken = rng.randint(10, 60), rng.randint(2, 9), rng.randint(1, 9)
    many = thing(rng).many
    good = made - broken
    question = (
        f"A machine makes {made} {many} per hour. In each hour {broken} of them are broken. How "
        "many "
        f"good {many} does it make in {hours} hours?"
    )
    steps = [
        f"Each hour there are {made} - {broken} = {good} good {many}.",
        f"In {hours} hours that is {good} * {hours} = {good * hours}.",
    ]
    return Problem(question, steps, good * hours)


def repeated(rng: random.Random) -> Problem:
    """The same amount every day or week."""
    someone = person(rng)
    unit, units = rng.choice((("day", "days"), ("week", "weeks"), ("month", "months")))
    amount, times = rng.randint(2, 40), rng.randint(2, 12)
    total = amount * times
    verb, what = rng.choice(
        (
            ("reads", "pages"),
            ("runs", "miles"),
            ("drinks", "glasses of water"),
            ("writes", "letters"),
            ("saves", "dollars"),
            ("bakes", "cookies"),
            ("learns", "new words"),
        )
    )
    question = rng.choice(
        (
            f"{someone.name} {verb} {amount} {what} every {unit}. How many {what} is that in "
            f"{times} "
            f"{units}?",
            f"Every {unit} {someone.name} {verb} {amount} {what}. How many {what} after {times} "
            f"{units}?",
        )
    )
    step = f"In {times} {units} that is {amount} * {times} = {total} {what}."
    return Problem(question, [step], total)
