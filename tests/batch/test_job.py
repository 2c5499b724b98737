"""What a job makes of what its engines tell, without engines."""

from __future__ import annotations

import json
import time

import pytest

from focus_ray.batch.job import MAX_ENDS, BatchJob, JobFailed, _Run
from focus_ray.batch.ledger import Ledger
from focus_ray.batch.storage import Folder
from focus_ray.batch.worker import ENGINE_ENDED, NOT_STARTED
from focus_ray.config import EngineConfig


@pytest.fixture
def run(tmp_path):
    """Starts one, or goes on with the last, and keeps what it shows."""

    def start(**options):
        job = BatchJob(("in",), str(tmp_path), EngineConfig(), "m", **options)
        shown = []
        ledger = Ledger(Folder(job.output), job.arguments([]))
        return _Run(job, ledger, 10, shown.append, time.monotonic()), shown

    return start


def row(line, is_error=False, file=0, text="{}", tokens=2):
    counts = json.dumps({"completion_tokens": tokens, "processed_tokens": 8, "decoded_tokens": 4})
    return {"file": file, "line": line, "text": text, "is_error": is_error, "counts": counts}


def ended(file, text):
    return row(0, True, file, text)


def test_a_record_counts_once_whoever_brings_it_again(run, tmp_path):
    first, shown = run()
    first.take([row(1), row(2), row(1)])
    assert (shown[-1].num_done, shown[-1].tokens_here) == (2, 4)
    first.commit()
    first.take([row(2), row(3, True)])
    first.commit()
    second, shown = run()
    second.take([row(3), row(4)])
    assert (shown[-1].num_done, shown[-1].num_done_here, shown[-1].num_errors) == (4, 1, 1)
    second.commit()
    summary = second.summarise()
    assert (summary["results"], summary["errors"]) == (3, 1)
    assert summary["requests_of_earlier_starts"] == 3
    assert summary["processed_per_decoded"] == 2.0 and summary["tokens_per_step"] is None
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_too_many_errors_end_a_job(run):
    made, _ = run(max_errors=1)
    made.take([row(1, True)])
    with pytest.raises(JobFailed, match="2 lines have errors, more than --max-errors 1"):
        made.take([row(2, True)])
    made.commit()
    again, _ = run(max_errors=1)
    with pytest.raises(JobFailed, match="more than --max-errors 1"):
        again.check_errors()


def test_an_engine_that_does_not_start_ends_a_job_with_the_reason(run):
    made, _ = run()
    with pytest.raises(JobFailed, match="did not start: no weights"):
        made.take([ended(NOT_STARTED, "no weights")])


def test_engines_that_only_end_are_not_started_for_ever(run):
    made, _ = run()
    for _ in range(MAX_ENDS - 1):
        made.take([ended(ENGINE_ENDED, "x")])
    made.take([row(1)])  # it gets somewhere
    for _ in range(MAX_ENDS - 1):
        made.take([ended(ENGINE_ENDED, "x")])
    with pytest.raises(JobFailed, match="the last one: out of memory"):
        made.take([ended(ENGINE_ENDED, "out of memory")])


def test_what_may_differ_when_a_job_goes_on():
    def arguments(**fields):
        return BatchJob(("in",), "out", EngineConfig(**fields), "m").arguments([])

    assert arguments(max_num_seqs=4) == arguments(max_num_seqs=8, gpu_memory_utilization=0.5)
    assert arguments(decoding="block") != arguments()
    assert arguments(attend_cached=True) == arguments(), "said or not, it is the default"
    assert arguments(seed=1) != arguments(seed=2)
