"""What the engine promises holds for every family: the tests of SDAR, dense, in short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from focus_ray.config import EngineConfig
from focus_ray.engine.engine import Engine
from focus_ray.engine.outputs import CompletionOutput, GenerationRequest
from focus_ray.sampling import SamplingParams

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
DECODINGS = ("block", "delayed", "focus")


@pytest.fixture(scope="module", params=["sdar_moe", "llada2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(GOLDEN / request.param)


def make_engine(family: str, decoding: str, **overrides: object) -> Engine:
    settings: dict[str, object] = {
        "model": family,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "dtype": "float32",
        "decoding": decoding,
        "focus_adaptive": False,  # evict in every step, on a GPU too
        "enforce_eager": True,
        "block_length": 16,
        "num_pages": 120,
        "max_num_seqs": 16,
        "confidence_threshold": 0.5,
    }
    return Engine(EngineConfig.model_validate({**settings, **overrides}))


def requests(count: int) -> list[GenerationRequest]:
    """Prompts of many lengths; every other request draws its tokens."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        prompt = tuple(rng.integers(2, 500, size=rng.integers(1, 60)).tolist())
        draws = {"temperature": 0.8, "top_k": 50, "seed": i} if i % 2 else {"temperature": 0.0}
        params = SamplingParams(max_tokens=5 + 11 * i % 50, ignore_eos=True, **draws)
        made.append(GenerationRequest(str(i), prompt, params))
    return made


def run(engine: Engine, items: list[GenerationRequest]) -> dict[str, CompletionOutput]:
    outputs = {item.request_id: CompletionOutput(index=0) for item in items}
    for item in items:
        engine.add(item)
    while engine.has_unfinished():
        for delta in engine.step():
            outputs[delta.request_id].append(delta)
    return outputs


def tokens(outputs: dict[str, CompletionOutput]) -> dict[str, list[int]]:
    return {name: list(output.token_ids) for name, output in outputs.items()}


@pytest.mark.parametrize("decoding", DECODINGS)
def test_company_changes_no_token(family: str, decoding: str) -> None:
    engine = make_engine(family, decoding, enable_prefix_caching=False)
    alone = {item.request_id: tokens(run(engine, [item]))[item.request_id] for item in requests(8)}
    assert tokens(run(make_engine(family, decoding), requests(8))) == alone


def test_preemption_changes_no_token(family: str) -> None:
    roomy = tokens(run(make_engine(family, "block"), requests(12)))
    engine = make_engine(family, "block", num_pages=8, page_size=16, max_model_len=128)
    assert tokens(run(engine, requests(12))) == roomy
    assert engine.load().num_preemptions > 0


def test_a_cached_prefix_changes_no_token(family: str) -> None:
    engine = make_engine(family, "block")
    first = run(engine, requests(12))
    again = run(engine, requests(12))
    assert tokens(again) == tokens(first)
    assert sum(output.stats.cached_prefix_tokens for output in again.values() if output.stats) > 0


def test_an_alpha_that_evicts_nothing_is_the_delayed_cache(family: str) -> None:
    delayed = tokens(run(make_engine(family, "delayed"), requests(8)))
    focus = tokens(run(make_engine(family, "focus", focus_alpha=1000.0), requests(8)))
    assert focus == delayed


def test_eviction_leaves_tokens_out_and_traces_say_so(family: str) -> None:
    def work(decoding: str) -> tuple[float, int]:
        engine = make_engine(family, decoding, confidence_threshold=0.9, record_trace=True)
        outputs = run(engine, requests(8))
        retained = decoded = evicted = 0
        for output in outputs.values():
            assert output.stats is not None and output.trace is not None
            assert len(output.trace) == output.stats.denoising_steps
            assert sum(len(step.positions) for step in output.trace) == output.stats.decoded_tokens
            retained += output.stats.retained_tokens
            decoded += output.stats.decoded_tokens
            evicted += output.stats.evicted_tokens
        return retained / decoded, evicted

    whole, none_evicted = work("block")
    less, evicted = work("focus")
    assert none_evicted == 0 < evicted
    assert less < 0.9 * whole
