"""Random crowds under random limits: whatever else runs, each request gives what it gives alone.

Under ``decoding="block"``: with delayed caches recomputing KV may change later tokens, and what
then still holds is in test_schedule_properties.py.
"""

import numpy as np
import pytest

from focus_ray.config import EngineConfig
from focus_ray.engine.engine import Engine
from focus_ray.engine.outputs import GenerationRequest
from focus_ray.sampling import RepetitionDetection, SamplingParams

CONTEXT = 160
NUM_REQUESTS = 12
EAGER = {"enforce_eager": True}  # otherwise steps are recorded on a GPU


class Collected:
    """Tokens and end of each completion, keyed by request id and index."""

    def __init__(self):
        self.tokens, self.ends = {}, {}

    def take(self, deltas):
        for delta in deltas:
            key = delta.request_id, delta.index
            assert key not in self.ends, "a delta after the last one"
            self.tokens.setdefault(key, []).extend(delta.token_ids)
            if delta.logprobs is not None:
                assert [entry.token_id for entry in delta.logprobs] == list(delta.token_ids)
            if delta.finish_reason is not None:
                self.ends[key] = delta.finish_reason, delta.stop_reason


def make_engine(model, block_length, **overrides):
    settings = {
        "model": model.path,
        "device": model.device,
        "dtype": "float32",
        "decoding": "block",
        "block_length": block_length,
        "max_model_len": CONTEXT,
        "max_num_batched_tokens": 256,  # few sizes to record on a GPU
        "kv_cache_memory_bytes": 64 << 20,  # not all of a GPU that other tests use too
    }
    return Engine(EngineConfig(**{**settings, **overrides}))


def random_request(rng, name, prefixes, block_length):
    """Every parameter that can change tokens, and prompts that share beginnings of any length."""
    prefix = prefixes[rng.integers(len(prefixes))]
    shared = int(rng.integers(0, len(prefix) + 1))
    own = rng.integers(2, 500, size=rng.integers(1, 20)).tolist()
    max_tokens = int(rng.integers(1, 40))
    options = {
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.05,
        "min_tokens": int(rng.integers(0, max_tokens + 1)),
        "stop_token_ids": rng.integers(2, 500, size=8).tolist(),
        "logprobs": int(rng.integers(0, 4)),
        "repetition_detection": RepetitionDetection(
            min_pattern_size=1, max_pattern_size=3, min_count=2
        ),
    }
    params = {
        "max_tokens": max_tokens,
        "n": int(rng.choice([1, 1, 1, 3])),
        "temperature": float(rng.choice([0.0, 0.0, 0.7, 2.0])),
        "seed": int(rng.integers(-(2**40), 2**40)),
        "ignore_eos": bool(rng.random() < 0.7),
        "unmasking": ("low_confidence_dynamic", "low_confidence_static", "sequential")[
            rng.integers(3)
        ],
        "confidence_threshold": float(rng.choice([0.2, 0.5, 0.9])),
        "denoising_steps": int(rng.integers(1, block_length + 1)),
    } | {name: value for name, value in options.items() if rng.random() < 0.25}
    return GenerationRequest(name, (*prefix[:shared], *own), SamplingParams(**params))


def run_crowd(rng, engine, requests):
    """Requests arrive a few at a time, some are aborted; returns what came and who was aborted."""
    collected, aborted, waiting = Collected(), set(), list(requests)
    while waiting or engine.has_unfinished():
        for _ in range(min(int(rng.integers(0, 6)), len(waiting))):
            engine.add(waiting.pop())
        collected.take(engine.step())
        if rng.random() < 0.04 and engine.running_requests:
            victim = str(rng.choice(sorted(engine.running_requests)))
            aborted.add(victim)
            collected.take(engine.abort(victim))
    return collected, aborted


@pytest.mark.parametrize(
    ("block_length", "num_pages", "preempts", "limits"),
    [
        pytest.param(4, 24, True, {"page_size": 8, "max_num_seqs": 12}, id="pages run out"),
        pytest.param(7, 23, True, {"page_size": 7, "max_num_batched_tokens": 1}, id="odd, least"),
        pytest.param(16, 3, False, {"page_size": 256}, id="page above the context"),
        pytest.param(64, 5, False, {"page_size": 64, "max_num_batched_tokens": 128}, id="long"),
        pytest.param(
            16, 12, True, {"page_size": 32, "enable_prefix_caching": False}, id="no prefix cache"
        ),
        pytest.param(16, 400, False, {"page_size": 16, "max_num_seqs": 1024, **EAGER}, id="roomy"),
    ],
)
def test_a_crowd_changes_nothing(golden_sdar, block_length, num_pages, preempts, limits):
    rng = np.random.default_rng(block_length)
    prefixes = [rng.integers(2, 500, size=90).tolist() for _ in range(3)]
    requests = [random_request(rng, str(i), prefixes, block_length) for i in range(NUM_REQUESTS)]
    solitary = make_engine(golden_sdar, block_length, enable_prefix_caching=False, **EAGER)
    alone = Collected()
    for request in requests:
        solitary.add(request)
        while solitary.has_unfinished():
            alone.take(solitary.step())

    engine = make_engine(golden_sdar, block_length, num_pages=num_pages, **limits)
    together, aborted = run_crowd(rng, engine, requests)

    assert together.ends.keys() == alone.ends.keys()
    for key, tokens in alone.tokens.items():
        if together.ends[key][0] == "abort":
            assert key[0] in aborted
            assert together.tokens[key] == tokens[: len(together.tokens[key])]
        else:
            assert (together.tokens[key], together.ends[key]) == (tokens, alone.ends[key])
    load = engine.load()
    assert (load.num_preemptions > 0) == preempts
    assert load.free_pages == load.total_pages == num_pages
    assert load.num_running == load.num_waiting == 0
    assert not engine.running_requests
