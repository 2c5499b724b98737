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
from focus_ray.benchmarks.roofline_bound import Ceilings, roofline_of
from focus_ray.benchmarks.roofline_counts import read_runs
from focus_ray.benchmarks.roofline_layers import products_of
from focus_ray.benchmarks.roofline_products import ProductTimes
from focus_ray.benchmarks.throughput_flags import parse_arguments
from focus_ray.benchmarks.throughput_rows import (
    Row,
)
from focus_ray.benchmarks.throughput_setup import load, make_prompts
from focus_ray.config import EngineConfig
from focus_ray.models.shapes import LLADA2_MINI, SHAPES
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


def test_a_shape_with_experts_is_measured_and_its_experts_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = LLADA2_MINI.model_copy(
        update={
            "vocab_size": 4100,
            "hidden_size": 321,
            "num_hidden_layers": 12,
            "intermediate_size": 768,
            "moe_intermediate_size": 256,
            "num_shared_experts": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
        }
    )
    monkeypatch.setitem(SHAPES, "toy", toy)
    report = tmp_path / "t.json"
    throughput.main(
        [
            *("--shape", "toy", "--device", "cpu", "--mode", "focus@0.8", "--concurrency", "2"),
            *("--num-prompts", "2", "--num-warmups", "0", "--input-len", "40"),
            *("--output-len", "32", "--kv-cache-memory-bytes", str(2**26), "--json", str(report)),
        ]
    )
    assert "of 8 experts a layer" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["model"]["shape"] == "toy" and found["model"]["weights"] == "expanded"
    assert len(found["experts"]["least_share"]) == 11
    assert sum(found["rows"][0]["finish_reasons"].values()) == 2
    run = read_runs(report).runs[0]
    assert run.experts_touched[0] == (1, 2.0)
    times = {product.name: ProductTimes(product, ((1, 1e-6),)) for product in products_of(toy)}
    judged = roofline_of(run, toy, Ceilings(1e12, times, itemsize=4))
    assert judged.assumed == () and 0 < judged.fraction < 1


def test_two_ranks_are_measured_as_one_engine(tmp_path: Path) -> None:
    reports = {}
    for size in ("1", "2"):
        file = tmp_path / f"{size}.json"
        throughput.main(
            [
                *("--device", "cpu", "--mode", "block@0.8", "--concurrency", "2"),
                *("--tensor-parallel-size", size, "--num-prompts", "2", "--num-warmups", "0"),
                *("--input-len", "40", "--output-len", "12", "--kv-cache-memory-bytes", "67108864"),
                *("--json", str(file)),
            ]
        )
        reports[size] = json.loads(file.read_text())
    assert reports["2"]["model"] == {**reports["1"]["model"], "tensor_parallel_size": 2}
    one, two = (report["rows"][0] for report in reports.values())
    for name in ("finish_reasons", "exact_match", "steps", "processed_tokens", "decoded_tokens"):
        assert two[name] == one[name]


def test_a_shape_for_several_ranks_is_asked_for_as_a_folder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--tensor-parallel-size", "2", "--shape", "sdar-8b"], None)
    assert "--model DIR in place of --shape" in capsys.readouterr().err


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
