from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

TESTS = Path(__file__).parent
SDAR = TESTS / "golden" / "models" / "sdar"


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


@pytest.mark.parametrize("family", ["sdar"])
def test_golden_checkpoint_is_reproduced(conformance: ModuleType, family: str) -> None:
    report = conformance.check_directory(TESTS / "golden" / "models" / family)
    assert [item for item in report.differences if not item.fragile] == []
    assert report.checked["generations"] == 38
    assert report.worst_relative_error < 1e-4


def test_a_wrong_logit_is_found(conformance: ModuleType, golden_copy: Path) -> None:
    keep_cases(golden_copy, 0)
    arrays = dict(np.load(golden_copy / "expected.npz"))
    arrays["prefill_logits_b16"][3, 5] += 0.1
    arrays["prefill_hidden_states_b4"][2, 0, 0] += 0.1
    np.savez(golden_copy / "expected.npz", **arrays)
    report = conformance.check_directory(golden_copy)
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
    report = conformance.check_directory(golden_copy)
    assert [item.what for item in report.differences] == [
        f"{case['name']} step 2",
        f"{case['name']} canvas",
    ]
    assert conformance.main(["--models", str(golden_copy)]) == status


def test_an_unsupported_architecture_fails(
    conformance: ModuleType, golden_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((golden_copy / "config.json").read_text())
    config["architectures"] = ["UnknownModel"]
    (golden_copy / "config.json").write_text(json.dumps(config))
    assert conformance.main(["--models", str(golden_copy)]) == 1
    assert "UnknownModel" in capsys.readouterr().out


def test_a_kind_of_generation_that_is_not_supported_fails(
    conformance: ModuleType, golden_copy: Path
) -> None:
    golden = keep_cases(golden_copy, 1)
    golden["cases"][0]["kind"] = "joint_edit"
    (golden_copy / "expected.json").write_text(json.dumps(golden))
    report = conformance.check_directory(golden_copy)
    assert [item.found for item in report.differences] == ["joint_edit"]


def test_golden_decisions_are_reproduced(conformance: ModuleType) -> None:
    report = conformance.check_focus_directory(TESTS / "golden" / "focus")
    assert [item for item in report.differences if not item.fragile] == []
    assert dict(report.checked) == {
        "importances": 3378,
        "targets": 2205,
        "selections": 905,
        "ends to ends": 133,
        "trace steps": 2613,
    }


@pytest.mark.parametrize(
    ("file", "array", "index", "value", "where"),
    [
        pytest.param("importance.npz", "c00_imp_f32", 0, 0.0, "importance", id="importance"),
        pytest.param("targets.npz", "target", 5, 77, "target 5", id="target"),
        pytest.param("selection.npz", "retain", 3, None, "selection", id="selection"),
        pytest.param("traces.npz", "blk_ids_out", 2000, 3, "trace", id="token"),
    ],
)
def test_a_wrong_decision_is_found(
    conformance: ModuleType,
    tmp_path: Path,
    file: str,
    array: str,
    index: int,
    value: float | None,
    where: str,
) -> None:
    arrays = dict(np.load(TESTS / "golden" / "focus" / file))
    old = arrays[array][index]
    arrays[array][index] = not old if value is None else value
    assert arrays[array][index] != old, "the change must be one"
    np.savez(tmp_path / file, **arrays)
    report = conformance.check_focus_directory(tmp_path)
    assert [item.what.startswith(where) for item in report.differences if not item.fragile]
    assert conformance.main(["--focus", str(tmp_path)]) == 1


def test_an_empty_directory_fails(conformance: ModuleType, tmp_path: Path) -> None:
    assert conformance.main(["--focus", str(tmp_path)]) == 1
