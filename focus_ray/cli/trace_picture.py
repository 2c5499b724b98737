"""A trace as a picture: positions across, steps down, one SVG text. Pure; knows no engine.

The answer stands over its columns. Each row is one step: the current block in the looks of its
positions, what lies left of it committed, what lies right of it not begun. Tokens of the block
before that the step makes final are marked. Where the columns are used up, the next blocks go into
a further band below.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from focus_ray.cli.svg import element, printable, words
from focus_ray.cli.trace_band import Band, columns_of
from focus_ray.cli.trace_looks import CELL, LOOKS, STYLE, cell, look_of
from focus_ray.cli.trace_records import Trace, TraceHeader

MARGIN = 24
MIN_WIDTH = 780
LINE = 18
MAX_NAME = 30
LETTER = 5.9
"""Width of a letter of the small text; an estimate on the safe side."""

HOW_TO_READ = (
    "A row is a denoising step, a column a position, with its final token on top. "
    "A square is filled as high as the confidence in its token."
)
VEIL = element(
    "pattern",
    element("rect", width=2, height=5, fill="#fff", fill_opacity=0.8),
    id="prompt",
    width=5,
    height=5,
    patternUnits="userSpaceOnUse",
    patternTransform="rotate(45)",
)


@dataclass(frozen=True)
class _Part:
    """Something drawn from its upper left corner; sizes in pixels."""

    svg: str
    width: float
    height: float


def draw(trace: Trace, *, columns: int = 64, max_steps: int = 200) -> str:
    """The SVG of a trace.

    Args:
        columns: most positions side by side, but at least a block; the rest goes below.
        max_steps: most rows; a note says so where there are more steps.
    """
    bands = list(_bands(trace, columns, max_steps))
    width = max([MIN_WIDTH, *(band.width + 2 * MARGIN for band in bands)])
    space = width - 2 * MARGIN
    parts = [
        *_head(trace.header, space),
        _flow(_legend(bands), space),
        *(_Part(band.draw(), band.width, band.height + 16) for band in bands),
        *_lines(trace.summary.totals, space),
    ]
    if (total := len(trace.steps)) > max_steps:
        note = f"Cut after {max_steps} of {total} steps; --max-steps {total} draws all of them."
        parts += _lines(note, space)
    y = float(MARGIN)
    drawn = []
    for part in parts:
        drawn.append(element("g", part.svg, transform=f"translate({MARGIN} {y:g})"))
        y += part.height
    height = y + MARGIN - 8
    card = element("rect", class_="card", x=0.5, y=0.5, width=width - 1, height=height - 1, rx=6)
    return element(
        "svg",
        "\n" + element("style", STYLE),
        element("defs", VEIL),
        *(f"\n{child}" for child in (card, *drawn)),
        xmlns="http://www.w3.org/2000/svg",
        width=width,
        height=height,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=f"Denoising steps of an answer by {trace.header.model}",
    )


def _bands(trace: Trace, columns: int, max_steps: int) -> Iterator[Band]:
    """The drawn steps, cut where the columns are used up."""
    length = trace.header.block_length
    steps, described = trace.steps[:max_steps], columns_of(trace)
    across = max(1, columns // length) * length
    origin = steps[0].block_start if steps else 0
    for _, group in groupby(steps, lambda step: (step.block_start - origin) // across):
        yield Band(tuple(group), described, length)


def _head(header: TraceHeader, space: float) -> Iterator[_Part]:
    """Who decoded how, and what was asked."""
    facts = [f"block length {header.block_length}"]
    if header.eviction_policy is not None:
        facts = [f"policy {header.eviction_policy}", f"alpha {header.focus_alpha:g}", *facts]
    if header.unmasking == "low_confidence_dynamic":
        facts.append(f"threshold {header.confidence_threshold:g}")
    elif header.unmasking == "joint_threshold":
        facts.append(f"thresholds {header.confidence_threshold:g}, {header.editing_threshold:g}")
    else:
        facts.append(f"{header.unmasking}, {header.denoising_steps} steps per block")
    title = element(
        "text",
        element(
            "tspan", words(f"{_tail(header.model)}, decoding {header.decoding}"), class_="title"
        ),
        element("tspan", words(" · ".join(facts)), class_="facts muted", dx=14),
        y=14,
    )
    yield _Part(title, space, 30)
    yield from _lines(f"Prompt: {header.prompt}", space, most=2)
    yield from _lines(HOW_TO_READ, space)


def _tail(name: str) -> str:
    """The end of a name, which in a path says most."""
    return name if len(name) <= MAX_NAME else "…" + name[1 - MAX_NAME :]


def _legend(bands: list[Band]) -> Iterator[_Part]:
    """What appears in the picture, each once."""
    seen = {
        look_of(step, i)
        for band in bands
        for step in band.steps
        for i in range(len(step.positions))
    }
    if any(band.leftover_of(step) for band in bands for step in band.steps):
        seen.add("committing")
    if any(band.num_blocks > 1 for band in bands):
        seen |= {"committed", "later"}
    for look, meaning in LOOKS.items():
        if look in seen:
            yield _entry(cell(0, 0, look, 0.7), meaning)
    columns = [column for band in bands for column in band.columns.values()]
    if any(column.given for column in columns):
        veil = element("rect", width=CELL, height=CELL, fill="url(#prompt)")
        yield _entry(cell(0, 0, "decoded", None) + veil, "prompt")
    if any(column.past for column in columns):
        line = element("path", class_="end", d=f"M{CELL / 2:g} -2v{CELL + 4}")
        yield _entry(line, "end of the answer")


def _entry(mark: str, meaning: str) -> _Part:
    text = element("text", words(meaning), x=CELL + 6, y=10)
    return _Part(mark + text, CELL + 6 + LETTER * len(meaning) + 14, CELL + 8)


def _flow(entries: Iterator[_Part], space: float) -> _Part:
    """Entries side by side, in as many lines as they need."""
    x = y = 0.0
    placed = []
    for entry in entries:
        if x and x + entry.width > space:
            x, y = 0.0, y + entry.height
        placed.append(element("g", entry.svg, transform=f"translate({x:g} {y + 6:g})"))
        x += entry.width
    return _Part("".join(placed), space, y + 34)


def _lines(text: str, space: float, most: int | None = None) -> Iterator[_Part]:
    """A paragraph of at most ``most`` lines."""
    lines = textwrap.wrap(printable(text), int(space / LETTER), max_lines=most, placeholder=" …")
    for line in lines:
        yield _Part(element("text", words(line), y=11, class_="muted"), space, LINE)
