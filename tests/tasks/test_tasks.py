"""Tasks are reproducible, right, and never on both sides of the split."""

from __future__ import annotations

import random
import re
from itertools import islice

import pytest

from focus_ray.tasks import (
    CLOSED_SETS,
    TASKS,
    Check,
    Task,
    draw_task,
    evaluation_set,
    final_answer,
    training_conversations,
)
from focus_ray.tasks.word_problems import SCENES, Scene, working

EQUATION = re.compile(r"(?<![\d-])(\d+) ([-+*/]) (\d+) = (-?\d+)")


def assert_equations_hold(text: str) -> int:
    """Re-evaluate every ``a op b = c``; returns how many there were."""
    found = EQUATION.findall(text)
    for left, operator, right, result in found:
        a, b, c = int(left), int(right), int(result)
        expected = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator]
        assert expected == c, f"{left} {operator} {right} = {result} in {text!r}"
    return len(found)


@pytest.mark.parametrize("name", TASKS)
def test_reference_answers_pass_their_own_check(name: str) -> None:
    rng = random.Random(1)
    for _ in range(100):
        task = draw_task(rng, name)
        assert task.name == ("small_talk" if name == "remembering" else name)
        assert task.is_right(task.answer), task
        assert not task.is_right("I do not know.")
        assert_equations_hold(task.answer)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_word_problems_end_in_the_result_of_their_working(scene: Scene) -> None:
    rng = random.Random(2)
    for _ in range(60):
        problem = scene(rng)
        steps = " ".join(problem.steps)
        last = EQUATION.findall(steps)[-1]
        assert assert_equations_hold(steps) >= 1
        assert int(last[3]) == problem.result
        assert problem.result >= 0
        assert problem.question.rstrip().endswith(("?", "."))


def test_varied_wording_keeps_the_numbers_of_the_working() -> None:
    rng = random.Random(3)
    scenes = list(SCENES)
    for _ in range(300):
        problem = rng.choice(scenes)(rng)
        said = working(rng, problem)
        for step in problem.steps:
            for number in re.findall(r"\d+", step):
                assert number in said


def test_the_same_seed_gives_the_same_conversations() -> None:
    first, again = (list(islice(training_conversations(7), 50)) for _ in range(2))
    assert first == again
    assert first != list(islice(training_conversations(8), 50))


def test_training_holds_no_evaluation_question() -> None:
    held_out = {task.user for task in evaluation_set()}
    for task in islice(training_conversations(9), 4000):
        asked = [task.user, *(turn.content for turn in task.context if turn.role == "user")]
        assert held_out.isdisjoint(asked)
        assert task.name in CLOSED_SETS or task.split == "train"


def test_the_evaluation_set_is_fixed_large_and_without_repetition() -> None:
    tasks = evaluation_set()
    assert tasks == evaluation_set()
    assert len(tasks) >= 500
    assert len({task.user for task in tasks}) == len(tasks)
    assert {task.name for task in tasks} == TASKS.keys() - CLOSED_SETS
    assert all(task.split == "evaluation" for task in tasks)


def test_a_smaller_evaluation_set_is_part_of_the_whole() -> None:
    assert set(map(_key, evaluation_set(5, 2))) <= set(map(_key, evaluation_set()))


def _key(task: Task) -> tuple[str, str]:
    return task.name, task.user


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gsm", id="unknown"),
        pytest.param("fact", id="closed set"),
    ],
)
def test_a_name_that_cannot_be_evaluated_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"task '{name}' cannot be evaluated; choose from"):
        evaluation_set(1, 1, (name,))


@pytest.mark.parametrize(
    ("check", "targets", "answer", "right"),
    [
        pytest.param(Check.FINAL, ("12",), "5 + 7 = 12\n#### 12", True, id="final number"),
        pytest.param(Check.FINAL, ("12",), "#### 11\n#### 12 ", True, id="the last one counts"),
        pytest.param(Check.FINAL, ("12",), "The answer is 12.", False, id="no final line"),
        pytest.param(Check.FINAL, ("12",), "#### 120", False, id="longer number"),
        pytest.param(Check.EXACT, ("a, b",), " a, b\n", True, id="white space around"),
        pytest.param(Check.EXACT, ("a, b",), "a,b", False, id="white space within"),
        pytest.param(Check.JSON, ('{"a": 1}',), '{ "a":1 }', True, id="other layout"),
        pytest.param(Check.JSON, ('{"a": 1}',), '{"a": 1', False, id="broken JSON"),
        pytest.param(
            Check.CONTAINS, ("Dear Ms. Cox", "Tom"), "Tom: Dear Ms. Cox", True, id="any order"
        ),
        pytest.param(
            Check.CONTAINS, ("Dear Ms. Cox", "Tom"), "Dear Ms. Cox", False, id="one missing"
        ),
    ],
)
def test_checks(check: Check, targets: tuple[str, ...], answer: str, right: bool) -> None:
    assert Task("t", "q", "a", check, targets).is_right(answer) is right


def test_final_answer_of_text_without_one_is_none() -> None:
    assert final_answer("12") is None
