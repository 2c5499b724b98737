"""Lines over a logarithmic axis, as one SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from focus_ray.cli.svg import element, words

WIDTH, HEIGHT = 780, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 60, 48
LEGEND_LINE = 18
TICKS = 6
"""At most so many steps on the vertical axis."""

# Hues that colour-blind readers tell apart, after Okabe and Ito.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("none", "6 3", "2 3")
"""For more lines than there are colours."""

STYLE = """
text{font:12px -apple-system,BlinkMacSystemFont,"Segoe UI","Noto Sans",Helvetica,Arial,sans-serif;
fill:#1f2328}.title{font-size:17px;font-weight:600}.muted{fill:#59636e}
.card{fill:#fff;stroke:#d1d9e0}.grid{stroke:#eaeef2}.axis{stroke:#8c959f}.middle{text-anchor:middle}
.end{text-anchor:end}
""".replace("\n", "")


@dataclass(frozen=True)
class Line:
    """Points ``(x, y)``, joined from left to right; those of ``is_guide`` are not marked."""

    name: str
    points: Sequence[tuple[float, float]]
    is_guide: bool = False


@dataclass(frozen=True)
class Words:
    """All that is written around the lines; ``x`` and ``y`` say what the axes count."""

    title: str
    subtitle: str
    x: str
    y: str


@dataclass(frozen=True)
class _Scale:
    """From numbers to pixels: ``x`` by its logarithm to base 2, ``y`` from 0."""

    low: float
    high: float
    top: float

    def x(self, value: float) -> float:
        span = math.log2(self.high) - math.log2(self.low)
        share = (math.log2(value) - math.log2(self.low)) / span if span else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self.top * (HEIGHT - TOP - BOTTOM)


def draw_lines(lines: Sequence[Line], texts: Words) -> str:
    """The SVG.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not any(line.points for line in lines):
        raise ValueError("there are no runs to draw")
    levels = sorted({x for line in lines for x, _ in line.points})
    highest = max(y for line in lines for _, y in line.points)
    step = nice_step(highest)
    scale = _Scale(levels[0], levels[-1], step * max(1, math.ceil(highest / step)))
    parts = [
        element("rect", class_="card", x=0.5, y=0.5, width=WIDTH - 1, height=HEIGHT - 1, rx=6),
        element("text", words(texts.title), class_="title", x=LEFT, y=28),
        element("text", words(texts.subtitle), class_="muted", x=LEFT, y=46),
        *_axes(scale, levels, step, texts),
        *(_line(scale, line, place, texts) for place, line in enumerate(lines)),
        *(_entry(line.name, place) for place, line in enumerate(lines)),
    ]
    return element(
        "svg",
        "\n" + element("style", STYLE),
        *(f"\n{part}" for part in parts),
        xmlns="http://www.w3.org/2000/svg",
        width=WIDTH,
        height=HEIGHT,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{texts.title}: {texts.y} against {texts.x}",
    )


def nice_step(highest: float) -> float:
    """The least of 1, 2, 5, 10, 20, ... that covers ``highest`` in at most ``TICKS`` steps."""
    if highest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(highest / TICKS))
    return next(power * m for m in (1, 2, 5, 10) if power * m * TICKS >= highest * (1 - 1e-9))


def _axes(scale: _Scale, levels: Sequence[float], step: float, texts: Words) -> list[str]:
    floor = HEIGHT - BOTTOM
    parts = []
    for tick in range(round(scale.top / step) + 1):
        value = tick * step
        y = scale.y(value)
        parts.append(
            element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y)
            + element("text", f"{value:,.10g}", class_="end muted", x=LEFT - 8, y=y + 4)
        )
    for level in levels:
        x = scale.x(level)
        parts.append(
            element("line", class_="axis", x1=x, x2=x, y1=floor, y2=floor + 4)
            + element("text", f"{level:g}", class_="middle muted", x=x, y=floor + 18)
        )
    parts.append(element("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=floor, y2=floor))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(element("text", words(texts.x), class_="middle", x=middle, y=floor + 38))
    parts.append(
        element(
            "text",
            words(texts.y),
            class_="middle",
            transform=f"translate(18 {(TOP + floor) / 2:g}) rotate(-90)",
        )
    )
    return parts


def _line(scale: _Scale, line: Line, place: int, texts: Words) -> str:
    points = sorted(line.points)
    placed = [(scale.x(x), scale.y(y)) for x, y in points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
    stroke = element("path", d=path, fill="none", stroke_width=2, **_look(place))
    if line.is_guide:
        return stroke
    dots = [
        element(
            "circle",
            element("title", words(f"{line.name}, {x:g} {texts.x}: {y:.6g} {texts.y}")),
            cx=at_x,
            cy=at_y,
            r=3.5,
            fill=COLOURS[place % len(COLOURS)],
        )
        for (at_x, at_y), (x, y) in zip(placed, points, strict=True)
    ]
    return stroke + "".join(dots)


def _entry(name: str, place: int) -> str:
    y = TOP + 12 + place * LEGEND_LINE
    stroke = element(
        "line", x1=LEFT + 14, x2=LEFT + 38, y1=y - 4, y2=y - 4, stroke_width=2, **_look(place)
    )
    return stroke + element("text", words(name), x=LEFT + 44, y=y)


def _look(place: int) -> dict[str, str]:
    dashes = DASHES[place // len(COLOURS) % len(DASHES)]
    return {"stroke": COLOURS[place % len(COLOURS)], "stroke_dasharray": dashes}
