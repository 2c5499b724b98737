"""The actor's side of a job, in this process."""

from __future__ import annotations

import asyncio
import json

import pyarrow as pa
import pytest

from focus_ray.batch import worker
from focus_ray.batch.worker import ENGINE_ENDED, LINES, NOT_STARTED, EngineWorker, WorkerSettings
from focus_ray.benchmarks.stepped_engine import stepped_factory
from focus_ray.config import EngineConfig
from focus_ray.errors import CheckpointError, EngineDead

SETTINGS = WorkerSettings("job", EngineConfig(), ("in.jsonl",), ("m",), {"max_tokens": 3}, 6)


def lines(*objects, first=1):
    rows = [
        {"file": 0, "line": number, "raw": each if isinstance(each, bytes) else json.dumps(each)}
        for number, each in enumerate(objects, start=first)
    ]
    return pa.Table.from_pylist(
        [
            {**row, "raw": row["raw"] if isinstance(row["raw"], bytes) else row["raw"].encode()}
            for row in rows
        ],
        LINES,
    )


async def answered(made, *tables):
    async def one(table):
        return [row async for part in made(table) for row in part.to_pylist()]

    return [row for rows in await asyncio.gather(*map(one, tables)) for row in rows]


async def test_every_line_has_a_record():
    made = EngineWorker(SETTINGS, stepped_factory(0.001, 1.0, 2))
    rows = await answered(
        made,
        lines({"prompt": [1, 2]}, {"prompt": [1], "max_tokens": 5}, b"{", {"prompt": "text"}),
        lines({"prompt": [1], "model": "other"}, {"custom_id": "n", "prompt": [4]}, first=5),
    )
    found = {row["line"]: (row["is_error"], json.loads(row["text"])) for row in rows}
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert {line for line, (is_error, _) in found.items() if is_error} == {3, 4, 5}
    texts = {
        line: record["response"]["body"]["choices"][0]["text"]
        for line, (is_error, record) in found.items()
        if not is_error
    }
    assert texts == {1: " word" * 3, 2: " word" * 5, 6: " word" * 3}
    assert [found[line][1]["custom_id"] for line in (1, 3, 6)] == ["in.jsonl:1", "in.jsonl:3", "n"]
    statuses = [found[line][1]["response"]["status_code"] for line in (3, 4, 5)]
    assert statuses == [400, 400, 404]
    assert found[4][1]["source"] == {"file": "in.jsonl", "line": 4}
    counts = [json.loads(row["counts"]) for row in rows if row["line"] == 2]
    assert counts[0]["completion_tokens"] == 5


async def test_what_is_finished_does_not_wait_for_the_rest_of_its_call(monkeypatch):
    monkeypatch.setattr(worker, "GATHER_S", 0.05)
    made = EngineWorker(SETTINGS, stepped_factory(0.005, 1.0, 2))
    rows = made(lines({"prompt": [1]}, {"prompt": [1], "max_tokens": 400}))
    [first] = (await anext(rows)).to_pylist()
    [last] = [row async for part in rows for row in part.to_pylist()]
    assert (first["line"], last["line"]) == (1, 2)


async def test_the_same_line_has_the_same_id_in_every_run():
    names = set()
    for _ in range(2):
        made = EngineWorker(SETTINGS, stepped_factory(0.001, 1.0, 2))
        [row] = await answered(made, lines({"prompt": [1]}))
        names.add(json.loads(row["text"])["id"])
    assert len(names) == 1


class Dying:
    """An engine that ends in the middle of its work."""

    tokenizer = None
    max_model_len = vocab_size = 100

    async def generate(self, request, pause_s=None):
        await asyncio.sleep(0.01)
        raise EngineDead("out of memory")
        yield


async def test_an_engine_that_ends_says_why_and_takes_its_process_along(monkeypatch):
    monkeypatch.setattr(worker, "EXIT_AFTER_S", 0.05)
    exited = asyncio.Event()
    made = EngineWorker(SETTINGS, lambda config: Dying(), lambda status: exited.set())
    first, second = (made(lines({"prompt": [1]})) for _ in range(2))
    [row] = (await anext(first)).to_pylist()
    assert (row["file"], row["text"]) == (ENGINE_ENDED, "out of memory")
    with pytest.raises(TimeoutError):  # Ray gives that call to the next process
        await asyncio.wait_for(anext(second), 0.1)
    await asyncio.wait_for(exited.wait(), 5.0)


async def test_an_engine_that_does_not_start_is_told_as_a_result():
    def broken(config):
        raise CheckpointError("no weights")

    [row] = await answered(EngineWorker(SETTINGS, broken), lines({"prompt": [1]}))
    assert (row["file"], row["text"]) == (NOT_STARTED, "no weights")
