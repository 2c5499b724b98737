"""Jobs in a real Ray, with scripted engines: whatever dies, each line has one record."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from focus_ray.batch import job as jobs
from focus_ray.batch.job import BatchJob, run_job
from focus_ray.batch.storage import Folder
from focus_ray.benchmarks.stepped_engine import stepped_factory
from focus_ray.cluster.local_ray import local_ray
from focus_ray.config import EngineConfig

LINES = 240
WRONG = (17, 120, 121)
ENGINE = EngineConfig(max_num_seqs=8, device="cpu")

DRIVER = """
import sys, ray
from focus_ray.batch import job as jobs
from focus_ray.benchmarks.stepped_engine import stepped_factory
from focus_ray.config import EngineConfig
address, source, output = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
jobs.COMMIT_EVERY = 16
job = jobs.BatchJob((source,), output, EngineConfig(max_num_seqs=8, device="cpu"), "m")
jobs.run_job(job, engine_factory=stepped_factory(0.02, 1.0, 8))
"""


@pytest.fixture(scope="module")
def ray():
    with local_ray(object_store_bytes=128 << 20, environment={}):
        import ray

        yield ray


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "in.jsonl"
    lines = [
        "{" if number in WRONG else json.dumps({"prompt": [number], "max_tokens": 1 + number % 9})
        for number in range(1, LINES + 1)
    ]
    file.write_text("\n".join(lines) + "\n")
    return file


def records(output, kind):
    folder = Folder(str(output))
    texts = [line for name in folder.names(kind) for line in folder.read(name).splitlines()]
    return [json.loads(text) for text in texts]


@pytest.mark.timeout(240)
def test_a_job_survives_its_driver_and_its_engine(ray, source, tmp_path, monkeypatch):
    output = tmp_path / "out"
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, address, str(source), str(output)], cwd=tmp_path
    )
    try:
        wait_for(lambda: Folder(str(output)).names("results"), driver)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    monkeypatch.setattr(jobs, "COMMIT_EVERY", 16)
    killed = threading.Event()

    def kill_once(progress):
        if progress.num_done_here > 8 and not killed.is_set():
            killed.set()
            [name] = [
                each["name"]
                for each in ray.util.list_named_actors(all_namespaces=True)
                if each["name"].startswith("focus-ray-batch-")
            ]
            ray.kill(ray.get_actor(name), no_restart=False)

    job = BatchJob((str(source),), str(output), ENGINE, "m")
    summary = run_job(job, show=kill_once, engine_factory=stepped_factory(0.02, 1.0, 8))
    assert killed.is_set()
    assert 0 < summary["requests_of_earlier_starts"] < LINES
    assert (summary["requests"], summary["errors"]) == (LINES, len(WRONG))
    found = records(output, "results")
    assert sorted(each["source"]["line"] for each in found) == sorted(
        set(range(1, LINES + 1)) - set(WRONG)
    )
    for each in found:
        [choice] = each["response"]["body"]["choices"]
        assert choice["text"] == " word" * (1 + each["source"]["line"] % 9)
    assert sorted(each["source"]["line"] for each in records(output, "errors")) == list(WRONG)
    again = run_job(job, engine_factory=stepped_factory(0.02, 1.0, 8))
    assert again["requests"] == LINES and len(records(output, "results")) == len(found)


def wait_for(condition, process):
    until = time.monotonic() + 90
    while not condition():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
