"""Plain arithmetic, and questions about a few given numbers."""

from __future__ import annotations

import random

from focus_ray.tasks.task import Task, exact, final

_SIGN_WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


def arithmetic(rng: random.Random) -> Task:
    """``What is 17 + 25?`` and its kin, with one line per operation."""
    draw = rng.random()
    if draw < 0.35:
        top = rng.choice((20, 100, 999))
        a, b = rng.randint(1, top), rng.randint(1, top)
        operator = rng.choice("+-")
        if operator == "-":
            a, b = max(a, b), min(a, b)
        result = a + b if operator == "+" else a - b
    elif draw < 0.6:
        a, b, operator = rng.randint(2, 99), rng.randint(2, 12), "*"
        if rng.random() < 0.3:
            a, b = b, a
        result = a * b
    elif draw < 0.72:
        b, result, operator = rng.randint(2, 12), rng.randint(2, 60), "/"
        a = b * result
    else:
        return _chain(rng)
    expression = f"{a} {operator} {b}"
    said = f"{a} {_SIGN_WORDS[operator]} {b}"
    asked = rng.choice((expression, expression, f"{a}{operator}{b}", said))
    return final("arithmetic", _ask(rng, asked), f"{expression} = {result}", result)


def _chain(rng: random.Random) -> Task:
    value = rng.randint(2, 60)
    expression, lines = str(value), []
    for _ in range(rng.randint(2, 4)):
        operand = rng.randint(1, 60)
        operator = "+" if operand > value else rng.choice("++-")
        result = value + operand if operator == "+" else value - operand
        lines.append(f"{value} {operator} {operand} = {result}")
        expression += f" {operator} {operand}"
        value = result
    return final("arithmetic", _ask(rng, expression), "\n".join(lines), value)


def _ask(rng: random.Random, expression: str) -> str:
    return rng.choice(
        (
            f"What is {expression}?",
            f"What is {expression}?",
            f"Calculate {expression}.",
            f"Compute {expression}.",
            f"{expression} = ?",
            f"{expression}",
            f"How much is {expression}?",
            f"Can you calculate {expression}?",
            f"Please tell me what {expression} is.",
        )
    )


def statistics(rng: random.Random) -> Task:
    """Largest, smallest, sum or range of given numbers."""
    values = [rng.randint(1, rng.choice((20, 100))) for _ in range(rng.randint(3, 7))]
    listed = ", ".join(map(str, values))
    low, high = min(values), max(values)
    kind = rng.choice(("largest", "smallest", "sum", "range"))
    if kind == "largest":
        question = rng.choice(
            (f"What is the largest number in {listed}?", f"Find the maximum of {listed}.")
        )
        return final("statistics", question, "", high)
    if kind == "smallest":
        question = rng.choice(
            (f"What is the smallest number in {listed}?", f"Find the minimum of {listed}.")
        )
        return final("statistics", question, "", low)
    if kind == "range":
        question = (
            f"What is the difference between the largest and the smallest number in {listed}?"
        )
        working = f"The largest is {high} and the smallest is {low}.\n{high} - {low} = {high - low}"
        return final("statistics", question, working, high - low)
    total, lines = values[0], []
    for value in values[1:]:
        lines.append(f"{total} + {value} = {total + value}")
        total += value
    question = rng.choice((f"What is the sum of {listed}?", f"Add these numbers: {listed}"))
    return final("statistics", question, "\n".join(lines), total)


_UNITS = (
    ("kilometer", "kilometers", "meter", "meters", 1000),
    ("meter", "meters", "centimeter", "centimeters", 100),
    ("kilogram", "kilograms", "gram", "grams", 1000),
    ("hour", "hours", "minute", "minutes", 60),
    ("minute", "minutes", "second", "seconds", 60),
    ("day", "days", "hour", "hours", 24),
    ("week", "weeks", "day", "days", 7),
    ("foot", "feet", "inch", "inches", 12),
    ("yard", "yards", "foot", "feet", 3),
    ("liter", "liters", "milliliter", "milliliters", 1000),
    ("dozen", "dozens", "piece", "pieces", 12),
    ("pound", "pounds", "ounce", "ounces", 16),
    ("year", "years", "month", "months", 12),
    ("centimeter", "centimeters", "millimeter", "millimeters", 10),
)


