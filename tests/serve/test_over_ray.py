"""The routes over a scripted engine in another process, through a real Ray Serve."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest

from focus_ray.cluster.local_ray import StartFailed
from focus_ray.config import EngineConfig
from focus_ray.serve.args import ServeArgs
from focus_ray.serve.local import reason_of, refuse_taken_port

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def local(fake_engine_factory, ray_here, tmp_path_factory):
    args = ServeArgs(
        served_model_name=("fake",),
        engine=EngineConfig(max_num_seqs=4, max_num_waiting=12),
        batch_storage=str(tmp_path_factory.mktemp("batches")),
        max_handovers=0,  # errors are to be seen as they are; test_handover_over_ray.py has others
    )
    with ray_here.server(args, fake_engine_factory) as server:
        yield server


def complete(local, prompt, **options):
    body = {"prompt": prompt, **options}
    return httpx.post(f"{local.url}/v1/completions", json=body, timeout=30)


def gauge(local, name):
    text = httpx.get(f"{local.url}/metrics", timeout=30).text
    line = next(x for x in text.splitlines() if x.startswith(f"focus_ray:{name}{{"))
    return float(line.rpartition(" ")[2])


def wait_until(condition, timeout_s):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def upload(client, *texts, max_tokens=60):
    """A batch of completions, ``n0`` and so on."""
    lines = [
        {
            "custom_id": f"n{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "fake", "prompt": text, "max_tokens": max_tokens},
        }
        for number, text in enumerate(texts)
    ]
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )


def test_a_batch_is_run_and_another_is_cancelled(local):
    with openai.OpenAI(base_url=f"{local.url}/v1", api_key="unused") as client:
        batch = upload(client, "hello", "bye", "too " * 2000)
        other = upload(client, *["forever"] * 400)
        wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", 60)
        client.batches.cancel(other.id)
        batch = client.batches.retrieve(batch.id)
        text = client.files.content(batch.output_file_id).text
        answers = {each["custom_id"]: each for each in map(json.loads, text.splitlines())}
        assert answers["n0"]["response"]["body"]["choices"][0]["text"] == "hello"
        assert sorted(answers) == ["n0", "n1"]
        error = json.loads(client.files.content(batch.error_file_id).text)
        assert (error["custom_id"], error["response"]["status_code"]) == ("n2", 400)
        wait_until(lambda: client.batches.retrieve(other.id).status == "cancelled", 30)
    wait_until(lambda: gauge(local, "num_requests_running") == 0, 10)


def test_a_kill_of_what_runs_batches_costs_no_line_and_repeats_none(local):
    def counts():
        return client.batches.retrieve(batch.id).request_counts

    with openai.OpenAI(base_url=f"{local.url}/v1", api_key="unused") as client:
        batch = upload(
            client, *[f"number {number} forever " for number in range(24)], max_tokens=240
        )
        wait_until(lambda: counts().completed >= 4, 30)
        [runner] = processes_named("ray::ServeReplica:focus-ray:batches")
        os.kill(runner, signal.SIGKILL)
        done = counts().completed
        assert done < 24
        wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", 60)
        assert processes_named("ray::ServeReplica:focus-ray:batches") != [runner]
        text = client.files.content(client.batches.retrieve(batch.id).output_file_id).text
        answers = [json.loads(line) for line in text.splitlines()]
        assert sorted(each["custom_id"] for each in answers) == sorted(f"n{n}" for n in range(24))
        for each in answers:
            prompt = f"number {each['custom_id'][1:]} forever "
            [choice] = each["response"]["body"]["choices"]
            assert choice["text"] == (prompt * 100)[:240]
        metrics = httpx.get(f"{local.url}/metrics", timeout=30).text
        [made] = re.findall(r"^focus_ray:batch_requests_total{.*completed.*} (\S+)$", metrics, re.M)
        assert 24 - done - 8 <= float(made) <= 24 - 4  # those of the second process
    wait_until(lambda: gauge(local, "num_requests_running") == 0, 10)


def processes_named(name):
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if name in entry.read_bytes().decode(errors="replace"):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def test_official_client(local):
    client = openai.OpenAI(base_url=f"{local.url}/v1", api_key="unused", max_retries=0)
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.completions.create(model="fake", prompt="abc").choices[0].text == "abc"
    stream = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == "<user>hi<assistant>"


def test_prompts_of_one_request_all_find_an_engine(local):
    """They share Serve's id of the request, by which its routers tell waiting calls apart."""
    prompts = [f"prompt {number}" for number in range(12)]
    response = complete(local, prompts)
    assert [choice["text"] for choice in response.json()["choices"]] == prompts


@pytest.mark.parametrize(
    ("prompt", "status", "param", "retry_after"),
    [
        pytest.param("overloaded", 429, None, "3", id="overload keeps its delay"),
        pytest.param("x" * 5000, 400, "prompt", None, id="refusal keeps its field"),
        pytest.param("dead", 503, None, "10", id="death"),
        pytest.param("bug", 500, None, None, id="unforeseen"),
    ],
)
def test_errors_cross_the_process_boundary(local, prompt, status, param, retry_after):
    response = complete(local, prompt)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["param"] == param
    assert response.headers.get("Retry-After") == retry_after
    assert "Traceback" not in error["message"]
    assert "\n" not in error["message"]


def test_death_in_midstream_is_the_last_event(local):
    response = complete(local, "it dies midway", stream=True)
    assert response.text.rstrip().endswith('"code":"engine_dead"}}')


