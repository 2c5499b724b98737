"""The fixed evaluation set: held-out questions, the same in every run."""

from __future__ import annotations

import random

from focus_ray.tasks.mixture import CLOSED_SETS, TASKS, draw_task
from focus_ray.tasks.task import Task

EVALUATION_SEED = 20_270_101
"""Never a training seed: those are small, see ``training/``. The split holds even if it were."""

NUM_WORD_PROBLEMS = 300
NUM_OTHERS = 30


def evaluation_set(
    num_word_problems: int = NUM_WORD_PROBLEMS,
    num_others: int = NUM_OTHERS,
    names: tuple[str, ...] | None = None,
) -> list[Task]:
    """Different held-out questions of every open task, in a fixed order.

    Each kind has its own generator state, so a smaller set is a prefix of a larger one,
    kind by kind.

    Args:
        num_word_problems: how many arithmetic word problems.
        num_others: how many of every other kind.
        names: kinds to draw; None for all kinds that are no closed set.

    Raises:
        ValueError: a name is unknown or names a closed set.
    """
    chosen = [name for name in TASKS if name not in CLOSED_SETS] if names is None else names
    for name in chosen:
        if name not in TASKS or name in CLOSED_SETS:
            open_names = ", ".join(sorted(TASKS.keys() - CLOSED_SETS))
            raise ValueError(f"task {name!r} cannot be evaluated; choose from {open_names}")
    tasks: list[Task] = []
    for name in chosen:
        wanted = num_word_problems if name == "word_problem" else num_others
        rng = random.Random(f"{EVALUATION_SEED}/{name}")
        seen: set[str] = set()
        while len(seen) < wanted:
            task = draw_task(rng, name)
            if task.split == "evaluation" and task.user not in seen:
                seen.add(task.user)
                tasks.append(task)
    return tasks
