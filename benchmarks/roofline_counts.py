"""What a recorded run had to compute, as far as its record says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

REQUIRED = ("steps", "wall_s", "processed_tokens", "retained_tokens")


@dataclass(frozen=True)
class RunCounts:
    """Sums over the measured steps of one run.

    Args:
        label: what the run is called in tables.
        steps: passes of the whole batch.
        wall_s: seconds in which these were done, whatever else happened in them.
        processed_tokens: of decoding blocks, that entered layer 0.
        retained_tokens: how many of these went past layer 1.
        prefill_tokens: besides, in all layers.
        logit_rows: hidden states that logits were computed for.
        kv_positions_read: summed over steps and rows, how many KV positions a row's queries see;
            every layer reads these. What prefill reads may be missing from it.
        assumed: what the record does not say, and what was taken instead.
        experts_touched: by tokens of a step, as ``expert_load.py`` counts it; empty: not counted.
    """

    label: str
    steps: int
    wall_s: float
    processed_tokens: float
    retained_tokens: float
    prefill_tokens: float
    logit_rows: float
    kv_positions_read: float
    assumed: tuple[str, ...] = ()
    experts_touched: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Recorded:
    """The runs of a report, and what they ran on, as far as it says."""

    runs: list[RunCounts]
    shape: str | None
    device: str | None


def read_runs(path: Path) -> Recorded:
    """The rows of a throughput report that say how many tokens they had to compute.

    A row's whole run comes first, and then, where it has one, its steady stretch: the part in which
    every place was taken.

    Raises:
        ValueError: the file is not such a report, or none of its rows says so.
    """
    report = read_json(path)
    rows = report.get("rows") if isinstance(report, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{path} has no list 'rows'; give a report of throughput.py --json")
    stretches = [each for row in rows if isinstance(row, dict) for each in _stretches(row)]
    runs = [counts_of(each) for each in stretches if all(each.get(name) for name in REQUIRED)]
    if not runs:
        raise ValueError(
            f"none of the {len(rows)} rows of {path} has {', '.join(REQUIRED)}; "
            "measure again with throughput.py --json"
        )
    experts = report.get("experts")
    if isinstance(experts, dict):
        touched = tuple((int(size), float(count)) for size, count in experts["touched"])
        runs = [replace(run, experts_touched=touched) for run in runs]
    model = report.get("model")
    shape = model.get("shape") if isinstance(model, dict) else None
    return Recorded(runs, shape, report.get("device"))


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is no JSON; names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def counts_of(row: Mapping[str, object]) -> RunCounts:
    """Read one row of a throughput report.

    Keys: ``steps``, ``wall_s``, ``processed_tokens``, ``retained_tokens`` must be there.
    ``prefill_tokens``, ``logit_rows`` and ``kv_positions_read`` are taken where they stand, and
    else from ``decoded_tokens`` (as many logit rows at the least) and from ``mean_context`` (tokens
    that a sequence sees in a step) times ``slot_steps`` (denoising steps summed over sequences).
    ``mode``, ``concurrency`` and ``label`` name the run.
    """
    assumed: list[str] = []

    def number(name: str) -> float | None:
        value = row.get(name)
        return float(value) if isinstance(value, int | float) else None

    def required(name: str) -> float:
        value = number(name)
        if not value:
            raise ValueError(f"a row of the report has no {name}: {row.get(name)!r}")
        return value

    prefill = number("prefill_tokens")
    if prefill is None:
        assumed.append("prefill_tokens = 0")
    logit_rows = number("logit_rows")
    if logit_rows is None:
        logit_rows = number("decoded_tokens") or 0.0
        assumed.append("logit_rows = decoded_tokens" if logit_rows else "logit_rows = 0")
    positions = number("kv_positions_read")
    if positions is None:
        positions = (number("mean_context") or 0.0) * (number("slot_steps") or 0.0)
        taken = "mean_context * slot_steps" if positions else "0"
        assumed.append(f"kv_positions_read = {taken}")
    return RunCounts(
        label=_label(row),
        steps=int(required("steps")),
        wall_s=required("wall_s"),
        processed_tokens=required("processed_tokens"),
        retained_tokens=required("retained_tokens"),
        prefill_tokens=prefill or 0.0,
        logit_rows=logit_rows,
        kv_positions_read=positions,
        assumed=tuple(assumed),
    )


def _stretches(row: Mapping[str, object]) -> list[Mapping[str, object]]:
    steady = row.get("steady")
    if not isinstance(steady, dict):
        return [row]
    return [row, {**steady, "label": f"{_label(row)}, steady"}]


def _label(row: Mapping[str, object]) -> str:
    if "label" in row:
        return str(row["label"])
    parts = [str(row[name]) for name in ("mode", "concurrency") if name in row]
    return " x ".join(parts) or "run"
