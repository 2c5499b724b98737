"""A word problem before its wording is varied."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple


class Problem(NamedTuple):
    """A question, the sentences of its solution in order, and the number asked for."""

    question: str
    steps: list[str]
    result: int


Scene = Callable[[random.Random], Problem]
"""Draws one problem of a kind; the same generator state draws the same problem."""
