"""What a task is and how an answer to it is checked."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

Split = Literal["train", "evaluation"]
EVALUATION_SHARE = 50
"""One question in this many belongs to the evaluation split."""

_FINAL = re.compile(r"####[ \t]*(.+)")


class Check(Enum):
    """How an answer is compared with a task's targets."""

    FINAL = "final"
    """The text after the last ``####`` equals the target."""
    EXACT = "exact"
    """The whole answer equals the target."""
    JSON = "json"
    """The answer parses to the same JSON value as the target."""
    CONTAINS = "contains"
    """Every target occurs in the answer."""


class Message(NamedTuple):
    """One turn of a conversation; ``role`` as in chat templates."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Task:
    """A question with one reference answer and the check that other answers must pass.

    Args:
        name: the kind of task, a key of ``focus_ray.tasks.TASKS``.
        user: the question, as a user would type it.
        answer: a right answer in the style the model is taught.
        check: how any answer is judged.
        targets: what ``check`` compares with; one string, several only for CONTAINS.
        context: earlier turns (system prompt, past questions and answers), oldest first.
    """

    name: str
    user: str
    answer: str
    check: Check
    targets: tuple[str, ...]
    context: tuple[Message, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation to answer, in the form chat templates take."""
        turns = (*self.context, Message("user", self.user))
        return [turn._asdict() for turn in turns]

    @property
    def split(self) -> Split:
        """The side this question is on, decided by its text alone.

        Questions of closed sets (capitals, small talk) repeat, so equal text must give equal
        sides whatever seed produced it.
        """
        digest = zlib.crc32(" ".join(self.user.lower().split()).encode())
        return "evaluation" if digest % EVALUATION_SHARE == 0 else "train"

    def is_right(self, answer: str) -> bool:
        """Whether ``answer`` passes the check; surrounding white space does not matter."""
        answer = answer.strip()
        match self.check:
            case Check.FINAL:
                return final_answer(answer) == self.targets[0]
            case Check.EXACT:
                return answer == self.targets[0]
            case Check.JSON:
                return _same_json(answer, self.targets[0])
            case Check.CONTAINS:
                return all(target in answer for target in self.targets)


def final_answer(text: str) -> str | None:
    """The text after the last ``####`` of its line, or None."""
    found = _FINAL.findall(text)
    return found[-1].strip() if found else None


def final(name: str, user: str, working: str, result: object) -> Task:
    """A task whose answer is some working and a last line ``#### result``."""
    answer = f"{working}\n#### {result}" if working else f"#### {result}"
    return Task(name, user, answer, Check.FINAL, (str(result),))


def exact(name: str, user: str, answer: str) -> Task:
    """A task with one right answer, to the letter."""
    return Task(name, user, answer, Check.EXACT, (answer,))


def _same_json(answer: str, target: str) -> bool:
    try:
        return bool(json.loads(answer) == json.loads(target))
    except json.JSONDecodeError:
        return False
