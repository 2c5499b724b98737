"""Days of the week, dates of the year (never a leap year), and times of day."""

from __future__ import annotations

import random

from focus_ray.tasks.task import Task, exact, final
from focus_ray.tasks.vocabulary import DAYS_IN_MONTH, MONTHS, WEEKDAYS


def calendar(rng: random.Random) -> Task:
    """One of the kinds below."""
    kind = rng.choices((_weekday, _date, _time, _neighbour), (0.35, 0.35, 0.2, 0.1))[0]
    return kind(rng)


def _days(count: int) -> str:
    return f"{count} {'day' if count == 1 else 'days'}"


def _weekday(rng: random.Random) -> Task:
    today, distance = rng.randrange(7), rng.randint(1, 40)
    back = rng.random() < 0.4
    rest = distance % 7
    result = WEEKDAYS[(today - rest if back else today + rest) % 7]
    if back:
        question = f"If today is {WEEKDAYS[today]}, what day was it {_days(distance)} ago?"
    else:
        question = rng.choice(
            (
                f"If today is {WEEKDAYS[today]}, what day of the week will it be in "
                f"{_days(distance)}?",
                f"Today is {WEEKDAYS[today]}. Which day is it in {_days(distance)}?",
            )
        )
    weeks = distance // 7
    whole = f"{_days(distance)} is {weeks} {'week' if weeks == 1 else 'weeks'} and {_days(rest)}. "
    working = (whole if weeks else "") + (
        f"{_days(rest)} {'before' if back else 'after'} {WEEKDAYS[today]} is {result}."
    )
    return final("calendar", question, working, result)


def _date(rng: random.Random) -> Task:
    month = rng.randrange(12)
    start, distance = rng.randint(1, DAYS_IN_MONTH[month]), rng.randint(1, 45)
    back = rng.random() < 0.35
    question = (
        f"What date is {_days(distance)} {'before' if back else 'after'} {MONTHS[month]} {start}?"
    )
    if rng.random() < 0.5:
        question += " (Not a leap year.)"
    day = start - distance if back else start + distance
    lines = [f"{start} {'-' if back else '+'} {distance} = {day}."]
    while day < 1:
        month = (month - 1) % 12
        length = DAYS_IN_MONTH[month]
        lines.append(f"{MONTHS[month]} has {length} days: {day} + {length} = {day + length}.")
        day += length
    while day > DAYS_IN_MONTH[month]:
        length = DAYS_IN_MONTH[month]
        lines.append(f"{MONTHS[month]} has {length} days: {day} - {length} = {day - length}.")
        day -= length
        month = (month + 1) % 12
    return final("calendar", question, "\n".join(lines), f"{MONTHS[month]} {day}")


def _time(rng: random.Random) -> Task:
    hour, minute, lasts = rng.randint(1, 12), rng.randrange(0, 60, 5), rng.randint(1, 35) * 5
    end = hour * 60 + minute + lasts
    said = f"{(end // 60 - 1) % 12 + 1}:{end % 60:02d}"
    event = rng.choice(("movie", "lesson", "meeting", "train ride", "game"))
    question = (
        f"A {event} starts at {hour}:{minute:02d} and lasts {lasts} minutes. When does it end?"
    )
    hours = lasts // 60
    working = (
        f"{lasts} minutes is {hours} {'hour' if hours == 1 else 'hours'} and {lasts % 60} minutes. "
        f"The {event} ends at {said}."
    )
    return final("calendar", question, working, said)


def _neighbour(rng: random.Random) -> Task:
    names = rng.choice((WEEKDAYS, MONTHS))
    index, after = rng.randrange(len(names)), rng.random() < 0.6
    result = names[(index + (1 if after else -1)) % len(names)]
    kind = "day" if names is WEEKDAYS else "month"
    side = "after" if after else "before"
    question = rng.choice(
        (
            f"What {kind} comes {side} {names[index]}?",
            f"Which {kind} is right {side} {names[index]}?",
        )
    )
    return exact("calendar", question, result)
