from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from focus_ray.benchmarks.moe import main
from focus_ray.benchmarks.moe_work import QUICK_SHAPES, SKEWS, Experts, MoeShape, work_of
from focus_ray.kernels.routing import Routing


def test_a_quick_run_measures_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "moe.json"
    main(["--quick", "--json", str(path)])
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*QUICK_SHAPES, *SKEWS))
    report = json.loads(path.read_text())
    assert report["device"].startswith("CPU")
    assert len(report["times"]) == len(QUICK_SHAPES) * len(SKEWS) * 2
    limits = report["limits"]
    for row in report["times"]:
        shape = QUICK_SHAPES[row["shape"]]
        assert row["touched"] >= shape.num_chosen
        assert 1 <= row["fullest"] <= row["num_tokens"]
        least_s = row["num_bytes"] / limits["bytes_per_s"], row["num_flops"] / limits["flops_per_s"]
        assert row["bound_s"] == pytest.approx(max(least_s))
        assert row["share_of_bound"] == pytest.approx(row["bound_s"] / row["moe_s"])
        assert min(row["moe_s"], row["moe_definition_s"], row["route_s"]) > 0


def test_work_is_counted_by_hand() -> None:
    expert_Tk = torch.tensor([[0, 1], [1, 3], [1, 0]], dtype=torch.int32)
    routing = Routing(expert_Tk, torch.ones(3, 2))
    work = work_of(MoeShape("by hand", 10, 4, 5, 2), routing, itemsize=2)
    assert (work.touched, work.fullest) == (3, 3)
    assert work.num_bytes == 3 * (10 * 4 * 3) * 2
    assert work.num_flops == 6 * (10 * 4 * 3) * 2


def test_skewed_routing_fills_some_experts_more() -> None:
    experts = Experts(QUICK_SHAPES["quick"], torch.device("cpu"), torch.float32)
    spread, skewed = (
        work_of(experts.shape, experts.route(experts.logits(400, skew)), 4)
        for skew in SKEWS.values()
    )
    assert skewed.fullest > 1.5 * spread.fullest


def test_the_real_shapes_ask_for_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, the run would be a real one")
    with pytest.raises(SystemExit, match="--quick"):
        main([])


def test_no_tokens_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--quick", "--tokens", "0"])
    assert "--tokens must be at least 1, got 0" in capsys.readouterr().err
