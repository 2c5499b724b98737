"""How a position of a step looks in the picture of a trace.

Blue is decoded, purple edited, orange masked, grey evicted, green committed (hues that colour-blind
readers tell apart, after Okabe and Ito); strong is computed in the step, pale is not. The card
brings its own light ground, so that the picture is the same on light and dark pages.
"""

from __future__ import annotations

from focus_ray.cli.svg import element
from focus_ray.cli.trace_records import TraceStep

CELL = 12

LOOKS = {
    "new": "decoded in this step",
    "edited": "decoded before, replaced in this step",
    "retained": "masked, retained: computed in full",
    "masked": "masked: computed in full",
    "evicted": "masked, evicted after layer 1",
    "skipped": "masked, evicted before layer 0",
    "decoded": "decoded before, computed again",
    "final": "decoded before, KV final: not computed",
    "committing": "of the block before: computed once more, now committed",
    "committed": "committed",
    "later": "not begun",
}
"""Meanings, in the order of the legend."""

BARS = ("new", "edited", "retained", "masked")
"""Filled from below as high as the step's confidence."""

OUTLINED = (*BARS, "skipped")

STYLE = """
text{font:11px -apple-system,BlinkMacSystemFont,"Segoe UI","Noto Sans",Helvetica,Arial,sans-serif;
fill:#1f2328}
.title{font-size:17px;font-weight:600}.facts{font-size:13px}.muted{fill:#59636e}
.token,.count{font:10.5px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.right,.count{text-anchor:end}.space{fill:#afb8c1}.past{fill:#a0a9b2}.given{fill:#8250df}
.card{fill:#fff;stroke:#d1d9e0}.mark{stroke:#8c959f;fill:none}
.end{stroke:#1f2328;stroke-dasharray:3 3}
.new{fill:#e4f0f9;stroke:#0063a8}.bar-new{fill:#0063a8}
.edited{fill:#f9e9f1;stroke:#b14a86}.bar-edited{fill:#cc79a7}
.retained,.masked{fill:#fdf1d6;stroke:#e69f00}.bar-retained,.bar-masked{fill:#e69f00}
.evicted{fill:#d9dee3}.skipped{fill:#fff;stroke:#c4ccd4}
.decoded{fill:#8fc1e7}.final{fill:#dcebf7}
.committing{fill:#2f9e7e}.committed{fill:#d3eee4}.later{fill:#f3f5f7}
.whole{fill:#eaeef2}.low{fill:#b4bec8}.full{fill:#59636e}
""".replace("\n", "")


def look_of(step: TraceStep, index: int) -> str:
    """A key of ``LOOKS`` for the step's position number ``index``."""
    state, processed = step.states[index], step.processed[index]
    if step.newly_decoded[index]:
        return "new"
    if step.edited[index]:
        return "edited"
    if state == "decoded":
        return "decoded" if processed else "final"
    if state == "evicted":
        return "evicted" if processed else "skipped"
    return state


def cell(x: int, y: int, look: str, confidence: float | None, tooltip: str = "") -> str:
    """One square with its bar.

    Args:
        confidence: 0 to 1; None draws no bar.
        tooltip: a ``title`` element, or nothing.
    """
    square = element("path", class_=look, d=squares([x], y, look))
    if look not in BARS or confidence is None:
        return element("g", tooltip, square) if tooltip else square
    height = round(CELL * confidence, 1)
    bar = element("path", class_=f"bar-{look}", d=f"M{x} {y + CELL}h{CELL}v{-height:g}h-{CELL}z")
    return element("g", tooltip, square, bar)


def squares(xs: list[int], y: int, look: str) -> str:
    """Path data of squares in one row."""
    inset = 0.5 if look in OUTLINED else 0.0  # half the width of the line
    side = CELL - 2 * inset
    return "".join(f"M{x + inset:g} {y + inset:g}h{side:g}v{side:g}h{-side:g}z" for x in xs)
