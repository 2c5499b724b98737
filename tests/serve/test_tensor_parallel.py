"""A replica of two ranks in a real Ray: same tokens, and nothing is left of a broken one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from focus_ray import LLM, SamplingParams
from focus_ray.config import EngineConfig
from focus_ray.serve.args import ServeArgs
from focus_ray.serve.local import LocalServer

pytestmark = pytest.mark.timeout(300)

SDAR = Path(__file__).parents[1] / "golden" / "models" / "sdar"
PROMPT = [5, 6, 7, 8, 9, 10, 11]
SETTINGS = {"model": str(SDAR), "device": "cpu", "dtype": "float32", "num_pages": 60}


@pytest.fixture(scope="module")
def server(ray_here):
    config = EngineConfig(tensor_parallel_size=2, max_num_seqs=8, **SETTINGS)
    args = ServeArgs(
        served_model_name=("golden",),
        engine=config,
        num_cpus=0.5,
        max_handovers=0,
        batch_storage=None,
    )
    with ray_here.server(args) as local:
        yield local


def complete(server: LocalServer, **options: object) -> httpx.Response:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40, "ignore_eos": True, **options}
    body["return_token_ids"] = True
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def rank_actors() -> list[int]:
    """Process ids of the actors that run further ranks."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "ray::RankActor" in command:
            found.append(int(entry.parent.name))
    return found


def groups_in_use() -> int:
    from ray.util import placement_group_table

    return sum(group["state"] == "CREATED" for group in placement_group_table().values())


def wait_until(condition, timeout_s: float) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, "waited in vain"
        time.sleep(0.05)
    return time.monotonic() - began


def healthy(server: LocalServer) -> bool:
    return httpx.get(f"{server.url}/health", timeout=30).status_code == 200


def test_tokens_are_those_of_one_process(server: LocalServer) -> None:
    with LLM(**SETTINGS) as llm:
        params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        [expected] = llm.generate([PROMPT], params, use_tqdm=False)
    choice = complete(server).json()["choices"][0]
    assert choice["token_ids"] == list(expected.outputs[0].token_ids)
    assert len(rank_actors()) == 1
    assert groups_in_use() == 1


def test_a_rank_that_is_killed_under_load_costs_one_replica(server: LocalServer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    [rank] = rank_actors()
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(complete, server, max_tokens=800) for _ in range(8)]
        time.sleep(0.5)
        os.kill(rank, signal.SIGKILL)
        assert wait_until(lambda: not healthy(server), 5.0) < 5.0
        for answer in answers:
            response = answer.result()
            if response.status_code != 200:  # those that were quicker
                assert response.status_code == 503
                assert response.json()["error"]["code"] == "engine_dead"
    wait_until(lambda: healthy(server), 90)
    assert complete(server).status_code == 200
    wait_until(lambda: len(rank_actors()) == 1 and groups_in_use() == 1, 20)
    assert rank not in rank_actors()
