"""Which tasks are drawn how often, alone and in conversations."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from focus_ray.tasks import dates, knowledge, lists, long_answers, numbers, passages, prose
from focus_ray.tasks.task import Message, Task
from focus_ray.tasks.word_problems import word_problem

Draw = Callable[[random.Random], Task]

TASKS: dict[str, tuple[Draw, float]] = {
    "word_problem": (word_problem, 0.46),
    "arithmetic": (numbers.arithmetic, 0.06),
    "long_answer": (long_answers.long_answer, 0.05),
    "sorting": (lists.sorting, 0.045),
    "reversing": (lists.reversing, 0.03),
    "extraction": (passages.extraction, 0.05),
    "reading": (passages.reading, 0.05),
    "calendar": (dates.calendar, 0.05),
    "unit_conversion": (numbers.unit_conversion, 0.025),
    "counting": (lists.counting, 0.025),
    "statistics": (numbers.statistics, 0.025),
    "copying": (lists.copying, 0.015),
    "spelling": (lists.spelling, 0.025),
    "number_properties": (numbers.number_properties, 0.01),
    "equation": (numbers.equation, 0.01),
    "number_list": (numbers.number_list, 0.02),
    "story": (prose.story, 0.015),
    "email": (prose.email, 0.01),
    "small_talk": (knowledge.small_talk, 0.01),
    "fact": (knowledge.fact, 0.005),
    "explanation": (knowledge.explanation, 0.005),
    "listing": (knowledge.listing, 0.003),
    "remembering": (knowledge.remembering, 0.002),
}
"""Name to generator and share of the training conversations."""

CLOSED_SETS = frozenset({"small_talk", "fact", "explanation", "listing", "remembering"})
"""Tasks drawn from a fixed list of questions: trained on in full, never evaluated."""

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You are a careful assistant who thinks step by step.",
    "Be concise.",
    "You are a math teacher.",
    "You answer questions about numbers and text.",
    "You are sdar-tiny, a small language model.",
)
_NAMES = list(TASKS)
_SHARES = [share for _, share in TASKS.values()]


def draw_task(rng: random.Random, name: str | None = None) -> Task:
    """One task, of a given kind or of any."""
    return TASKS[name or rng.choices(_NAMES, _SHARES)[0]][0](rng)


def draw_training_task(rng: random.Random, name: str | None = None) -> Task:
    """One task that no evaluation set can hold."""
    while True:
        chosen = name or rng.choices(_NAMES, _SHARES)[0]
        task = draw_task(rng, chosen)
        if chosen in CLOSED_SETS or task.split == "train":
            return task


def training_conversation(rng: random.Random) -> Task:
    """A training task with its context.

    One in eight has a system prompt; one in eight has earlier turns, a few of those many, so that
    positions far beyond a single question are trained as well.
    """
    turns: list[Message] = []
    if rng.random() < 1 / 8:
        turns.append(Message("system", rng.choice(_SYSTEM_PROMPTS)))
    draw = rng.random()
    earlier = 0 if draw < 0.875 else rng.randint(1, 2) if draw < 0.97 else rng.randint(3, 9)
    for _ in range(earlier):
        past = draw_training_task(rng)
        turns += [Message("user", past.user), Message("assistant", past.answer)]
    return replace(draw_training_task(rng), context=tuple(turns))


def training_conversations(seed: int) -> Iterator[Task]:
    """Training conversations without end; the same seed gives the same ones."""
    rng = random.Random(seed)
    while True:
        yield training_conversation(rng)
