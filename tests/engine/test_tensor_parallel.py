"""One model on several processes: the tokens of one, whatever happens, and then no process."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from focus_ray.config import EngineConfig
from focus_ray.engine.engine import Engine
from focus_ray.engine.outputs import CompletionOutput, GenerationRequest
from focus_ray.errors import CheckpointError, EngineDead
from focus_ray.sampling import SamplingParams

pytestmark = pytest.mark.timeout(300)

GOLDEN = Path(__file__).parents[1] / "golden" / "models"


def make_engine(family: str, size: int, **overrides: object) -> Engine:
    settings: dict[str, object] = {
        "model": str(GOLDEN / family),
        "tensor_parallel_size": size,
        "check_ranks_every": 1 if size > 1 else 0,
        "device": "cpu",
        "dtype": "float32",
        "focus_adaptive": False,
        "block_length": 16,
        "page_size": 16,
        "num_pages": 15,  # not enough for all at once: some are preempted
        "max_model_len": 160,
        "max_num_seqs": 16,
        "confidence_threshold": 0.5,
    }
    return Engine(EngineConfig.model_validate({**settings, **overrides}))


def requests(count: int, max_tokens: int = 50) -> list[GenerationRequest]:
    """Prompts of many lengths; of four requests two draw their tokens, one of these filtered."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        prompt = tuple(rng.integers(2, 500, size=rng.integers(1, 60)).tolist())
        draws = [
            {"temperature": 0.0, "logprobs": 3},
            {"temperature": 0.9, "seed": i},
            {"temperature": 0.0},
            {"temperature": 0.8, "seed": i, "top_k": 20, "top_p": 0.9},
        ][i % 4]
        length = 5 + 11 * i % max_tokens
        params = SamplingParams(max_tokens=length, ignore_eos=True, **draws)
        made.append(GenerationRequest(str(i), prompt, params))
    return made


def run(engine: Engine, items: list[GenerationRequest], abort: str = "") -> dict[str, list[int]]:
    """Tokens of every request; ``abort`` is left out after some steps."""
    outputs = {item.request_id: CompletionOutput(index=0) for item in items}
    for item in items:
        engine.add(item)
    steps = 0
    while engine.has_unfinished():
        steps += 1
        if abort and steps == 6:
            engine.abort(abort)
        for delta in engine.step():
            outputs[delta.request_id].append(delta)
    return {name: list(out.token_ids) for name, out in outputs.items() if name != abort}


def is_alive(process_id: int) -> bool:
    try:
        status = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def rank_processes(engine: Engine) -> list[int]:
    assert engine._ranks is not None
    return [process.pid for process in engine._ranks._processes.values()]


@pytest.mark.parametrize(
    ("family", "size", "decoding"),
    [
        pytest.param("sdar", 2, "focus", id="sdar, eviction"),
        pytest.param("sdar_moe", 2, "delayed", id="sdar-moe, delayed cache"),
        pytest.param("llada2", 2, "focus", id="llada2, eviction"),
        pytest.param("llada2", 4, "block", id="llada2, KV heads replicated"),
    ],
)
def test_tokens_are_those_of_one_rank(family: str, size: int, decoding: str) -> None:
    """Sampling, preemption, an abort, and a second crowd that finds prefixes of the first."""
    alone = make_engine(family, 1, decoding=decoding)
    together = make_engine(family, size, decoding=decoding)
    processes = rank_processes(together)
    try:
        for crowd in (3, 12):
            items = requests(crowd)
            assert run(together, items, abort="3") == run(alone, items, abort="3")
        assert together.load().num_preemptions == alone.load().num_preemptions > 0
        assert together.load().cached_prefix_tokens == alone.load().cached_prefix_tokens > 0
        assert len(processes) == size - 1
    finally:
        together.close()
    assert not any(map(is_alive, processes))


@pytest.fixture(scope="module")
def doomed():
    """An engine of two ranks for the tests below; each ends one."""
    return lambda **overrides: make_engine("sdar", 2, check_ranks_every=0, **overrides)


@pytest.mark.parametrize(
    ("number", "seconds", "reason"),
    [
        pytest.param(
            signal.SIGKILL, 5.0, "rank 1 died: its process was killed by signal 9", id="killed"
        ),
        pytest.param(
            signal.SIGSTOP,
            8.0,
            "a step did not end within 2 s: rank 1 did not answer",
            id="hangs in a collective call",
        ),
    ],
)
def test_a_rank_that_is_gone_ends_the_engine_at_once(doomed, number, seconds, reason) -> None:
    engine = doomed(rank_timeout_s=2.0)
    (process,) = rank_processes(engine)
    struck = []

    def strike() -> None:
        time.sleep(0.3)
        os.kill(process, number)
        struck.append(time.monotonic())

    threading.Thread(target=strike).start()
    with pytest.raises(EngineDead, match=f"^tensor parallel: {reason}$"):
        while True:
            run(engine, requests(8))
    assert time.monotonic() - struck[0] < seconds
    with pytest.raises(EngineDead, match="rank 1"):
        engine.check()
    engine.close()
    assert not is_alive(process)


def test_an_engine_that_nobody_closes_leaves_no_process(doomed) -> None:
    engine = doomed()
    (process,) = rank_processes(engine)
    assert is_alive(process)
    del engine
    end = time.monotonic() + 10
    while is_alive(process):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_cannot_be_divided_is_refused_before_any_process_starts() -> None:
    with pytest.raises((CheckpointError, ValueError), match=r"tensor_parallel_size.*1, 2, 4"):
        make_engine("sdar", 3)
