"""Two replicas of the real engine in a real Ray; one is killed while both answer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from focus_ray.config import EngineConfig
from focus_ray.serve.args import ServeArgs
from focus_ray.serve.local import LocalServer

pytestmark = pytest.mark.timeout(300)

REPLICA = "ray::ServeReplica:focus-ray:engine"
NUM_STREAMS, NUM_TOKENS = 8, 96


@pytest.fixture(scope="module")
def server(free_port):
    """Ray's sockets need a short path, so not pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="fr-", dir="/tmp"))
    config = EngineConfig(decoding="block", device="cpu", max_num_seqs=16, num_pages=400)
    args = ServeArgs(served_model_name=("tiny",), engine=config, num_replicas=2, num_cpus=0.5)
    with LocalServer(args, "127.0.0.1", free_port, temp_dir=folder) as local:
        yield local
    shutil.rmtree(folder, ignore_errors=True)


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


def num_taken_over(server: LocalServer) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    name = "focus_ray:requests_taken_over_total{"
    return sum(float(x.rpartition(" ")[2]) for x in text.splitlines() if x.startswith(name))


def test_the_cluster_is_seen(server: LocalServer) -> None:
    (model,) = httpx.get(f"{server.url}/cluster", timeout=30).json()["models"]
    assert (model["model"], model["states"]) == ("tiny", {"RUNNING": 2})
    assert len({replica["replica"] for replica in model["replicas"]}) == 2


def test_killing_a_replica_under_load_is_no_more_than_a_pause(server: LocalServer) -> None:
    """Greedy and seeded texts, streamed and whole, are those of an undisturbed run."""
    begun = threading.Semaphore(0)
    numbers = range(NUM_STREAMS)
    with ThreadPoolExecutor(2 * NUM_STREAMS) as pool:
        undisturbed = list(pool.map(lambda number: whole(server, number), numbers))
        streams = [pool.submit(streamed, server, number, begun) for number in numbers]
        wholes = [pool.submit(whole, server, number) for number in range(2)]
        for _ in numbers:
            assert begun.acquire(timeout=60)
        first, _ = replicas()
        os.kill(first, signal.SIGKILL)
        killed_at = time.monotonic()
        for number, stream in enumerate(streams):
            said, expected = stream.result(), undisturbed[number]
            assert said.text == expected.text
            assert said.token_ids == expected.token_ids
            assert said.finish_reason == expected.finish_reason == "length"
            assert said.completion_tokens == expected.completion_tokens == NUM_TOKENS
        assert [each.result() for each in wholes] == undisturbed[:2]
    assert num_taken_over(server) > 0, "nobody was on the replica that was killed"
    assert time.monotonic() - killed_at < 60
