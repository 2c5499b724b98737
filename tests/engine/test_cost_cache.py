"""Costs are measured once, and whatever is wrong with the file only costs another measurement."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from focus_ray.config import EngineConfig
from focus_ray.engine import build_runner, cost_cache
from focus_ray.engine.cost_cache import cache_dir, keep_costs, load_costs
from focus_ray.engine.costs import StepCosts
from focus_ray.engine.engine import Engine
from focus_ray.engine.measuring import measure_costs

KEY = {"model": "a", "max_blocks": 8}
COSTS = StepCosts([(4, 0.25), (8, 0.5)], [(4, 0.125)], [(4, 1.0), (8, 1.5)])
OTHER = StepCosts([(1, 1.0)], [(1, 1.0)], [(1, 1.0)])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOCUS_RAY_CACHE_DIR", str(tmp_path))
    return tmp_path


def only_file(folder: Path) -> Path:
    (path,) = (folder / "step-costs").iterdir()
    return path


def test_what_was_kept_is_found_under_its_key_alone() -> None:
    assert load_costs(KEY) is None
    assert keep_costs(KEY, COSTS) is COSTS
    assert load_costs(KEY) == COSTS
    for other in ({**KEY, "model": "b"}, {**KEY, "max_blocks": 9}, {**KEY, "more": True}):
        assert load_costs(other) is None


def test_the_first_to_write_decides_for_all(folder: Path) -> None:
    keep_costs(KEY, COSTS)
    assert keep_costs(KEY, OTHER) == COSTS
    assert load_costs(KEY) == COSTS
    assert len(list((folder / "step-costs").iterdir())) == 1, "a temporary file is left"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("[]", id="a list"),
        pytest.param('{"key": {"model": "a", "max_blocks": 8}}', id="no costs"),
        pytest.param(
            json.dumps({"key": KEY, "costs": {"tail": [[1, 1.0]]}}), id="curves are missing"
        ),
        pytest.param(
            json.dumps({"key": KEY, "costs": {**vars(COSTS), "tail": [[1, float("nan")]]}}),
            id="a curve that cannot be",
        ),
        pytest.param(json.dumps({"key": {}, "costs": vars(COSTS)}), id="of another key"),
    ],
)
def test_a_broken_file_is_as_none_and_replaced(folder: Path, text: str) -> None:
    keep_costs(KEY, COSTS)
    only_file(folder).write_text(text)
    assert load_costs(KEY) is None
    assert keep_costs(KEY, OTHER) is OTHER
    assert load_costs(KEY) == OTHER


def test_a_folder_that_cannot_be_written_is_done_without(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "step-costs").write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO):
        assert keep_costs(KEY, COSTS) is COSTS
        assert load_costs(KEY) is None
    assert "not kept" in caplog.text


def test_a_user_without_a_home_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FOCUS_RAY_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert load_costs(KEY) is None
    assert keep_costs(KEY, COSTS) is COSTS


def test_a_file_system_without_links_keeps_them_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*paths: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(cost_cache.os, "link", no_links)
    assert keep_costs(KEY, COSTS) is COSTS
    assert keep_costs(KEY, OTHER) == COSTS
    assert len(list((folder / "step-costs").iterdir())) == 1


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == tmp_path
    monkeypatch.delenv("FOCUS_RAY_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "focus-ray"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "focus-ray"


class Start:
    """Starts engines, and counts what was measured for them."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.measured: list[StepCosts] = []

    def __call__(self, **overrides: object) -> Engine:
        settings = {"device": "cpu", "block_length": 16, "num_pages": 16, "max_num_seqs": 2}
        limits = {"max_num_batched_tokens": 48}
        config = EngineConfig.model_validate(
            {"model": self.model, **settings, **limits, **overrides}
        )
        return Engine(config)

    def measure(self, *args: object, **options: object) -> StepCosts:
        self.measured.append(measure_costs(*args, **options))  # type: ignore[arg-type]
        return self.measured[-1]


@pytest.fixture
def start(golden_sdar, monkeypatch: pytest.MonkeyPatch) -> Start:
    if golden_sdar.device != "cpu":
        pytest.skip("counts what is measured on a CPU")
    made = Start(golden_sdar.path)
    monkeypatch.setattr(build_runner, "measure_costs", made.measure)
    return made


def test_an_engine_measures_once(start: Start) -> None:
    first = start().load().saturation_tokens
    assert first >= 1
    assert start().load().saturation_tokens == first
    assert len(start.measured) == 1
    start(max_num_batched_tokens=128)
    start(dtype="bfloat16")
    start(decoding="block")
    assert len(start.measured) == 4


def test_steps_that_never_run_are_not_measured(start: Start) -> None:
    start()
    start(decoding="block")
    start(focus_adaptive=True)
    always, whole, adaptive = start.measured
    assert always.evicting_head == always.plain_head
    assert whole.evicting_head == whole.plain_head
    assert adaptive.evicting_head != adaptive.plain_head


def test_a_budget_that_is_given_is_not_measured(start: Start) -> None:
    assert start(saturation_tokens=123).load().saturation_tokens == 123
    assert start.measured == []
    adaptive = start(saturation_tokens=123, focus_adaptive=True)
    assert adaptive.load().saturation_tokens == 123
    assert len(start.measured) == 1, "whether to evict is decided by costs"


def test_an_engine_starts_whatever_becomes_of_the_cache(start: Start, folder: Path) -> None:
    start()
    only_file(folder).write_text("{")
    start()
    assert len(start.measured) == 2
    only_file(folder).unlink()
    (folder / "step-costs").rmdir()
    (folder / "step-costs").touch()
    start()
    assert len(start.measured) == 3