def test_tokenize_refusals_cross_too(local):
    response = httpx.post(f"{local.url}/detokenize", json={"tokens": [10**6]}, timeout=30)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tokens"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_leaving_aborts(local, stream):
    assert gauge(local, "num_requests_running") == 0
    body = {"prompt": "forever", "max_tokens": 4000, "n": 2, "stream": stream}
    raw = httpx.Request("POST", f"{local.url}/v1/completions", json=body)
    with socket.create_connection((raw.url.host, raw.url.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: {len(raw.content)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + raw.content)
        wait_until(lambda: gauge(local, "num_requests_running") == 1, 10)
        steps = gauge(local, "engine_steps_total")
    wait_until(lambda: gauge(local, "num_requests_running") == 0, 10)
    # A whole answer takes 1000 steps; these are what passes between two looks at the metrics.
    assert gauge(local, "engine_steps_total") - steps < 200


def test_metrics_name_the_replica(local):
    text = httpx.get(f"{local.url}/metrics", timeout=30).text
    assert 'focus_ray:num_requests_running{model_name="fake",replica="' in text


def test_lines_of_a_request_are_in_serves_log_by_its_id(local, ray_here):
    body = {"prompt": "abc", "max_tokens": 2}
    headers = {"X-Request-Id": "order-66"}
    response = httpx.post(f"{local.url}/v1/completions", json=body, headers=headers, timeout=30)
    assert response.headers.get_list("X-Request-Id") == ["order-66"]

    def lines(deployment):
        files = ray_here.folder.glob(f"session_latest/logs/serve/replica_*_{deployment}_*.log")
        texts = [line for file in files for line in file.read_text().splitlines()]
        return [line for line in texts if "order-66" in line]

    wait_until(lambda: lines("ingress"), 10)
    (line,) = lines("ingress")
    assert "order-66 -- POST /v1/completions status=200 model=fake finish_reason=length" in line


def test_a_flood_is_refused_at_once(local):
    """16 places are taken, 32 clients come: all hear when to come again, the 16 go on."""
    url, body = f"{local.url}/v1/completions", {"prompt": "forever", "max_tokens": 4000}
    with httpx.Client(timeout=30) as client, ThreadPoolExecutor(32) as flood, ExitStack() as held:
        streams = [
            held.enter_context(
                client.stream("POST", url, json=body | {"stream": True})
            ).iter_lines()
            for _ in range(16)
        ]
        refused = list(flood.map(lambda _: client.post(url, json=body), range(32)))
        assert {reply.status_code for reply in refused} == {429}
        assert all(int(reply.headers["Retry-After"]) >= 1 for reply in refused)
        assert client.get(f"{local.url}/health").status_code == 200
        assert all(next(lines).startswith("data: {") for lines in streams)
    wait_until(lambda: gauge(local, "num_sequences_open") == 0, 10)
    assert complete(local, "abc").status_code == 200


def test_workers_do_not_see_the_working_directory(local):
    """A checkout on their path would hide the package ``kernels`` that transformers looks for."""
    import ray

    @ray.remote(num_cpus=0)
    def path_of_worker():
        import sys

        return sys.path

    path = ray.get(path_of_worker.remote())
    assert os.getcwd() not in path
    assert "" not in path


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param("kill the process", id="its process is gone"),
        pytest.param("die for good", id="its step thread is gone"),
    ],
)
def test_a_dead_engine_is_replaced(local, prompt):
    """Last of those that share the server: it takes some seconds to be back."""

    def health():
        return httpx.get(f"{local.url}/health", timeout=30).status_code

    assert health() == 200
    response = complete(local, prompt)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_dead"
    wait_until(lambda: health() == 503, 10)
    refused = complete(local, "abc")  # Serve would let it wait for the next engine
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "10")
    wait_until(lambda: health() == 200, 60)
    assert complete(local, "abc").json()["choices"][0]["text"] == "abc"
    wait_until(lambda: local.trouble() is None, 30)


def test_a_taken_port_is_found_before_ray_starts():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StartFailed, match=f"127.0.0.1:{port}.*--port"):
            refuse_taken_port("127.0.0.1", port)
    refuse_taken_port("127.0.0.1", port)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        pytest.param(
            "The deployment failed to start 1 times in a row. Error:\n"
            "ray::Replica.initialize() (pid=1)\n"
            '  File "replica.py", line 1, in initialize\n'
            "    raise RuntimeError(traceback.format_exc()) from None\n"
            "RuntimeError: Traceback (most recent call last):\n"
            '  File "loading.py", line 4, in load\n'
            '    raise CheckpointError("no weights")\n'
            "           ^^^^^^^^^^\n"
            "focus_ray.errors.CheckpointError: no weights: a, b\n"
            "and c",
            "no weights: a, b\nand c",
            id="ours, in its words",
        ),
        pytest.param(
            'Error:\n  File "a.py", line 1, in f\n    f()\ntorch.OutOfMemoryError: 8 GiB wanted',
            "OutOfMemoryError: 8 GiB wanted",
            id="another's, with its name",
        ),
        pytest.param("The actor died: OOM", "The actor died: OOM", id="no traceback"),
        pytest.param(
            'Error:\n  File "a.py", line 1\n    f()\nKeyError', "KeyError", id="without words"
        ),
    ],
)
def test_reason_of(message, reason):
    assert reason_of(message) == reason
