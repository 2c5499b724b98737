"""Ctrl-C is handled between steps, once; an impatient second one at once."""

import os
import signal
import threading

import numpy as np
import pytest

from focus_ray.engine.engine import Engine
from focus_ray.engine.interrupts import between_steps
from focus_ray.llm import LLM
from focus_ray.sampling import SamplingParams


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_it_waits_until_it_is_taken():
    done = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), between_steps() as take:
        press()
        done.append("the step")
        take()
        done.append("the next step")
    assert done == ["the step"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_one_is_handled_at_once():
    done = []
    with pytest.raises(KeyboardInterrupt), between_steps():
        press()
        done.append("waits")
        press()
        done.append("never")
    assert done == ["waits"]


def test_without_one_nothing_happens():
    with between_steps() as take:
        take()


def test_a_thread_of_ones_own_is_left_alone():
    handlers = []

    def run():
        with between_steps() as take:
            handlers.append(signal.getsignal(signal.SIGINT))
            take()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


def test_an_interrupted_llm_goes_on_as_if_nothing_had_been(golden_sdar, monkeypatch):
    """The engine must not lose count of its steps, wherever in one the key is pressed."""
    engines = []

    def make(config):
        engines.append(Engine(config))
        return engines[0]

    llm = LLM(
        golden_sdar.path,
        engine_factory=make,
        device=golden_sdar.device,
        block_length=16,
        num_pages=100,
        max_num_seqs=4,
        enforce_eager=True,
        focus_adaptive=False,
    )
    (engine,) = engines
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 500, size=20).tolist() for _ in range(6)]
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    expected = [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]

    runner = engine._runner
    for name in ("launch", "collect"):
        plain, calls = getattr(runner, name), []

        def once(*args, plain=plain, calls=calls):
            calls.append(args)
            if len(calls) == 4:
                press()
            return plain(*args)

        monkeypatch.setattr(runner, name, once)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, params, use_tqdm=False)
        assert not engine.running_requests
        found = [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]
        assert found == expected
