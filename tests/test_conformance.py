from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from focus_backend import Backend, definitions, kernels
from focus_golden import check_focus_directory
from model_golden import check_model_directory

from focus_ray.kernels.launch import INTERPRETED

TESTS = Path(__file__).parent
SDAR, FOCUS = TESTS / "golden" / "models" / "sdar", TESTS / "golden" / "focus"
LLADA2 = TESTS / "golden" / "models" / "llada2"


@pytest.fixture(scope="module")
def conformance() -> ModuleType:
    """The script as a module; it is run by path and belongs to no package."""
    spec = importlib.util.spec_from_file_location("conformance", TESTS / "conformance.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["conformance"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def golden_copy(tmp_path: Path) -> Path:
    return shutil.copytree(SDAR, tmp_path / "copy")


def keep_cases(directory: Path, count: int) -> dict[str, object]:
    """Leave the first cases only, so that one run takes a moment."""
    golden = json.loads((directory / "expected.json").read_text())
    golden["cases"] = golden["cases"][:count]
    (directory / "expected.json").write_text(json.dumps(golden))
    return golden


@pytest.mark.parametrize(
    ("family", "num_generations"), [("sdar", 38), ("sdar_moe", 38), ("llada2", 45)]
)
def test_golden_checkpoint_is_reproduced(
    family: str, num_generations: int, device: torch.device
) -> None:
    report = check_model_directory(TESTS / "golden" / "models" / family, device.type)
    assert [item for item in report.differences if not item.fragile] == []
    assert report.checked["generations"] == num_generations
    assert report.worst_relative_error < 1e-4


def test_a_wrong_logit_is_found(golden_copy: Path) -> None:
    keep_cases(golden_copy, 0)
    arrays = dict(np.load(golden_copy / "expected.npz"))
    arrays["prefill_logits_b16"][3, 5] += 0.1
    arrays["prefill_hidden_states_b4"][2, 0, 0] += 0.1
    np.savez(golden_copy / "expected.npz", **arrays)
    report = check_model_directory(golden_copy)
    assert sorted(item.what for item in report.differences) == [
        "prefill_hidden_states_b4[2]",
        "prefill_logits_b16",
    ]


@pytest.mark.parametrize(
    ("fragile", "status"),
    [
        pytest.param(False, 1, id="a wrong token fails"),
        pytest.param(True, 0, id="a fragile case is only counted"),
    ],
)
def test_a_wrong_token_is_found(
    conformance: ModuleType, golden_copy: Path, fragile: bool, status: int
) -> None:
    golden = keep_cases(golden_copy, 1)
    case = golden["cases"][0]
    case["steps"][2]["tokens"][0] += 1
    case["final_canvas"][-1] += 1
    case["fragile"] = fragile
    (golden_copy / "expected.json").write_text(json.dumps(golden))
    report = check_model_directory(golden_copy)
    assert [item.what for item in report.differences] == [
        f"{case['name']} step 2",
        f"{case['name']} canvas",
    ]
    assert conformance.main(["--models", str(golden_copy)]) == status


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        pytest.param({"edited": [12]}, "step 3", id="another position is edited"),
        pytest.param({"tokens_after": [1, 1, 1, 1]}, "step 3", id="to other tokens"),
        pytest.param(None, "steps", id="the block ends a step too late"),
    ],
)
def test_a_wrong_edit_is_found(
    tmp_path: Path, wrong: dict[str, list[int]] | None, what: str
) -> None:
    copy = shutil.copytree(LLADA2, tmp_path / "copy")
    golden = json.loads((copy / "expected.json").read_text())
    [case] = golden["cases"] = [c for c in golden["cases"] if c["name"].startswith("41_joint_edit")]
    if wrong is None:
        del case["steps"][-1]
    else:
        case["steps"][3] |= wrong
    (copy / "expected.json").write_text(json.dumps(golden))
    report = check_model_directory(copy)
    assert [item.what for item in report.differences] == [f"{case['name']} {what}"]


