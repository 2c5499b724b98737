from __future__ import annotations

import json
from pathlib import Path

import pytest

from focus_ray.benchmarks.profile_kernels import (
    Kernel,
    activity_of,
    group_of,
    read_trace,
    short_name,
    unnested,
)
from focus_ray.benchmarks.profile_step import (
    Clients,
    main,
    make_engine,
    parse_arguments,
    profile_engine,
)

TINY = "sdar-tiny"


def steps_of(
    *kernels: tuple[str, float, float], step_s: float = 10.0, count: int = 4
) -> list[Kernel]:
    """The same kernels in each of some steps."""
    return [
        Kernel(name, step * step_s + start_s, step * step_s + end_s)
        for step in range(count)
        for name, start_s, end_s in kernels
    ]


def test_whole_steps_are_counted_without_the_first() -> None:
    kernels = steps_of(("gemm_a", 0, 4), ("rms_norm", 4, 5), ("advance_blocks_kernel", 8, 9))
    found = activity_of(kernels, num_steps=99)
    assert found.num_steps == 3
    assert found.step_s == pytest.approx(10)
    assert found.busy_s == pytest.approx(6)
    assert found.busy_share == pytest.approx(0.6)
    assert found.groups == pytest.approx({"GEMM": 4, "norm, rotary": 1, "advance": 1})
    assert [row.calls for row in found.kernels] == [1, 1, 1]
    gaps = {(gap.after, gap.before): gap.total_s for gap in found.gaps}
    assert gaps.pop(("the step before", "gemm_a")) == pytest.approx(1 / 3)
    assert gaps.pop(("advance_blocks_kernel", "gemm_a")) == pytest.approx(2 / 3)
    assert gaps == pytest.approx({("rms_norm", "advance_blocks_kernel"): 3})


def test_what_overlaps_is_counted_once() -> None:
    # The second begins while the first still runs, the third lies within the second.
    found = activity_of([Kernel("a", 0, 4), Kernel("b", 3, 8), Kernel("c", 5, 6)], num_steps=1)
    assert {row.name: row.own_s for row in found.kernels} == {"a": 4, "b": 4, "c": 0}
    assert {row.name: row.mean_s for row in found.kernels} == {"a": 4, "b": 5, "c": 1}
    assert found.busy_s == 8
    assert found.gaps == ()


def test_a_kernel_that_spans_the_end_counts_as_far_as_it_lies_within() -> None:
    kernels = steps_of(("advance_blocks_kernel", 0, 1), ("gemm", 1, 10.5), count=3)
    found = activity_of(sorted(kernels, key=lambda kernel: kernel.start_s), num_steps=1)
    assert found.num_steps == 2
    assert found.busy_share == pytest.approx(1.0)


def test_nested_operations_are_cut_at_those_they_call() -> None:
    kernels = [
        Kernel("outer", 0, 10),
        Kernel("inner", 2, 5),
        Kernel("innermost", 2, 3),
        Kernel("second", 7, 8),
        Kernel("next", 10, 11),
    ]
    pieces = [(p.name, p.start_s, p.end_s, p.is_rest) for p in unnested(kernels)]
    assert [piece for piece in pieces if piece[2] > piece[1]] == [
        ("outer", 0, 2, False),
        ("innermost", 2, 3, False),
        ("inner", 3, 5, True),
        ("outer", 5, 7, True),
        ("second", 7, 8, False),
        ("outer", 8, 10, True),
        ("next", 10, 11, False),
    ]
    calls = {row.name: row.calls for row in activity_of(unnested(kernels), 1).kernels}
    assert calls == {"outer": 1, "inner": 1, "innermost": 1, "second": 1, "next": 1}


def test_a_device_in_the_trace_counts_alone(tmp_path: Path) -> None:
    epoch = 1_700_000_000_000_000.0
    events = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": epoch, "dur": 5, "tid": 1},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": epoch, "dur": 5},
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": epoch + 2, "dur": 3, "tid": 7},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": epoch + 1, "dur": 1},
        {"ph": "i", "cat": "kernel", "name": "instant", "ts": epoch},
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = read_trace(path)
    assert [kernel.name for kernel in found] == ["Memcpy HtoD", "gemm"]
    assert found[1].end_s - found[1].start_s == pytest.approx(3e-6)
    path.write_text(json.dumps({"traceEvents": events[-2:]}))
    with pytest.raises(ValueError, match="saw no kernel"):
        read_trace(path)


