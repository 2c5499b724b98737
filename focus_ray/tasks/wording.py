"""Ways to say the same thing, for questions and for the steps of a solution.

Varied wording is what makes decoding patterns genuine: where the next words are uncertain, a
block-diffusion model decodes a few tokens near the left instead of a whole template at once.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")

_OPENINGS = (
    "First, |Next, |Then |Now |After that, |So |We see that |This means that |Now we know that |"
    "Looking at the numbers, |From the text, |In this step, |Well, |Of course |Clearly, |"
    "To continue, |It follows that |We can say that |Note that |As the text says, "
).split("|")
_ENDINGS = (
    ", as we can see.| in this step.|, which we will need.| by simple arithmetic.|"
    ", and we keep this number.|!|, and that is clear."
).split("|")
_SENTENCE_STARTS = frozenset(
    "The In Each After Adding Together At Now There That With What Half It He She You One All Only "
    "Doubling Taking Of This".split()
)
"""First words of steps that are no names, so they lose their capital after an opening."""
_OPERATOR_WORDS = {
    "+": ("plus", "and"),
    "-": ("minus",),
    "*": ("times", "multiplied by"),
    "/": ("divided by", "split by"),
}
_FILLERS = (
    "It is a sunny day.|The weather is nice.|Today is a holiday.|School is over for today.|"
    "Everyone is in a good mood.|This happened last week.|It was a long day.|"
    "The shop opens at nine."
).split("|")
_REQUESTS = (
    " Think step by step.",
    " Show your work.",
    " Solve it step by step.",
    " Explain your answer.",
    " Please show the steps.",
)
_SMALL_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_SMALL_NUMBER = re.compile(r"(?<![\d$.,:/%])\b([2-9]|1[0-2])\b(?![\d%:/]|\.\d)")


def join(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def capitalize(text: str) -> str:
    """Upper-case the first letter and leave the rest."""
    return text[:1].upper() + text[1:]


def article(word: str) -> str:
    """``a`` or ``an``, by the first letter."""
    return "an" if word[0] in "aeiou" else "a"


def vary_question(rng: random.Random, question: str) -> str:
    """Now and then: a filler sentence, number words, a request for working, sloppy typing."""
    if rng.random() < 0.06:
        question = f"{rng.choice(_FILLERS)} {question}"
    if rng.random() < 0.07:
        question = _SMALL_NUMBER.sub(lambda found: _SMALL_NUMBERS[int(found[1])], question)
    if rng.random() < 0.12:
        question += rng.choice(_REQUESTS)
    if rng.random() < 0.02:
        question = question.lower()
    return question


def vary_step(rng: random.Random, step: str) -> str:
    """Another wording of one sentence of working; numbers and their order of use stay.

    Args:
        step: a sentence with a full stop, holding at most one ``a op b = c`` to reword.
    """
    if rng.random() < 0.35:
        step = _vary_equation(rng, step)
    if rng.random() < 0.5:
        first = step.split(" ", 1)[0].strip(",.:")
        lowered = step[0].lower() + step[1:] if first in _SENTENCE_STARTS else step
        step = rng.choice(_OPENINGS) + lowered
    if rng.random() < 0.15 and step.endswith("."):
        step = step[:-1] + rng.choice(_ENDINGS)
    return step


def _vary_equation(rng: random.Random, step: str) -> str:
    found = EQUATION.search(step)
    if found is None:
        return step
    left, operator, right, result = found.groups()
    before, after = step[: found.start()], step[found.end() :]
    is_words = rng.choice(("is", "makes", "gives", "equals"))
    draw = rng.random()
    if draw < 0.5 and (not before or before.endswith((": ", "so ", "then ", ", "))):
        said = f"{left} {rng.choice(_OPERATOR_WORDS[operator])} {right} {is_words} {result}"
    elif draw < 0.8:
        said = f"{left} {operator} {right}, which {is_words} {result}"
    else:
        said = f"{result}, because {left} {operator} {right} = {result}"
    return before + said + after
