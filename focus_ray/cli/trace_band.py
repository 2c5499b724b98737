"""One band of a trace's picture: blocks side by side, tokens over their columns, steps as rows."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace

from focus_ray.cli.svg import element, printable, words
from focus_ray.cli.trace_looks import CELL, cell, look_of, squares
from focus_ray.cli.trace_records import Trace, TraceStep

PITCH = CELL + 1
BLOCK_GAP = 8
LABELS = 66
BAR_AT, BAR, COUNTS_AT, COUNTS = 10, 64, (98, 124, 150), 152
"""Right of the columns: where the bar starts, its length for the two blocks that a step can touch,
where the numbers end, the whole."""
COUNTED = {"processed": "low", "retained": "full", "decoded": ""}
"""What is counted, and the look of it in the bar."""
LETTER = 6.35
"""Width of a letter over the columns, the widest of the picture."""
MAX_LETTERS = 16

PLAIN = ("decoded", "final")
"""Looks whose token, over the column, says all there is to say."""


@dataclass(frozen=True)
class Column:
    """One position of the picture.

    Args:
        token: what stands there at last; None if it was never decoded.
        about: in words, for the tooltip.
        given: part of the prompt.
        past: right of the end of the answer.
    """

    token: str | None
    about: str
    given: bool
    past: bool


def columns_of(trace: Trace) -> dict[int, Column]:
    """The columns of every block that has a step, by position."""
    prompt_len = len(trace.header.prompt_token_ids)
    end = prompt_len + len(trace.summary.token_ids)
    columns: dict[int, Column] = {}
    for step in trace.steps:
        for i, position in enumerate(step.positions):
            token, before = step.tokens[i], columns.get(position)
            if before is not None and step.edited[i]:
                about = f"position {position}: {token!r} (id {step.token_ids[i]}), edited in step "
                about += f"{step.step}" + _number("confidence", step.confidence[i])
                columns[position] = replace(before, token=token, about=about)
            elif before is None or (before.token is None and token is not None):
                about = f"position {position}"
                if position < prompt_len:
                    about += f": {token!r}, given by the prompt"
                elif token is not None:
                    about += f": {token!r} (id {step.token_ids[i]}), decoded in step {step.step}"
                    about += _number("confidence", step.confidence[i])
                columns[position] = Column(token, about, position < prompt_len, position >= end)
    return columns


class Band:
    """Consecutive blocks and their steps.

    Args:
        steps: of these blocks, in order; at least one.
        columns: of every block of the trace.
        block_length: tokens per block.
    """

    def __init__(
        self, steps: tuple[TraceStep, ...], columns: dict[int, Column], block_length: int
    ) -> None:
        self.steps = steps
        self._block_length = block_length
        self._first = steps[0].block_start
        self._end = steps[-1].block_start + block_length
        self.columns = {position: columns[position] for position in range(self._first, self._end)}
        longest = max(_letters(label(column.token)) for column in self.columns.values())
        self._rows_top = 40 + round(LETTER * longest)
        self._counts = self._x(self._end - 1) + PITCH
        self.width = self._counts + COUNTS
        self.num_blocks = (self._end - self._first) // block_length
        self.height = self._rows_top + PITCH * len(steps) + BLOCK_GAP * (self.num_blocks - 1)

    def leftover_of(self, step: TraceStep) -> list[int]:
        """The leftover positions that stand in this band, not at the end of the one above."""
        return [position for position in step.leftover if position in self.columns]

    def draw(self) -> str:
        """All elements, relative to the upper left corner of the band."""
        parts = [*self._block_marks(), *self._tokens(), *self._titles()]
        y = self._rows_top
        before = self.steps[0]
        for step in self.steps:
            y += BLOCK_GAP if step.block_start != before.block_start else 0
            parts += self._row(step, y)
            y, before = y + PITCH, step
        return "\n".join([*parts, *self._overlays()])

    def _x(self, position: int) -> int:
        index = position - self._first
        return LABELS + PITCH * index + BLOCK_GAP * (index // self._block_length)

    def _starts(self) -> range:
        return range(self._first, self._end, self._block_length)

    def _block_marks(self) -> Iterator[str]:
        """Each block's number and extent, as far as they fit, over a bracket of its columns."""
        width = PITCH * self._block_length - 1
        for start in self._starts():
            left, name = self._x(start), f"block {start // self._block_length}"
            extent = f" (positions {start} to {start + self._block_length - 1})"
            for text in (name + extent, name):
                if LETTER * len(text) <= width:
                    yield element("text", text, x=left, y=11, class_="muted")
                    break
            yield element("path", class_="mark", d=f"M{left + 0.5} 21v-4h{width - 1}v4")

    def _tokens(self) -> Iterator[str]:
        for position, column in self.columns.items():
            if column.token is None:
                continue
            x, y = self._x(position) + CELL - 2.5, self._rows_top - 5
            look = " given" if column.given else " past" if column.past else ""
            yield element(
                "text",
                element("title", words(column.about)),
                label_markup(column.token),
                class_=f"token{look}",
                transform=f"translate({x:g} {y})rotate(-90)",
            )

    def _titles(self) -> Iterator[str]:
        y = self._rows_top - 6
        yield element("text", "step", x=LABELS - 8, y=y, class_="muted right")
        for (name, look), at in zip(COUNTED.items(), COUNTS_AT, strict=True):
            x = self._counts + at
            if look:
                yield _bar(look, x - 8, y - 7, 8, 8)
            yield element(
                "text", name, class_="muted", transform=f"translate({x} {y - 12})rotate(-90)"
            )

    def _row(self, step: TraceStep, y: int) -> Iterator[str]:
        yield element("text", str(step.step), x=LABELS - 8, y=y + 10, class_="muted right")
        for start in self._starts():
            if start != step.block_start:
                look = "committed" if start < step.block_start else "later"
                yield _bar(look, self._x(start), y, PITCH * self._block_length - 1)
        if leftover := self.leftover_of(step):
            places = squares([self._x(position) for position in leftover], y, "committing")
            yield element("path", class_="committing", d=places)
        plain: dict[str, list[int]] = {}
        for i, position in enumerate(step.positions):
            look, x = look_of(step, i), self._x(position)
            if look in PLAIN:
                plain.setdefault(look, []).append(x)
            else:
                became = {"new": "decoded", "edited": "edited to"}.get(look)
                about = f"{position}: {became or step.states[i]}"
                if became:
                    about += f" {step.tokens[i]!r}"
                about += _number("confidence", step.confidence[i])
                about += _number("delta", step.delta[i])
                yield cell(x, y, look, step.confidence[i], element("title", words(about)))
        for look, xs in plain.items():
            yield element("path", class_=look, d=squares(xs, y, look))
        yield from self._counts_of(step, y)

    def _counts_of(self, step: TraceStep, y: int) -> Iterator[str]:
        """The step's work as a bar on a bar for the whole block, and as numbers."""
        counts = (step.processed_tokens, step.retained_tokens, step.decoded_tokens)
        for look, count in zip(
            ("whole", "low", "full"), (self._block_length, *counts[:2]), strict=True
        ):
            width = BAR * count / (2 * self._block_length)
            yield _bar(look, self._counts + BAR_AT, y + 2, width, CELL - 4)
        for at, count in zip(COUNTS_AT, counts, strict=True):
            yield element("text", str(count), x=self._counts + at, y=y + 10, class_="count")

    def _overlays(self) -> Iterator[str]:
        """What holds for whole columns: the prompt's are veiled, a line ends the answer."""
        given = [position for position, column in self.columns.items() if column.given]
        past = [position for position, column in self.columns.items() if column.past]
        top, height = self._rows_top, self.height - self._rows_top
        if given:
            width = self._x(given[-1]) + CELL - self._x(given[0])
            yield element(
                "rect",
                x=self._x(given[0]),
                y=top,
                width=width,
                height=height,
                fill="url(#prompt)",
                pointer_events="none",
            )
        if past and past[0] > self._first:
            x = self._x(past[0]) - 0.5
            yield element("path", class_="end", d=f"M{x} {top - 4}v{height + 8}")


def label(token: str | None) -> str:
    """A token over its column: spaces as dots, anything unprintable spelt out, cut if long."""
    text = printable(token or "").replace(" ", "·")
    return text if len(text) <= MAX_LETTERS else text[: MAX_LETTERS - 1] + "…"


def label_markup(token: str) -> str:
    """The label as an element's content, its dots pale."""
    shown = label(token)
    if set(shown) <= {"·"}:
        return shown
    return words(shown).replace("·", element("tspan", "·", class_="space"))


def _letters(text: str) -> int:
    """Widths of letters; East Asian ones are two wide."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _number(name: str, value: float | None) -> str:
    return "" if value is None else f", {name} {value:.3g}"


def _bar(look: str, x: float, y: float, width: float, height: float = CELL) -> str:
    return element("rect", class_=look, x=x, y=y, width=width, height=height)