@pytest.mark.parametrize(
    ("name", "group", "short"),
    [
        (
            "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT",
            "GEMM",
            "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT",
        ),
        (
            "void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasLt::Params<float>)",
            "GEMM",
            "splitKreduce_kernel",
        ),
        ("_linear_kernel", "GEMM", "_linear_kernel"),
        ("_attend_kernel", "attention", "_attend_kernel"),
        ("_norm_rotary_fill_kernel", "norm, rotary", "_norm_rotary_fill_kernel"),
        ("_fill_kv_kernel", "fill", "_fill_kv_kernel"),
        ("_importance_kernel", "eviction", "_importance_kernel"),
        ("_confidence_kernel", "confidence", "_confidence_kernel"),
        ("place_rows_kernel", "plan", "place_rows_kernel"),
        ("Memcpy DtoH (Device -> Pinned)", "copies", "Memcpy DtoH"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>, "
            "std::array<char*, 1ul> >(int, at::native::FillFunctor<int>, std::array<char*, 1ul>)",
            "copies",
            "vectorized_elementwise_kernel FillFunctor",
        ),
        ("void at::native::(anonymous namespace)::topk<float>(int)", "other", "topk"),
        ("aten::index", "other", "aten::index"),
    ],
)
def test_kernels_are_named_and_grouped(name: str, group: str, short: str) -> None:
    assert group_of(name) == group
    assert short_name(name) == short


def test_an_engine_that_is_kept_full_is_profiled(tmp_path: Path) -> None:
    engine = make_engine(TINY, "focus@0.8", concurrency=2)
    clients = Clients(engine, 2, max_tokens=64)
    trace = tmp_path / "trace.json"
    found = profile_engine(engine, clients.keep_full, steps=3, trace=trace)
    assert len(engine.running_requests) == 2
    assert json.loads(trace.read_text())["traceEvents"]
    assert 0 < found.host_s <= found.step_s
    assert found.num_tokens > 0
    assert 0 < found.busy_share <= 1
    activity = found.activity
    assert sum(row.share for row in activity.kernels) == pytest.approx(1)
    assert sum(activity.groups.values()) == pytest.approx(activity.busy_s)
    idle_s = sum(gap.total_s for gap in activity.gaps)
    assert activity.busy_s + idle_s == pytest.approx(activity.step_s)
    assert activity.groups["GEMM"] > 0


def test_an_engine_that_runs_dry_is_no_steady_state() -> None:
    engine = make_engine(TINY, "block@0.8", concurrency=1)
    with pytest.raises(ValueError, match="ran out of requests"):
        profile_engine(engine, lambda: None, steps=2)


def test_the_script_writes_what_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "profile.json"
    arguments = f"--shape {TINY} --concurrency 2 --steps 2 --warm-up 1 --json {path}"
    main(arguments.split())
    report = json.loads(path.read_text())
    assert report["busy_share"] == pytest.approx(
        report["activity"]["busy_s"] / report["activity"]["step_s"]
    )
    assert report["groups_s"]["GEMM"] > 0
    shown = capsys.readouterr().out
    assert "aten::mm" in shown
    assert "Idle, largest in sum first" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "sdar-9b"], "none of sdar-tiny"),
        (["--shape", TINY, "--mode", "guess@0.8"], "decoding: .*guess"),
        (["--shape", TINY, "--concurrency", "1", "--max-tokens", "9999999"], "ask for at most"),
    ],
)
def test_what_cannot_be_profiled_is_refused_in_words(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        main(arguments)


@pytest.mark.parametrize("flag", ["--steps", "--concurrency", "--max-tokens", "--warm-up"])
def test_numbers_out_of_range_are_named(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([flag, "-1"])
    assert f"{flag} must be at least" in capsys.readouterr().err
