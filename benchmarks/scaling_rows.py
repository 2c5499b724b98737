"""The numbers of one layout under load, and what they are of one device's. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from focus_ray.benchmarks.scaling_layouts import ONE, Layout
from focus_ray.benchmarks.scaling_load import Load
from focus_ray.benchmarks.scores import Score, scores_of
from focus_ray.benchmarks.serving_client import Sent
from focus_ray.benchmarks.serving_rows import ServingFigures, figures_of
from focus_ray.serve.metrics import PREFIX
from focus_ray.tasks import Task

STEPS = f"{PREFIX}engine_steps_total"
MOST_DIFFERENCES = 20


@dataclass(frozen=True)
class Steps:
    """Steps that all engines of a model had taken at a moment, by a clock of the server."""

    at_s: float
    number: int

    @classmethod
    def read(cls, metrics: str, model_name: str, at_s: float) -> Steps:
        """From what ``/metrics`` answered.

        Raises:
            ValueError: no engine of that name is in it.
        """
        found = [
            sample.value
            for family in text_string_to_metric_families(metrics)
            for sample in family.samples
            if sample.name == STEPS and sample.labels["model_name"] == model_name
        ]
        if not found:
            raise ValueError(f"/metrics has no {STEPS} of {model_name}")
        return cls(at_s, int(sum(found)))


@dataclass(frozen=True)
class Difference:
    """An answer that is not the expected one; texts begin with the first character that differs."""

    prompt: int
    position: int
    expected: str
    found: str


@dataclass
class Answers:
    """The first answer to every prompt that any layout of a model gave."""

    texts: dict[int, str] = field(default_factory=dict)

    def differences(self, answers: Iterable[tuple[int, Sent]]) -> tuple[int, list[Difference]]:
        """How many answers were compared, and those that differ; new prompts become known."""
        num_compared, found = 0, []
        for prompt, sent in answers:
            if prompt not in self.texts:
                self.texts[prompt] = sent.text
                continue
            num_compared += 1
            if (expected := self.texts[prompt]) != sent.text:
                found.append(_difference(prompt, expected, sent.text))
        return num_compared, found


@dataclass(frozen=True)
class Row:
    """One layout with so many requests in flight, in the steady stretch.

    Args:
        model: shape, or name.
        concurrency: requests in flight for each engine.
        output_tokens: that clients received in the stretch. The tokens of an answer are spread
            evenly over the events that brought its text.
        step_s: of an engine, on average.
        figures: of requests that ended in the stretch and were sent into a place that another one
            had left; their times only.
        exact_match: of all answers of the run; None where they cannot be judged.
        num_events: with text, that came in the stretch.
        num_compared, differences: with other answers to the same prompts; of the latter the first
            few are kept.
    """

    model: str
    layout: Layout
    concurrency: int
    window_s: float
    output_tokens: float
    step_s: float
    figures: ServingFigures | None
    exact_match: Score | None
    num_events: int
    num_answers: int
    num_compared: int
    num_different: int
    differences: tuple[Difference, ...]

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.window_s

    @property
    def events_per_s(self) -> float:
        return self.num_events / self.window_s

    def as_json(self) -> dict[str, Any]:
        score = self.exact_match
        return {
            **asdict(self),
            "layout": str(self.layout),
            "num_devices": self.layout.num_devices,
            "output_tokens_per_s": self.tokens_per_s,
            "events_per_s": self.events_per_s,
            "figures": None if self.figures is None else _times(self.figures),
            "exact_match": None if score is None else score.as_json(),
        }


@dataclass(frozen=True)
class Comparison:
    """A row against one device with as many requests in flight for each engine.

    Args:
        speed: output tokens per second over those of one device.
        efficiency: that over the number of devices.
        step_speed: a step of one device over a step of this layout.
    """

    speed: float
    efficiency: float
    step_speed: float


def row_of(
    model: str,
    layout: Layout,
    concurrency: int,
    load: Load[Steps],
    tasks: Sequence[Task | None],
    known: Answers,
) -> Row:
    """Everything about a run.

    Args:
        tasks: of the prompts, by number.
        known: answers of the model so far; those of this run are added.
    """
    # The burst of the first fill was prefilled all at once, so its times are no steady ones.
    first = sorted(load.answers, key=lambda answer: answer[1].sent_s)
    late = [sent for _, sent in first[concurrency * layout.num_replicas :]]
    ended = [sent for sent in late if load.start_s < sent.finished_s <= load.end_s]
    judged = [(task, sent.text) for n, sent in load.answers if (task := tasks[n]) is not None]
    num_compared, differences = known.differences(load.answers)
    steps = load.after.number - load.before.number
    stretch_s = load.after.at_s - load.before.at_s
    return Row(
        model=model,
        layout=layout,
        concurrency=concurrency,
        window_s=load.end_s - load.start_s,
        output_tokens=sum(tokens_between(s, load.start_s, load.end_s) for _, s in load.answers),
        step_s=stretch_s * layout.num_replicas / steps if steps else 0.0,
        figures=figures_of(ended) if ended else None,
        exact_match=scores_of(judged).get("all"),
        num_events=sum(num_between(s, load.start_s, load.end_s) for _, s in load.answers),
        num_answers=len(load.answers),
        num_compared=num_compared,
        num_different=len(differences),
        differences=tuple(differences[:MOST_DIFFERENCES]),
    )


def tokens_between(sent: Sent, start_s: float, end_s: float) -> float:
    """Tokens that an answer brought in a stretch, as its events with text tell."""
    if not sent.texts_s:
        return 0.0
    return sent.output_tokens * num_between(sent, start_s, end_s) / len(sent.texts_s)


def num_between(sent: Sent, start_s: float, end_s: float) -> int:
    """Events with text in a stretch."""
    return sum(start_s < at_s <= end_s for at_s in sent.texts_s)


def compare(row: Row, rows: Iterable[Row]) -> Comparison | None:
    """None where one device was not measured, or did nothing."""
    key = (row.model, ONE, row.concurrency)
    base = next((r for r in rows if (r.model, r.layout, r.concurrency) == key), None)
    if base is None or not base.tokens_per_s or not row.step_s:
        return None
    speed = row.tokens_per_s / base.tokens_per_s
    return Comparison(speed, speed / row.layout.num_devices, base.step_s / row.step_s)


def _difference(prompt: int, expected: str, found: str) -> Difference:
    both = zip(expected, found, strict=False)
    shorter = min(len(expected), len(found))
    position = next((n for n, (a, b) in enumerate(both) if a != b), shorter)
    piece = slice(position, position + 40)
    return Difference(prompt, position, expected[piece], found[piece])


def _times(figures: ServingFigures) -> Mapping[str, Any]:
    """The fields that are of single requests; the others are of a whole run."""
    names = (
        *("completed", "ttft", "tpot", "itl", "e2e"),
        *("tokens_per_step", "processed_per_decoded", "retained_per_decoded"),
    )
    return {name: value for name, value in asdict(figures).items() if name in names}
