"""Arithmetic word problems: scenes, their mixture, and the working that solves them."""

from __future__ import annotations

import random

from focus_ray.tasks.task import Task, final
from focus_ray.tasks.word_problems import amounts, groups, money, rates, stories
from focus_ray.tasks.word_problems.problem import Problem, Scene
from focus_ray.tasks.wording import vary_question, vary_step

__all__ = ["SCENES", "Problem", "Scene", "word_problem", "working"]

SCENES: dict[Scene, int] = {
    stories.pile_story: 10,
    stories.two_piles: 5,
    amounts.short_story: 5,
    amounts.comparison: 2,
    amounts.equal_shares: 1,
    money.shopping: 3,
    money.wages: 1,
    money.saving: 1,
    money.discount: 1,
    money.selling_boxes: 1,
    money.tickets: 1,
    money.harvest: 1,
    money.chores: 1,
    money.splitting_a_bill: 1,
    rates.trip: 1,
    rates.ages: 1,
    rates.rectangle: 1,
    rates.reading: 1,
    rates.tank: 1,
    rates.average: 1,
    rates.machine: 1,
    rates.repeated: 1,
    groups.seats: 1,
    groups.baking: 1,
    groups.passengers: 1,
    groups.fraction: 1,
    groups.legs: 1,
    groups.library: 1,
    groups.packing: 1,
}
"""Relative weights. Stories of a pile are what people make up themselves."""

_BEGINNINGS = (
    "Let us solve this step by step.",
    "Let us think step by step.",
    "We go through the problem step by step.",
)
_ENDINGS = (
    "So the answer is {}.",
    "The answer is {}.",
    "Therefore we get {}.",
    "That is the final result: {}.",
)


def working(rng: random.Random, problem: Problem) -> str:
    """The solution in varied words, without the ``####`` line."""
    steps = [vary_step(rng, step) for step in problem.steps]
    if rng.random() < 0.35:
        steps.insert(0, rng.choice(_BEGINNINGS))
    if rng.random() < 0.4:
        steps.append(rng.choice(_ENDINGS).format(problem.result))
    return rng.choice(("\n", "\n", " ")).join(steps)


def word_problem(rng: random.Random) -> Task:
    """A multi-step arithmetic problem with its working and ``#### result``."""
    scene = rng.choices(list(SCENES), list(SCENES.values()))[0]
    problem = scene(rng)
    question = vary_question(rng, problem.question)
    return final("word_problem", question, working(rng, problem), problem.result)
