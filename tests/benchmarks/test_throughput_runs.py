"""Throughput measured for real: the bundled model on a CPU, a few requests."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from focus_ray.benchmarks import throughput
from focus_ray.benchmarks.roofline_counts import read_runs
from focus_ray.benchmarks.throughput_flags import parse_arguments
from focus_ray.benchmarks.throughput_rows import (
    Row,
)
from focus_ray.benchmarks.throughput_setup import load, make_prompts
from focus_ray.config import EngineConfig
from focus_ray.sampling import SamplingParams


def test_a_real_run_reports_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    start: Callable[..., throughput.Bench] = throughput.Bench.start

    def counted(*args: object) -> throughput.Bench:
        made.append(1)
        return start(*args)

    monkeypatch.setattr(throughput.Bench, "start", counted)
    files = [str(tmp_path / "new" / name) for name in ("t.json", "t.svg")]
    throughput.main(
        [
            *("--device", "cpu", "--mode", "block@0.8", "--mode", "focus@0.8"),
            *("--concurrency", "1", "2", "--num-prompts", "6", "--max-num-seqs", "2"),
            *("--input-len", "60", "--output-len", "40", "--kv-cache-memory-bytes", str(2**26)),
            *("--num-warmups", "1", "--json", files[0], "--plot", files[1]),
        ]
    )
    assert len(made) == 2  # an engine for each mode
    printed = capsys.readouterr().out
    assert "focus@0.8" in printed and "reached" in printed
    report = json.loads(Path(files[0]).read_text())
    assert report["device"].startswith("CPU")
    assert report["workload"]["num_different"] == 6
    assert {(r["mode"], r["concurrency"]) for r in report["rows"]} == {
        (mode, n) for mode in ("block@0.8", "focus@0.8") for n in (1, 2)
    }
    for found in report["rows"]:
        steady = found["steady"]
        assert found["num_requests"] == sum(found["finish_reasons"].values()) == 6
        assert 0 < steady["wall_s"] < found["wall_s"]
        assert 0 < steady["output_tokens"] < found["output_tokens"] <= found["decoded_tokens"]
        assert 0 < steady["steps"] < found["steps"]
        assert found["output_tokens_per_s"] * found["wall_s"] == pytest.approx(
            found["output_tokens"]
        )
        assert found["first_token"]["p50"] <= found["latency"]["p50"]
        assert found["logit_rows"] > 0 and found["kv_positions_read"] > 0
        score = found["exact_match"]["all"]
        assert score["num_problems"] == 6
    evicting = [r for r in report["rows"] if r["mode"] == "focus@0.8"]
    assert all(r["retained_tokens"] < r["processed_tokens"] for r in evicting)
    assert len(report["comparisons"]) == 2
    ElementTree.parse(files[1])
    runs = read_runs(Path(files[0])).runs  # the roofline is drawn from the same file
    assert {r.label for r in runs} >= {
        f"{mode} x {n}" for mode in ("block@0.8", "focus@0.8") for n in (1, 2)
    }
    assert not any(r.assumed for r in runs)


def test_an_interrupted_run_keeps_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = throughput.measure

    def measure_once(args: Namespace, bench: throughput.Bench, mode: str, *rest: Any) -> Row:
        if mode != "block@0.8":
            raise KeyboardInterrupt
        row: Row = measure(args, bench, mode, *rest)
        return row

    monkeypatch.setattr(throughput, "measure", measure_once)
    report = tmp_path / "t.json"
    with pytest.raises(SystemExit) as stopped:
        throughput.main(
            [
                *("--device", "cpu", "--mode", "block@0.8", "--mode", "focus@0.8"),
                *("--concurrency", "1", "--num-prompts", "1", "--num-warmups", "0"),
                *("--input-len", "60", "--output-len", "8", "--json", str(report)),
            ]
        )
    assert stopped.value.code == 130
    assert "interrupted after 1 runs" in capsys.readouterr().out
    assert [row["mode"] for row in json.loads(report.read_text())["rows"]] == ["block@0.8"]


def test_full_steps_are_profiled_and_leave_the_engine_idle() -> None:
    flags = ["--device", "cpu", "--profile", "2", "--input-len", "40", "--output-len", "8"]
    args = parse_arguments(flags, None)
    loaded = load(args)
    prompts = make_prompts(args, loaded, 3)
    config = EngineConfig(device="cpu", max_num_seqs=2, kv_cache_memory_bytes=2**26)
    bench = throughput.Bench.start(config, loaded)
    profile = throughput.profile_full(args, bench.engine, 2, prompts, SamplingParams())
    assert profile is not None
    assert profile.step_s > 0 and profile.num_tokens > 0
    assert 0 < profile.busy_share <= 1
    assert not bench.engine.has_unfinished()
