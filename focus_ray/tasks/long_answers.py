"""Tasks whose answers take one to several hundred tokens, most of them checkable to the letter."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from focus_ray.tasks.lists import sorting
from focus_ray.tasks.numbers import arithmetic
from focus_ray.tasks.task import Check, Task, exact, final
from focus_ray.tasks.vocabulary import CITIES, JOBS, WORDS, people, thing
from focus_ray.tasks.word_problems import word_problem
from focus_ray.tasks.wording import article


def long_answer(rng: random.Random) -> Task:
    """One of the kinds below."""
    kinds: dict[Callable[[random.Random], Task], int] = {
        several_problems: 5,
        long_sum: 2,
        multiplication_table: 1,
        long_sorting: 2,
        records: 2,
        inventory: 2,
    }
    return rng.choices(list(kinds), list(kinds.values()))[0](rng)


def several_problems(rng: random.Random) -> Task:
    """Two to six numbered problems, each with its working, and all results at the end."""
    count = rng.randint(2, 6)
    parts = [word_problem(rng) if rng.random() < 0.75 else arithmetic(rng) for _ in range(count)]
    asked = "\n".join(f"{i + 1}. {part.user}" for i, part in enumerate(parts))
    opening = rng.choice(
        (
            "Solve these problems:",
            "Answer all questions:",
            f"Here are {count} problems. Solve each.",
        )
    )
    solved = [
        f"Problem {i + 1}\n{part.answer.rsplit(chr(10), 1)[0]}\nResult {i + 1}: {part.targets[0]}"
        for i, part in enumerate(parts)
    ]
    results = ", ".join(part.targets[0] for part in parts)
    return final("long_answer", f"{opening}\n{asked}", "\n\n".join(solved), results)


def long_sum(rng: random.Random) -> Task:
    """Ten to twenty-five small numbers added one by one."""
    values = [rng.randint(1, 30) for _ in range(rng.randint(10, 25))]
    total, lines = values[0], []
    for value in values[1:]:
        lines.append(f"{total} + {value} = {total + value}")
        total += value
    listed = ", ".join(map(str, values))
    question = rng.choice(
        (f"Add these numbers one by one: {listed}", f"What is the sum of {listed}?")
    )
    return final("long_answer", question, "\n".join(lines), total)


def multiplication_table(rng: random.Random) -> Task:
    """All products of one number up to a limit."""
    number, rows = rng.randint(2, 25), rng.randint(8, 20)
    question = rng.choice(
        (
            f"Write the multiplication table of {number} from 1 to {rows}.",
            f"List {number} times 1 to {number} times {rows}.",
        )
    )
    return exact(
        "long_answer",
        question,
        "\n".join(f"{number} * {i} = {number * i}" for i in range(1, rows + 1)),
    )


def long_sorting(rng: random.Random) -> Task:
    """Ten to twenty-four numbers or words."""
    if rng.random() < 0.3:
        short = sorting(rng)
        return Task("long_answer", short.user, short.answer, short.check, short.targets)
    size = rng.randint(10, 24)
    if rng.random() < 0.6:
        values = rng.sample(range(1, 100), size)
        question = f"Sort these numbers in ascending order: {', '.join(map(str, values))}"
        return exact("long_answer", question, ", ".join(map(str, sorted(values))))
    words = rng.sample(WORDS, size)
    lines = "\n".join(f"{i + 1}. {word}" for i, word in enumerate(words))
    return exact("long_answer", f"Write these words as a numbered list: {', '.join(words)}", lines)


def records(rng: random.Random) -> Task:
    """Several people in sentences, as a JSON list of objects."""
    rows, sentences = [], []
    for someone in people(rng, rng.randint(3, 8)):
        age, city, job = rng.randint(18, 80), rng.choice(CITIES), rng.choice(JOBS)
        rows.append({"name": someone.name, "age": age, "city": city, "job": job})
        sentences.append(
            rng.choice(
                (
                    f"{someone.name} is {age} years old, lives in {city} and works as "
                    f"{article(job)} {job}.",
                    f"{someone.name} from {city} is {article(job)} {job} and {age} years old.",
                )
            )
        )
    question = rng.choice(
        (
            "Extract all people as a JSON list with name, age, city and job: "
            f"{' '.join(sentences)}",
            f"{' '.join(sentences)}\nReturn a JSON list of objects with the keys name, age, city "
            "and job.",
        )
    )
    answer = "[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]"
    return Task("long_answer", question, answer, Check.JSON, (answer,))


def inventory(rng: random.Random) -> Task:
    """Stock after several deliveries and sales, item by item, with a table of results."""
    items = {thing(rng).many: rng.randint(5, 90) for _ in range(rng.randint(3, 7))}
    asked = [f"- {count} {many}" for many, count in items.items()]
    stock = dict(items)
    events, lines = [], []
    for _ in range(rng.randint(4, 10)):
        many = rng.choice(list(stock))
        before, change = stock[many], rng.randint(1, 40)
        sold = change < before and rng.random() < 0.5
        stock[many] = before - change if sold else before + change
        events.append(f"{change} {many} are {'sold' if sold else 'delivered'}.")
        sign = "-" if sold else "+"
        verb = "Selling" if sold else "Receiving"
        lines.append(f"{verb} {change} {many}: {before} {sign} {change} = {stock[many]}")
    question = (
        "A shop has:\n" + "\n".join(asked) + "\nThen this happens: " + " ".join(events) + "\n"
        "How many of each item are there in the end, and how many items in total?"
    )
    table = [f"- {many}: {count}" for many, count in stock.items()]
    counts = list(stock.values())
    total, sums = counts[0], []
    for count in counts[1:]:
        sums.append(f"{total} + {count} = {total + count}")
        total += count
    working = "\n".join([*lines, "In the end there are:", *table, "The total:", *sums])
    return final("long_answer", question, working, total)
