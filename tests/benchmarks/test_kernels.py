from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KERNELS = {
    "importance",
    "retain",
    "compact",
    "rms_norm",
    "add_rms_norm",
    "norm_rotary_fill",
    "swiglu",
    "paged_attention",
    "confidence",
    "confidence, drawn",
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_a_quick_run_measures_everything(tmp_path: Path) -> None:
    done = run("--quick", "--json", str(tmp_path / "kernels.json"))
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in KERNELS)
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["device"].startswith("CPU")
    assert {row["name"] for row in report["kernels"]} == KERNELS
    assert len(report["attention_few_queries"]) == 4
    times = [row["kernel_s"] for row in report["kernels"] + report["attention_few_queries"]]
    times += [product["seconds"] for product in report["products"]]
    assert all(seconds > 0 for seconds in times)
    for step in report["steps"]:
        assert step["num_processed"] > step["num_retained"] > step["num_retained_masked"] > 0
        assert step["total_s"] > step["other_layers_s"] > step["head_s"] > 0
        assert step["eviction_share"] == pytest.approx(step["eviction_s"] / step["total_s"])


def test_the_real_shapes_ask_for_a_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, the run would be a real one")
    done = run()
    assert done.returncode == 1
    assert "--quick" in done.stderr


def test_who_takes_the_script_for_a_package_of_its_name_is_not_harmed() -> None:
    """transformers asks ``kernels`` for its version, whatever stands under that name."""
    code = "import sys, kernels; print(kernels.__version__, 'torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=60)
    assert done.stdout == "0 False\n", done.stderr