def test_an_unsupported_architecture_fails(
    conformance: ModuleType, golden_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((golden_copy / "config.json").read_text())
    config["architectures"] = ["UnknownModel"]
    (golden_copy / "config.json").write_text(json.dumps(config))
    assert conformance.main(["--models", str(golden_copy)]) == 1
    assert "UnknownModel" in capsys.readouterr().out


def test_a_kind_of_generation_that_is_not_supported_fails(golden_copy: Path) -> None:
    golden = keep_cases(golden_copy, 1)
    golden["cases"][0]["kind"] = "by lot"
    (golden_copy / "expected.json").write_text(json.dumps(golden))
    report = check_model_directory(golden_copy)
    assert [item.found for item in report.differences] == ["by lot"]


@pytest.fixture(params=["definitions", pytest.param("kernels", marks=pytest.mark.kernels)])
def backends(request: pytest.FixtureRequest) -> list[Backend]:
    return definitions("cpu") if request.param == "definitions" else kernels()


@pytest.mark.timeout(600)  # a minute in the interpreter
def test_golden_decisions_are_reproduced(backends: list[Backend]) -> None:
    # The interpreter is slow; conformance.py computes and follows all there, too.
    every_trace, every_case = (20, 4) if INTERPRETED else (1, 1)
    for backend in backends:
        report = check_focus_directory(FOCUS, backend, every_trace, every_case)
        assert [item for item in report.differences if not item.fragile] == []
        assert report.worst_relative_error < 2e-5
        assert dict(report.checked) == {
            "importances": {1: 3378, 4: 658}[every_case],
            "targets": 2205,
            "selections": {1: 905, 4: 198}[every_case],
            "ends to ends": {1: 133, 4: 30}[every_case],
            "trace steps": {1: 2613, 20: 192}[every_trace],
        }


@pytest.mark.parametrize(
    ("file", "array", "index", "value", "where"),
    [
        pytest.param("importance.npz", "c00_imp_f32", 0, 0.0, "importance", id="importance"),
        pytest.param("targets.npz", "target", 5, 77, "target 5", id="target"),
        pytest.param("selection.npz", "retain", 3, None, "selection", id="selection"),
        pytest.param("selection.npz", "kv_len", 9, 1, "selection", id="KV length"),
        pytest.param("selection.npz", "progress_out", 9, 99, "selection", id="progress"),
        pytest.param("e2e_synth.npz", "imp1_f32", 7, 0.0, "end to end", id="synthetic importance"),
        pytest.param("e2e_synth.npz", "kept_pos", 7, 60, "end to end", id="synthetic kept set"),
        pytest.param("traces.npz", "blk_ids_out", 2000, 3, "trace", id="token"),
        pytest.param("traces.npz", "blk_uncached_after", 2000, None, "trace", id="final KV"),
        pytest.param("traces.npz", "rag_proc", 9000, 77, "trace", id="processing set"),
        pytest.param("traces.npz", "step_tok_sum", 103, 77, "trace", id="statistic"),
    ],
)
def test_a_wrong_decision_is_found(
    tmp_path: Path,
    file: str,
    array: str,
    index: int,
    value: float | None,
    where: str,
) -> None:
    arrays = dict(np.load(FOCUS / file))
    old = arrays[array][index]
    arrays[array][index] = not old if value is None else value
    assert arrays[array][index] != old, "the change must be one"
    np.savez(tmp_path / file, **arrays)
    (backend,) = definitions("cpu")
    report = check_focus_directory(tmp_path, backend)
    found = [item.what for item in report.differences if not item.fragile]
    assert found and all(what.startswith(where) for what in found), found


def test_one_command_checks_definitions_and_kernels(tmp_path: Path) -> None:
    """A wrong target is found by both; without a GPU the kernels are another process."""
    arrays = dict(np.load(FOCUS / "targets.npz"))
    arrays["target"][5] = 77
    np.savez(tmp_path / "targets.npz", **arrays)
    command = [sys.executable, str(TESTS / "conformance.py"), "--json", "--focus", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    reports = json.loads(done.stdout)
    assert {report["backend"].split(",")[0] for report in reports} == {"definitions", "kernels"}
    for report in reports:
        assert [item["what"] for item in report["differences"]] == ["target 5"]
        assert report["checked"] == {"targets": 2205}


def test_an_empty_directory_fails(conformance: ModuleType, tmp_path: Path) -> None:
    assert conformance.main(["--focus", str(tmp_path), "--backend", "definitions"]) == 1


def test_a_broken_golden_file_fails_in_words(
    conformance: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = (TESTS / "golden" / "focus" / "selection.npz").read_bytes()
    (tmp_path / "selection.npz").write_bytes(golden[:3000])
    np.savez(tmp_path / "targets.npz", mask_len=np.zeros(1, np.int32))
    assert conformance.main(["--focus", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "readable" in shown
    assert "avg" in shown
