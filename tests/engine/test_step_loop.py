"""The same tokens however the step loop runs: recorded or not, overlapped or not, adaptive or not.

Whether a step evicts may change tokens, so eviction that adapts is compared with what it adapts to.
"""

import numpy as np
import pytest

from focus_ray.config import EngineConfig
from focus_ray.engine.adaptive import EvictionChooser
from focus_ray.engine.costs import StepCosts
from focus_ray.engine.engine import Engine
from focus_ray.engine.outputs import GenerationRequest
from focus_ray.sampling import SamplingParams

EVERY_DECODING = [
    pytest.param({"decoding": "block"}, id="whole blocks"),
    pytest.param(
        {"decoding": "block", "unmasking": "joint_threshold", "editing_threshold": 0.97},
        id="whole blocks, edited",
    ),
    pytest.param({"decoding": "delayed"}, id="delayed cache"),
    pytest.param({"decoding": "focus"}, id="eviction"),
    pytest.param({"decoding": "focus", "eviction_policy": "leftmost"}, id="leftmost"),
]


def make_engine(model, settings):
    given = {
        "model": model.path,
        "device": model.device,
        "block_length": 16,
        "num_pages": 200,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,  # few sizes to record on a GPU
        "confidence_threshold": 0.3,
        "focus_adaptive": False,
    }
    return Engine(EngineConfig(**{**given, **settings}))


def requests():
    """More than fit at once, of many lengths; some draw their tokens, some end early.

    Those that draw bring a rule of their own, one under which that makes sense.
    """
    rng = np.random.default_rng(0)
    made = []
    for i in range(20):
        prompt = tuple(rng.integers(2, 500, size=rng.integers(1, 70)).tolist())
        is_drawn = i % 4 == 3
        params = SamplingParams(
            max_tokens=3 + 7 * i % 50,
            ignore_eos=i % 3 > 0,
            temperature=0.8 if is_drawn else 0.0,
            unmasking="low_confidence_dynamic" if is_drawn else None,
            seed=i,
        )
        made.append(GenerationRequest(str(i), prompt, params))
    return made


def generate(engine, step):
    tokens: dict[str, tuple[int, ...]] = {}
    for request in requests():
        engine.add(request)
    while engine.has_unfinished():
        for delta in step(engine):
            tokens[delta.request_id] = tokens.get(delta.request_id, ()) + delta.token_ids
    return tokens


def overlapped(engine):
    return engine.step()


def one_after_the_other(engine):
    """Take up a step's results before the next one is launched."""
    deltas = engine.step()
    if engine._scheduler.num_in_flight:
        deltas += engine._collect()
    return deltas


@pytest.mark.parametrize("settings", EVERY_DECODING)
def test_results_read_one_step_late_change_no_token(golden_sdar, settings):
    late = generate(make_engine(golden_sdar, settings), overlapped)
    at_once = generate(make_engine(golden_sdar, settings), one_after_the_other)
    assert len(late) == 20
    assert late == at_once


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", EVERY_DECODING)
def test_graphs_change_no_token(golden_sdar, settings, dtype):
    if golden_sdar.device != "cuda":
        pytest.skip("needs CUDA: graphs are recorded there")
    recorded = make_engine(golden_sdar, {**settings, "dtype": dtype})
    assert len(recorded._runner.parts.graphs) > 0
    launched = make_engine(golden_sdar, {**settings, "dtype": dtype, "enforce_eager": True})
    assert len(launched._runner.parts.graphs) == 0
    assert generate(recorded, overlapped) == generate(launched, overlapped)


@pytest.mark.parametrize(
    ("head_s", "evicts"),
    [
        pytest.param(1.0, False, id="never pays"),
        pytest.param(1e-6, True, id="always pays"),
    ],
)
def test_adaptive_eviction_decodes_like_what_it_chose(golden_sdar, head_s, evicts):
    engine = make_engine(golden_sdar, {"decoding": "focus"})
    costs = StepCosts([(1, head_s)], [(1, 1e-6)], [(1, 1e-5), (1000, 1e-2)])
    engine._runner.chooser = EvictionChooser(costs)
    found = generate(engine, overlapped)
    fixed = {"decoding": "focus" if evicts else "delayed"}
    assert found == generate(make_engine(golden_sdar, fixed), overlapped)
    assert (engine.load().evicted_tokens > 0) == evicts