def unit_conversion(rng: random.Random) -> Task:
    """Between two units with a whole factor, either way."""
    one_big, big, _, small, factor = rng.choice(_UNITS)
    x = rng.randint(2, 99 if factor in (10, 100, 1000) else 25)
    y = x * factor
    fact = f"1 {one_big} is {factor} {small}."
    if rng.random() < 0.6:
        asked, wanted, working, result = (
            f"{x} {big}",
            small,
            f"{x} * {factor} = {y}",
            f"{y} {small}",
        )
    else:
        asked, wanted, working, result = f"{y} {small}", big, f"{y} / {factor} = {x}", f"{x} {big}"
    question = rng.choice(
        (
            f"Convert {asked} to {wanted}.",
            f"How many {wanted} are in {asked}?",
            f"How many {wanted} are {asked}?",
            f"What is {asked} in {wanted}?",
        )
    )
    return final("unit_conversion", question, f"{fact}\n{working}", result)


def number_properties(rng: random.Random) -> Task:
    """Even or odd, larger or smaller, what follows."""
    draw = rng.random()
    if draw < 0.35:
        value = rng.randint(1, 999)
        kind = "odd" if value % 2 else "even"
        question = rng.choice((f"Is {value} even or odd?", f"Is the number {value} odd or even?"))
        return final(
            "number_properties", question, f"The last digit of {value} is {value % 10}.", kind
        )
    if draw < 0.7:
        a, b = rng.sample(range(1, rng.choice((100, 1000))), 2)
        larger = rng.random() < 0.6
        question = f"Which number is {'larger' if larger else 'smaller'}, {a} or {b}?"
        return final("number_properties", question, "", max(a, b) if larger else min(a, b))
    start, step = rng.randint(1, 50), rng.randint(1, 12)
    values = [start + step * i for i in range(5)]
    question = f"What number comes next: {', '.join(map(str, values[:4]))}?"
    working = f"Each number is {step} more than the one before.\n{values[3]} + {step} = {values[4]}"
    return final("number_properties", question, working, values[4])


def equation(rng: random.Random) -> Task:
    """One unknown: ``x + 7 = 15``."""
    x, a = rng.randint(1, 60), rng.randint(2, 40)
    letter = rng.choice("xyn")
    draw = rng.random()
    if draw < 0.4:
        written, working = f"{letter} + {a} = {x + a}", f"{x + a} - {a} = {x}"
    elif draw < 0.7:
        written, working = f"{letter} - {a} = {x}", f"{x} + {a} = {x + a}"
        x = x + a
    else:
        a, x = rng.randint(2, 12), rng.randint(2, 30)
        written, working = f"{a} * {letter} = {a * x}", f"{a * x} / {a} = {x}"
    question = rng.choice((f"Solve for {letter}: {written}", f"If {written}, what is {letter}?"))
    return final("equation", question, working, f"{letter} = {x}")


def number_list(rng: random.Random) -> Task:
    """Even numbers, multiples, a count upwards: lists that follow a rule."""
    start, step, count = rng.randint(1, 40), rng.choice((1, 1, 2, 3, 5, 10)), rng.randint(4, 12)
    values = [str(start + step * i) for i in range(count)]
    if step == 1:
        question = f"Count from {values[0]} to {values[-1]}."
    else:
        question = f"Count from {values[0]} to {values[-1]} in steps of {step}."
    answer = ", ".join(values)
    if rng.random() < 0.3:
        question = f"Write the first {count} multiples of {step}."
        answer = ", ".join(str(step * (i + 1)) for i in range(count))
    return exact("number_list", question, answer)
