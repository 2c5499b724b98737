"""Runs the batches that wait in storage through the engines, beside what people ask interactively.

One process does, so that a line is run once; what it has done is in the ledger of the batch, and
the next process goes on from there. Batches take at most a share of the engines' places, so that
interactive requests find the others free.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from itertools import chain
from typing import Any, BinaryIO, Literal

from prometheus_client import Metric

from focus_ray.batch.answering import record_of
from focus_ray.batch.batch_store import ENDED, AskedBatch, BatchState, BatchStore
from focus_ray.batch.commit_pace import CommitPace
from focus_ray.batch.file_store import FileStore
from focus_ray.batch.ledger import Ledger, LostOwnership, Place
from focus_ray.batch.lines import BatchRequest, custom_id_of, is_blank, parse_line, request_line
from focus_ray.batch.records import Record, Source, error_record, request_key, unrun_record
from focus_ray.batch.storage import Folder
from focus_ray.errors import EngineDead, RequestRejected
from focus_ray.openai.error_kinds import NoSuchObject
from focus_ray.openai.replies import BatchErrorEntry
from focus_ray.serve.batch_metrics import NO_MODEL, BatchMetrics
from focus_ray.serve.served_models import ServedModel, ServedModels

logger = logging.getLogger(__name__)

POLL_S = 1.0
WAIT_S = 0.05
COMMIT_EVERY_S = 1.0
ENGINE_RETRY_S = 2.0
MAX_BATCHES = 4
MAX_ATTEMPTS = 3
MAX_REQUESTS = 50_000
MAX_ERRORS_SHOWN = 100
LINES_AT_ONCE = 64

Ended = Literal["completed", "cancelled", "expired"]
# What is said of lines that were not run; the codes are OpenAI's.
UNRUN = {
    "cancelled": "The batch was cancelled before this request was run.",
    "expired": "The batch's completion window ended before this request was run.",
}


class BatchRunner:
    """Takes up what is unfinished, oldest first, some at a time.

    Args:
        folder: of the server's files and batches.
        models: with clients that wait for an engine rather than refuse.
        places_per_engine: sequences of batches that one engine gets at a time; a line that asks
            for more is run when no other is.
    """

    def __init__(self, folder: Folder, models: ServedModels, places_per_engine: int) -> None:
        self._files = FileStore(folder)
        self._batches = BatchStore(folder)
        self._models = models
        self._places_per_engine = places_per_engine
        self._open: Counter[str] = Counter()  # sequences before engines, by the model's first name
        self._metrics = BatchMetrics()
        self._known: dict[str, AskedBatch] = {}
        self._waiting: set[str] = set()
        self._ended: set[str] = set()
        self._running: dict[str, asyncio.Task[None]] = {}
        # An engine may still be busy with what a predecessor asked, under its name.
        self._name = secrets.token_hex(4)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self.take_up()
            except Exception:  # of storage; there may be others that can be run meanwhile
                logger.exception("batches cannot be looked up; trying again")
            await asyncio.sleep(POLL_S)

    def metrics(self) -> list[Metric]:
        """Families for Prometheus, with values as of now."""
        num_running = sum(not task.done() for task in self._running.values())
        return self._metrics.collect(num_running, len(self._waiting), self._open)

    async def take_up(self) -> None:
        """Begin with batches that wait, as far as there is room."""
        self._running = {name: task for name, task in self._running.items() if not task.done()}
        for asked in await asyncio.to_thread(self._batches.all, self._known):
            self._known[asked.id] = asked
            has_room = len(self._running) < MAX_BATCHES
            if asked.id in self._running or asked.id in self._ended:
                continue
            if asked.id in self._waiting and not has_room:
                continue
            state = await asyncio.to_thread(self._batches.state, asked.id)
            self._waiting.discard(asked.id)
            if state.status in ENDED:
                self._ended.add(asked.id)
            elif has_room:
                self._running[asked.id] = asyncio.create_task(self._guarded(asked, state))
            else:
                self._waiting.add(asked.id)

    async def _guarded(self, asked: AskedBatch, state: BatchState) -> None:
        try:
            await self._batch(asked, state)
        except LostOwnership as error:
            logger.warning("batch %s: %s", asked.id, error)
        except Exception:  # the others go on; this one is taken up again
            logger.exception("batch %s was interrupted", asked.id)
            await asyncio.sleep(ENGINE_RETRY_S)

    async def _batch(self, asked: AskedBatch, state: BatchState) -> None:
        if state.status == "validating":
            state = await asyncio.to_thread(self._validated, asked)
        if state.status == "failed":
            return
        try:
            if state.status == "in_progress":
                await self._lines(asked, state)
            await asyncio.to_thread(self._finalize, asked, state)
        except NoSuchObject as error:
            state.errors = [_entry("invalid_file", str(error), None, "input_file_id")]
            state.enter("failed")
            await asyncio.to_thread(self._batches.save, asked.id, state)

    def _validated(self, asked: AskedBatch) -> BatchState:
        state = BatchState()
        try:
            state.total, state.errors = self._checked(asked)
        except NoSuchObject as error:
            state.errors = [_entry("invalid_file", str(error), None, "input_file_id")]
        state.enter("failed" if state.errors else "in_progress")
        self._batches.save(asked.id, state)
        return state

    def _checked(self, asked: AskedBatch) -> tuple[int, list[BatchErrorEntry]]:
        """How many requests there are, and what is wrong with the file."""
        errors: list[BatchErrorEntry] = []
        names: set[str] = set()
        total = 0
        for number, raw in self._read(asked):
            total += 1
            if len(errors) == MAX_ERRORS_SHOWN:
                break
            try:
                line = request_line(raw)
            except RequestRejected as error:
                errors.append(_entry("invalid_json_line", str(error), number, error.param))
                continue
            if line.custom_id in names:
                text = f"custom_id: {line.custom_id!r} has been used before; give each its own"
                errors.append(_entry("duplicate_custom_id", text, number, "custom_id"))
            names.add(line.custom_id)
            if line.url != asked.endpoint:
                text = f"url: {line.url!r} is not the batch's endpoint {asked.endpoint!r}"
                errors.append(_entry("mismatched_url", text, number, "url"))
        if not total:
            errors.append(_entry("empty_file", "the input file has no requests", None, None))
        if total > MAX_REQUESTS:
            text = f"the input file has more than {MAX_REQUESTS} requests; make several batches"
            errors.append(_entry("too_many_requests", text, None, None))
        return total, errors

    async def _lines(self, asked: AskedBatch, state: BatchState) -> None:
        """Run what has no record yet, until it all has one or the batch is to end."""
        if await self._is_over(asked):
            return
        ledger = await asyncio.to_thread(
            Ledger, self._batches.records(asked.id), {"batch": asked.id}
        )
        work = _Work(asked, state, ledger, self._batches)
        lines = self._read(asked)
        try:
            while chunk := await asyncio.to_thread(_some, lines):
                for number, raw in chunk:
                    if number in ledger.done(0):
                        continue
                    if not await self._begin(work, number, raw):
                        return
            while work.tasks:
                await asyncio.wait(work.tasks, timeout=COMMIT_EVERY_S)
                await work.commit()
                if await self._is_over(asked):
                    return
        finally:
            for task in work.tasks:
                task.cancel()
            await asyncio.gather(*work.tasks, return_exceptions=True)
            await work.commit()

    async def _begin(self, work: _Work, number: int, raw: bytes) -> bool:
        """Ask an engine about a line as soon as there is room; whether the batch goes on."""
        key = request_key(f"{work.asked.id}-{self._name}", Source(work.asked.input_file_id, number))
        try:
            request = parse_line(raw, str(number))
            _, model = self._models.find(request.body.model)
        except RequestRejected as error:
            name = custom_id_of(raw) or str(number)
            work.records[0, number] = record = error_record(key, name, error, None)
            self._metrics.count(NO_MODEL, record)
            return True
        size, name = request.num_sequences, model.names[0]
        while self._open[name] and self._open[name] + size > self._places(model):
            await asyncio.sleep(WAIT_S)
            if await work.commit_now_and_then() and await self._is_over(work.asked):
                return False
        self._open[name] += size

        async def ask() -> None:
            try:
                record = await self._record(work.asked, request, key, model)
                work.records[0, number] = record
                self._metrics.count(name, record)
            finally:
                self._open[name] -= size

        work.start(ask())
        return not (await work.commit_now_and_then() and await self._is_over(work.asked))

    async def _record(
        self, asked: AskedBatch, request: BatchRequest, key: str, model: ServedModel
    ) -> Record:
        """Ask again where engines died of it or there was none, but not for ever: a line that kills
        engines would otherwise do so until its batch expires.
        """
        attempt = 0
        while True:
            attempt += 1
            name = f"{key}-{attempt}"  # the last engine may be alive, and still at it
            try:
                return await record_of(request, model.client, key=name, names=model.names)
            except EngineDead as death:
                logger.warning("batch %s, %s: %s", asked.id, request.custom_id, death)
                attempt -= not model.client.num_engines()  # it was none of this line's doing
                if attempt >= MAX_ATTEMPTS:
                    return error_record(key, request.custom_id, death, None)
                await asyncio.sleep(ENGINE_RETRY_S)

    def _finalize(self, asked: AskedBatch, state: BatchState) -> None:
        if state.status != "finalizing":
            state.enter("finalizing")
            self._batches.save(asked.id, state)
        folder = self._batches.records(asked.id)
        ledger = Ledger(folder, {"batch": asked.id})
        state.completed, state.failed = ledger.num_results, ledger.num_errors
        end: Ended = "completed"
        if state.completed + state.failed < state.total:
            end = "expired" if self._batches.cancelled_at(asked.id) is None else "cancelled"
        results = [shard.results for shard in ledger.shards if shard.results]
        errors = [shard.errors for shard in ledger.shards if shard.errors]
        if results:
            pieces: Iterator[bytes] = map(folder.read, results)
            state.output_file_id = self._file(asked, "output", pieces)
        if errors or end != "completed":
            pieces = chain(map(folder.read, errors), self._unrun(asked, ledger, end))
            state.error_file_id = self._file(asked, "error", pieces)
        state.enter(end)
        self._batches.save(asked.id, state)
        self._batches.forget_records(asked.id)  # they are in the two files

    def _unrun(self, asked: AskedBatch, ledger: Ledger, end: Ended) -> Iterator[bytes]:
        """Lines of the error file for what the batch did not come to."""
        if end == "completed":
            return
        for number, raw in self._read(asked):
            if number not in ledger.done(0):
                name = custom_id_of(raw) or str(number)
                key = request_key(asked.id, Source(asked.input_file_id, number))
                record = unrun_record(key, name, f"batch_{end}", UNRUN[end])
                yield f"{record.text}\n".encode()

    def _file(self, asked: AskedBatch, kind: str, pieces: Iterator[bytes]) -> str:
        """A file that another runner, if this one dies before it is known, makes once more."""
        name = f"{asked.id}_{kind}.jsonl"

        def write(file: BinaryIO) -> None:
            file.writelines(pieces)

        return self._files.add(write, name, "batch_output", asked.owner, made_for=name).id

    def _read(self, asked: AskedBatch) -> Iterator[tuple[int, bytes]]:
        self._files.get(asked.input_file_id, asked.owner)
        with self._files.reading(asked.input_file_id) as file:
            for number, raw in enumerate(file, start=1):
                if not is_blank(raw):
                    yield number, raw

    def _places(self, model: ServedModel) -> int:
        return self._places_per_engine * max(1, model.client.num_engines())

    async def _is_over(self, asked: AskedBatch) -> bool:
        if time.time() > asked.expires:
            return True
        return await asyncio.to_thread(self._batches.cancelled_at, asked.id) is not None


class _Work:
    """A batch that is being run."""

    def __init__(
        self, asked: AskedBatch, state: BatchState, ledger: Ledger, batches: BatchStore
    ) -> None:
        self.asked = asked
        self.records: dict[Place, Record] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self._state = state
        self._ledger = ledger
        self._batches = batches
        self._pace = CommitPace(COMMIT_EVERY_S)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def commit_now_and_then(self) -> bool:
        """Commit if it is time to; whether it was."""
        if not self._pace.is_due:
            return False
        await self.commit()
        return True

    async def commit(self) -> None:
        """What is finished counts from now on, and clients see how much it is."""
        records = dict(self.records)
        with self._pace.committing():
            await asyncio.to_thread(self._ledger.commit, records)
            for place in records:
                del self.records[place]
            self._state.completed = self._ledger.num_results
            self._state.failed = self._ledger.num_errors
            await asyncio.to_thread(self._batches.save, self.asked.id, self._state)


def _some(lines: Iterator[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    return [line for _, line in zip(range(LINES_AT_ONCE), lines, strict=False)]


def _entry(code: str, message: str, line: int | None, param: str | None) -> BatchErrorEntry:
    return BatchErrorEntry(code=code, message=message, line=line, param=param)
