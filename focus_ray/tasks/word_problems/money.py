"""Problems about prices, wages and savings. Amounts are whole dollars."""

from __future__ import annotations

import random

from focus_ray.tasks.vocabulary import CONTAINERS, people, person, thing
from focus_ray.tasks.word_problems.problem import Problem
from focus_ray.tasks.wording import capitalize, join


def _running_sum(parts: list[int], of_what: str) -> list[str]:
    """One sentence per addition, so that each holds one sum."""
    steps: list[str] = []
    total = parts[0]
    for part in parts[1:]:
        steps.append(f"{of_what} {total} + {part} = {total + part} dollars.")
        total += part
    return steps


def shopping(rng: random.Random) -> Problem:
    """Several things at several prices; the total or the change."""
    buyer = person(rng)
    kinds = rng.randint(1, 3)
    items = [(thing(rng), rng.randint(2, 9), rng.randint(1, 15)) for _ in range(kinds)]
    each = rng.choice(("at ${} each", "for ${} each", "that cost ${} each"))
    bought = join([f"{count} {item.many} {each.format(price)}" for item, count, price in items])
    question = rng.choice(
        (f"{buyer.name} buys {bought}.", f"{buyer.name} goes to the shop and buys {bought}.")
    )
    steps = []
    for item, count, price in items:
        said = rng.choice((f"The {item.many} cost", f"{capitalize(item.many)}:"))
        steps.append(f"{said} {count} * {price} = {count * price} dollars.")
    costs = [count * price for _, count, price in items]
    steps += _running_sum(costs, "Together that is")
    total = sum(costs)
    if rng.random() < 0.5:
        paid = (total // 50 + 1) * 50 if rng.random() < 0.6 else total + rng.randint(1, 30)
        question += rng.choice(
            (
                f" {buyer.He} pays with ${paid}. How much change does {buyer.he} get?",
                f" {buyer.He} had ${paid}. How much money is left?",
                f" How much change does {buyer.he} get from {paid} dollars?",
            )
        )
        steps.append(f"What remains is {paid} - {total} = {paid - total} dollars.")
        return Problem(question, steps, paid - total)
    question += rng.choice(
        (
            f" How much does {buyer.he} spend in total?",
            " What is the total cost?",
            " How many dollars is that altogether?",
            f" How much does {buyer.he} have to pay?",
        )
    )
    return Problem(question, steps, total)


def wages(rng: random.Random) -> Problem:
    """Hours, an hourly wage, days, and what is left after spending."""
    worker = person(rng)
    hours, wage, days = rng.randint(2, 9), rng.randint(8, 30), rng.randint(2, 6)
    per_day = hours * wage
    total = per_day * days
    question = rng.choice(
        (
            f"{worker.name} works {hours} hours a day and earns ${wage} per hour. "
            f"{worker.He} works {days} days a week.",
            f"{worker.name} earns {wage} dollars an hour and works {hours} hours each day, "
            f"{days} days a week.",
        )
    )
    steps = [
        f"Each day {worker.name} earns {hours} * {wage} = {per_day} dollars.",
        f"In {days} days {worker.he} earns {per_day} * {days} = {total} dollars.",
    ]
    if rng.random() < 0.4:
        return Problem(f"{question} How much does {worker.he} earn in a week?", steps, total)
    spent = rng.randint(10, min(total - 1, 200))
    on_what = rng.choice(("food", "rent", "books", "gas", "clothes", "music"))
    question += (
        f" {worker.He} spends ${spent} on {on_what} every week. "
        f"How much money does {worker.he} have left after one week?"
    )
    steps.append(
        f"After spending {spent} dollars, {worker.he} has {total} - {spent} = {total - spent}."
    )
    return Problem(question, steps, total - spent)


def saving(rng: random.Random) -> Problem:
    """A goal, some savings, so much a week: how many weeks."""
    saver = person(rng)
    per_week, weeks, saved = rng.randint(3, 25), rng.randint(3, 15), rng.randint(5, 60)
    missing = per_week * weeks
    goal = saved + missing
    wish = rng.choice("bike game tablet guitar camera jacket phone skateboard".split())
    question = (
        f"{saver.name} wants to buy a {wish} that costs ${goal}. {saver.He} already has ${saved} "
        f"and saves ${per_week} every week. How many weeks does {saver.he} need?"
    )
    steps = [
        f"{saver.name} still needs {goal} - {saved} = {missing} dollars.",
        f"At {per_week} dollars a week that takes {missing} / {per_week} = {weeks} weeks.",
    ]
    return Problem(question, steps, weeks)


def discount(rng: random.Random) -> Problem:
    """A percentage off, then several pieces."""
    percent = rng.choice((10, 20, 25, 50))
    divisor = 100 // percent
    off, pieces = rng.randint(2, 20), rng.randint(2, 8)
    price = off * divisor
    sale = price - off
    item = rng.choice("jacket chair lamp table watch bag toy shirt".split())
    question = f"A {item} costs ${price}. It is on sale for {percent}% off."
    steps = [
        f"{percent}% of {price} is {price} / {divisor} = {off} dollars.",
        f"The sale price is {price} - {off} = {sale} dollars.",
    ]
    if rng.random() < 0.3:
        return Problem(f"{question} What is the sale price?", steps, sale)
    total = sale * pieces
    steps.append(f"The total is {sale} * {pieces} = {total} dollars.")
    buyer = person(rng)
    question += f" {buyer.name} buys {pieces} of them. What is the total price?"
    return Problem(question, steps, total)


def selling_boxes(rng: random.Random) -> Problem:
    """Keep some, pack the rest, sell the boxes."""
    seller = person(rng)
    many, container = thing(rng).many, rng.choice(CONTAINERS)
    each, boxes, price, kept = (
        rng.randint(2, 12),
        rng.randint(3, 12),
        rng.randint(2, 15),
        rng.randint(1, 20),
    )
    packed = each * boxes
    question = (
        f"{seller.name} has {packed + kept} {many}. {seller.He} keeps {kept} and puts the rest "
        "into "
        f"{container.many} of {each}. {seller.He} sells each {container.one} for ${price}. "
        f"How much money does {seller.he} make?"
    )
    steps = [
        f"{seller.name} packs {packed + kept} - {kept} = {packed} {many}.",
        f"That fills {packed} / {each} = {boxes} {container.many}.",
        f"{seller.He} makes {boxes} * {price} = {boxes * price} dollars.",
    ]
    return Problem(question, steps, boxes * price)


def tickets(rng: random.Random) -> Problem:
    """Adults and children at two prices."""
    event = rng.choice("concert play museum zoo fair game circus movie".split())
    adult, child = rng.randint(6, 20), rng.randint(2, 9)
    adults, children = rng.randint(2, 30), rng.randint(2, 40)
    pay_adults, pay_children = adults * adult, children * child
    total = pay_adults + pay_children
    question = rng.choice(
        (
            f"Tickets for the {event} cost ${adult} for adults and ${child} for children. {adults} "
            f"adults and {children} children go. How much do the tickets cost in total?",
            f"A {event} ticket is {adult} dollars for an adult and {child} dollars for a child. "
            "How "
            f"much do {adults} adults and {children} children pay together?",
        )
    )
    steps = [
        f"The adults pay {adults} * {adult} = {pay_adults} dollars.",
        f"The children pay {children} * {child} = {pay_children} dollars.",
        f"The total is {pay_adults} + {pay_children} = {total} dollars.",
    ]
    return Problem(question, steps, total)


def harvest(rng: random.Random) -> Problem:
    """Trees, kilograms each, some bad, the rest sold."""
    farmer = person(rng)
    fruit = rng.choice("apple pear plum orange cherry lemon".split())
    trees, each, price = rng.randint(3, 15), rng.randint(5, 20), rng.randint(1, 4)
    total = trees * each
    bad = rng.randint(1, total // 2)
    good = total - bad
    question = (
        f"{farmer.name} has {trees} {fruit} trees. Each tree gives {each} kilograms of fruit. "
        f"{bad} "
        f"kilograms are bad and {farmer.he} sells the rest for ${price} per kilogram. How much "
        "money "
        f"does {farmer.he} make?"
    )
    steps = [
        f"The trees give {trees} * {each} = {total} kilograms.",
        f"Only {total} - {bad} = {good} kilograms are good.",
        f"{farmer.He} makes {good} * {price} = {good * price} dollars.",
    ]
    return Problem(question, steps, good * price)


def chores(rng: random.Random) -> Problem:
    """Two jobs at two rates, then a gift."""
    worker = person(rng)
    jobs = ("washing a car", "mowing a lawn", "walking a dog", "cleaning a room", "raking leaves")
    first, second = rng.sample(jobs, 2)
    x, pay_x, y, pay_y = (
        rng.randint(2, 9),
        rng.randint(2, 12),
        rng.randint(2, 9),
        rng.randint(2, 12),
    )
    total = x * pay_x + y * pay_y
    gift = rng.randint(1, total - 1)
    question = (
        f"{worker.name} earns ${pay_x} for {first} and ${pay_y} for {second}. {worker.He} does the "
        f"first job {x} times and the second job {y} times. Then {worker.he} buys a gift for "
        f"${gift}. "
        "How much money is left?"
    )
    steps = [
        f"The first job pays {x} * {pay_x} = {x * pay_x} dollars.",
        f"The second job pays {y} * {pay_y} = {y * pay_y} dollars.",
        f"Together that is {x * pay_x} + {y * pay_y} = {total} dollars.",
        f"After the gift there are {total} - {gift} = {total - gift} dollars.",
    ]
    return Problem(question, steps, total - gift)


def splitting_a_bill(rng: random.Random) -> Problem:
    """A meal, a tip, equal shares."""
    guests, share = rng.randint(2, 8), rng.randint(5, 40)
    total = guests * share
    tip = rng.randint(1, min(20, total - 1))
    meal = total - tip
    names = [guest.name for guest in people(rng, 1)]
    question = rng.choice(
        (
            f"{guests} friends have dinner for ${meal} and leave a tip of ${tip}. They split the "
            "bill equally. How much does each of them pay?",
            f"{names[0]} and {guests - 1} friends order food for {meal} dollars and add a tip of "
            f"{tip} dollars. They share the cost equally. How many dollars does each person pay?",
        )
    )
    steps = [
        f"With the tip the bill is {meal} + {tip} = {total} dollars.",
        f"Each of the {guests} pays {total} / {guests} = {share} dollars.",
    ]
    return Problem(question, steps, share)
