"""Which steps are measured: with a clock of its own, in place of the device's."""

from __future__ import annotations

import pytest

from focus_ray.config import EngineConfig
from focus_ray.engine import measuring
from focus_ray.engine.engine import Engine
from focus_ray.engine.measuring import ENOUGH_S, NO_REPEATS_S, REPEATS, measure_costs


@pytest.fixture(scope="module")
def engine(golden_sdar):
    return Engine(
        EngineConfig(
            model=golden_sdar.path,
            device=golden_sdar.device,
            enforce_eager=True,
            block_length=16,
            num_pages=16,
            max_num_seqs=4,
            max_num_batched_tokens=128,
            saturation_tokens=1,
        )
    )


@pytest.fixture
def calls(monkeypatch):
    """What was run, each taking so many seconds."""
    made = []

    def timed_with(seconds):
        def timed(run, device):
            run()
            made.append(seconds)
            return seconds

        monkeypatch.setattr(measuring, "_seconds", timed)
        return made

    return timed_with


PARTS = 5  # head of either kind, compact, tail, look


def test_sizes_double_up_to_the_largest_step(engine, calls):
    done = calls(1e-6)
    costs = measure_costs(engine._runner)
    assert [tokens for tokens, _ in costs.tail] == [16, 32, 64, 96]
    for name, parts in (("evicting_head", 2), ("plain_head", 1), ("tail", 2)):
        assert [seconds for _, seconds in getattr(costs, name)] == pytest.approx([parts * 1e-6] * 4)
    warm = 4 if engine._runner.state.device.type == "cuda" else 1
    assert len(done) == PARTS * (4 * REPEATS + warm)


def test_it_ends_when_it_took_long_enough(engine, calls):
    device_type = engine._runner.state.device.type
    calls(ENOUGH_S[device_type] / (1.5 * PARTS * REPEATS))
    assert [tokens for tokens, _ in measure_costs(engine._runner).tail] == [16, 32]


def test_on_a_cpu_a_slow_model_is_measured_once(engine, calls):
    if engine._runner.state.device.type != "cpu":
        pytest.skip("a first run on a GPU compiles")
    done = calls(max(NO_REPEATS_S, ENOUGH_S["cpu"]))
    assert [tokens for tokens, _ in measure_costs(engine._runner).tail] == [16]
    assert len(done) == PARTS


def test_what_is_not_asked_for_is_not_run(engine, calls):
    done = calls(1e-6)
    costs = measure_costs(engine._runner, plain_too=False)
    assert costs.plain_head == costs.evicting_head
    assert done and len(done) % (PARTS - 1) == 0


def test_nobody_is_left_in_a_slot(engine, calls):
    calls(1e-6)
    measure_costs(engine._runner)
    words = engine._runner.state.words
    assert not words.scalar("active").any()
