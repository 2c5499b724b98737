"""The parts of the comparison over real engines that need none."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from focus_ray.benchmarks import routing_served
from focus_ray.benchmarks.routing_served import LOADS, interval, parse_arguments, requests, slowed


def test_requests_are_those_of_the_load_and_the_seed():
    load = LOADS["skewed"]
    bodies = requests(load, 2000, seed=1)
    assert bodies == requests(load, 2000, seed=1) != requests(load, 2000, seed=2)
    lengths = [body["max_tokens"] for body in bodies]
    num_long = sum(length >= load.long[0] for length in lengths)
    assert num_long == pytest.approx(2000 * load.long_share, rel=0.3)
    assert all(length <= load.short[1] for length in lengths if length < load.long[0])
    assert len({body["prompt"] for body in bodies}) == 2000


def test_an_interval_is_around_the_median():
    low, high = interval([0.8, 0.9, 1.0, 0.7, 0.85, 0.95])
    assert 0.7 <= low < 0.875 < high <= 1.0
    assert interval([0.9, 0.9]) == (0.9, 0.9)


def state_of(process_id):
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_slowed_engine_stands_still_at_times_and_never_afterwards(monkeypatch):
    command = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(command) as process:
        monkeypatch.setattr(routing_served, "one_engine", lambda deployment: process.pid)
        try:
            with slowed(0.5):
                seen = set()
                end = time.monotonic() + 20
                while not {"T", "R"} <= seen:
                    assert time.monotonic() < end, seen
                    seen.add(state_of(process.pid))
            assert state_of(process.pid) != "T"
        finally:
            process.kill()


def test_what_is_no_number_of_engines_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--num-replicas", "0"])
    assert "--num-replicas must be above 0, got 0" in capsys.readouterr().err
