"""Two replicas of the real engine in a real Ray; one of them goes while both answer.

``FOCUS_RAY_TEST_REPEATS=20`` repeats every way to go; without it only the rudest is tried.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from focus_ray.config import EngineConfig
from focus_ray.serve.args import ServeArgs
from focus_ray.serve.local import LocalServer

pytestmark = pytest.mark.timeout(300)

REPLICA = "ray::ServeReplica:focus-ray:engine"
NUM_STREAMS, NUM_TOKENS = 6, 64
REPEATS = int(os.environ.get("FOCUS_RAY_TEST_REPEATS", "1"))


def application(seed: int = 0) -> ServeArgs:
    """Engines drain for so short that no request ends in time. Another seed is an update."""
    return ServeArgs(
        served_model_name=("tiny",),
        engine=EngineConfig(
            decoding="block", device="cpu", max_num_seqs=16, num_pages=400, seed=seed
        ),
        num_replicas=2,
        num_cpus=0.5,
        drain_timeout_s=0.5,
        num_ingress_replicas=1,  # which counts all
        batch_storage=None,
    )


@pytest.fixture(scope="module")
def server(ray_here):
    with ray_here.server(application()) as local:
        yield local


@dataclass
class Said:
    """What a client was told."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    completion_tokens: int = 0
    num_events: int = 0


def body(number: int) -> dict[str, Any]:
    """A long answer, greedy or drawn with a seed."""
    return {
        "prompt": f"Tell me all about the number {number}:",
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "return_token_ids": True,
        **({"temperature": 0.7, "seed": number} if number % 2 else {"temperature": 0.0}),
    }


def whole(server: LocalServer, number: int) -> Said:
    response = httpx.post(f"{server.url}/v1/completions", json=body(number), timeout=120)
    assert response.status_code == 200, response.text
    (choice,), usage = response.json()["choices"], response.json()["usage"]
    tokens = usage["completion_tokens"]
    return Said(choice["text"], choice["token_ids"], choice["finish_reason"], tokens)


def streamed(server: LocalServer, number: int, begun: threading.Semaphore) -> Said:
    said = Said()
    asked = body(number) | {"stream": True, "stream_options": {"include_usage": True}}
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=asked, timeout=120) as response:
        assert response.status_code == 200
        for line in filter(None, response.iter_lines()):
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return said
            event = json.loads(data)
            assert "error" not in event, event
            for choice in event["choices"]:
                said.text += choice["text"]
                said.token_ids += choice["token_ids"]
                said.finish_reason = choice["finish_reason"]
            if event["usage"]:
                said.completion_tokens = event["usage"]["completion_tokens"]
            said.num_events += 1
            if said.num_events == 2:
                begun.release()
    raise AssertionError(f"the stream ended without [DONE] after {said}")


def replicas() -> list[int]:
    """Process ids of the engines below this process."""
    parents, found = {}, []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            parents[int(entry.name)] = int(
                (entry / "stat").read_text().rpartition(")")[2].split()[1]
            )
        except OSError:
            continue
        if REPLICA in command:
            found.append(int(entry.name))
    return [pid for pid in found if is_below(pid, parents)]


def is_below(pid: int, parents: dict[int, int]) -> bool:
    while pid := parents.get(pid, 0):
        if pid == os.getpid():
            return True
    return False


def taken_over(server: LocalServer) -> dict[str, int]:
    """Requests that each replica continued."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    found = re.findall(r'^focus_ray:requests_taken_over_total{.*replica="(.*?)"} (.*)$', text, re.M)
    return {name: int(float(count)) for name, count in found}


def test_the_cluster_is_seen(server: LocalServer) -> None:
    (model,) = httpx.get(f"{server.url}/cluster", timeout=30).json()["models"]
    assert (model["model"], model["states"]) == ("tiny", {"RUNNING": 2})
    assert len({replica["replica"] for replica in model["replicas"]}) == 2


@pytest.fixture(scope="module")
def undisturbed(server: LocalServer) -> list[Said]:
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        return list(pool.map(lambda number: whole(server, number), range(NUM_STREAMS)))


def kill_one(number: int) -> None:
    os.kill(replicas()[number % 2], signal.SIGKILL)


def update(number: int) -> None:
    """Returns when the application is another one, of two new replicas."""
    from ray import serve

    from focus_ray.serve.app import APP_NAME, build

    serve.run(build(application(number + 1)), name=APP_NAME, external_scaler_enabled=True)


def take_one_away(number: int) -> None:
    scale(1)


def scale(num_replicas: int) -> None:
    """As Serve's REST interface does for whoever scales from outside; after ``update``."""
    from ray import get
    from ray.serve._private.common import DeploymentID
    from ray.serve.context import _get_global_client

    from focus_ray.serve.app import APP_NAME

    controller = _get_global_client()._controller
    deployment = DeploymentID(name="engine", app_name=APP_NAME)
    get(controller.update_deployment_replicas.remote(deployment, num_replicas))


@pytest.mark.timeout(120 + 90 * REPEATS)
@pytest.mark.parametrize(
    "disturb",
    # What an update and a scale-down cost is seen in test_application_over_ray.py, too.
    [kill_one] if REPEATS == 1 else [kill_one, update, take_one_away],
    ids=lambda x: x.__name__,
)
def test_a_replica_that_goes_under_load_is_no_more_than_a_pause(
    server: LocalServer, undisturbed: list[Said], disturb: Callable[[int], None]
) -> None:
    """Greedy and seeded texts, streamed and whole, are those of an undisturbed run."""
    total = 0
    for number in range(REPEATS):
        before = taken_over(server)
        check_texts(server, undisturbed, partial(disturb, number))
        moved = {name: count - before.get(name, 0) for name, count in taken_over(server).items()}
        total += sum(moved.values())
        print(f"{disturb.__name__} {number + 1} of {REPEATS}: {total} taken over until now")
        if disturb is take_one_away:
            scale(2)
        wait_for_two(server)
    assert total > 0, "nobody was on a replica that went"


def wait_for_two(server: LocalServer) -> None:
    """Both answer, so both will get requests."""
    end = time.monotonic() + 120
    while len(replicas()) != 2 or len(taken_over(server)) != 2:
        assert time.monotonic() < end, "the replica that went is not replaced"
        time.sleep(0.2)


def check_texts(server: LocalServer, undisturbed: list[Said], disturb: Callable[[], None]) -> None:
    begun = threading.Semaphore(0)
    numbers = range(NUM_STREAMS)
    with ThreadPoolExecutor(2 * NUM_STREAMS) as pool:
        streams = [pool.submit(streamed, server, number, begun) for number in numbers]
        wholes = [pool.submit(whole, server, number) for number in range(2)]
        for _ in numbers:
            assert begun.acquire(timeout=60)
        disturb()
        for said, expected in zip((x.result() for x in streams), undisturbed, strict=True):
            assert said.text == expected.text
            assert said.token_ids == expected.token_ids
            assert said.finish_reason == expected.finish_reason == "length"
            assert said.completion_tokens == expected.completion_tokens == NUM_TOKENS
        assert [each.result() for each in wholes] == undisturbed[:2]
