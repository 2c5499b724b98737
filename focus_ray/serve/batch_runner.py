"""Runs the batches that wait in storage through the engines, beside what people ask interactively.

One process does, so that a line is run once; what it has done is in the ledger of the batch, and
the next process goes on from there. Batches take at most a share of the engines' places, so that
interactive requests find the others free.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence

from focus_ray.batch.answering import record_of
from focus_ray.batch.batch_store import ENDED, AskedBatch, BatchState, BatchStore
from focus_ray.batch.file_store import FileStore
from focus_ray.batch.ledger import Ledger, LostOwnership, Place
from focus_ray.batch.lines import custom_id_of, is_blank, parse_line, request_line
from focus_ray.batch.records import Record, Source, error_record, request_key
from focus_ray.batch.storage import Folder
from focus_ray.errors import EngineDead, RequestRejected
from focus_ray.openai.error_kinds import NoSuchObject
from focus_ray.openai.replies import BatchErrorEntry
from focus_ray.serve.served_models import ServedModels

logger = logging.getLogger(__name__)

POLL_S = 1.0
COMMIT_EVERY_S = 1.0
ENGINE_RETRY_S = 2.0
MAX_BATCHES = 4
MAX_REQUESTS = 50_000
MAX_ERRORS_SHOWN = 100
LINES_AT_ONCE = 64


class BatchRunner:
    """Takes up what is unfinished, oldest first, some at a time.

    Args:
        folder: of the server's files and batches.
        models: with clients that wait for an engine rather than refuse.
        places_per_engine: sequences of batches that one engine gets at a time.
    """

    def __init__(self, folder: Folder, models: ServedModels, places_per_engine: int) -> None:
        self._files = FileStore(folder)
        self._batches = BatchStore(folder)
        self._models = models
        self._places_per_engine = places_per_engine
        self._open = 0
        self._running: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self.take_up()
            except OSError:
                logger.exception("the storage of batches does not answer; trying again")
            await asyncio.sleep(POLL_S)

    async def take_up(self) -> None:
        """Begin with batches that wait, as far as there is room."""
        self._running = {name: task for name, task in self._running.items() if not task.done()}
        for asked in await asyncio.to_thread(self._batches.all):
            if len(self._running) >= MAX_BATCHES:
                return
            if asked.id not in self._running:
                state = await asyncio.to_thread(self._batches.state, asked.id)
                if state.status not in ENDED:
                    self._running[asked.id] = asyncio.create_task(self._guarded(asked, state))

    async def finished(self) -> None:
        """Wait for what has begun."""
        await asyncio.gather(*self._running.values())

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
        if state.status == "in_progress":
            await self._lines(asked, state)
        await asyncio.to_thread(self._finalize, asked, state)

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
        ledger = await asyncio.to_thread(
            Ledger, self._batches.records(asked.id), {"batch": asked.id}
        )
        pending: dict[Place, Record] = {}
        tasks: set[asyncio.Task[None]] = set()

        async def one(number: int, raw: bytes) -> None:
            pending[0, number] = await self._record(asked, number, raw)

        async def commit() -> None:
            records = dict(pending)
            await asyncio.to_thread(ledger.commit, records)
            for place in records:
                del pending[place]
            state.completed, state.failed = ledger.num_results, ledger.num_errors
            await asyncio.to_thread(self._batches.save, asked.id, state)

        committed_s = time.monotonic()
        lines = self._read(asked)
        try:
            while chunk := await asyncio.to_thread(_some, lines):
                for number, raw in chunk:
                    if number in ledger.done(0):
                        continue
                    while self._open >= self._places():
                        await asyncio.sleep(0.05)
                        if await self._is_over(asked):
                            return
                    self._open += 1
                    task = asyncio.create_task(one(number, raw))
                    task.add_done_callback(lambda _: self._leave())
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    if time.monotonic() - committed_s > COMMIT_EVERY_S:
                        await commit()
                        committed_s = time.monotonic()
                        if await self._is_over(asked):
                            return
            while tasks:
                await asyncio.wait(tasks, timeout=COMMIT_EVERY_S)
                await commit()
                if await self._is_over(asked):
                    return
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await commit()

    async def _record(self, asked: AskedBatch, number: int, raw: bytes) -> Record:
        key = request_key(asked.id, Source(asked.input_file_id, number))
        fallback = str(number)
        try:
            request = parse_line(raw, fallback)
            _, model = self._models.find(request.body.model)
        except RequestRejected as error:
            return error_record(key, custom_id_of(raw) or fallback, error, None)
        while True:
            try:
                return await record_of(request, model.client, key=key, names=model.names)
            except EngineDead as death:
                logger.warning("batch %s waits for an engine: %s", asked.id, death)
                await asyncio.sleep(ENGINE_RETRY_S)

    def _finalize(self, asked: AskedBatch, state: BatchState) -> None:
        if state.status != "finalizing":
            state.enter("finalizing")
            self._batches.save(asked.id, state)
        folder = self._batches.records(asked.id)
        ledger = Ledger(folder, {"batch": asked.id})
        results = [shard.results for shard in ledger.shards if shard.results]
        errors = [shard.errors for shard in ledger.shards if shard.errors]
        state.output_file_id = self._joined(asked, folder, results, "output")
        state.error_file_id = self._joined(asked, folder, errors, "error")
        state.completed, state.failed = ledger.num_results, ledger.num_errors
        if state.completed + state.failed == state.total:
            state.enter("completed")
        elif self._batches.cancelled_at(asked.id) is not None:
            state.enter("cancelled")
        else:
            state.enter("expired")
        self._batches.save(asked.id, state)

    def _joined(
        self, asked: AskedBatch, folder: Folder, names: Sequence[str], kind: str
    ) -> str | None:
        if not names:
            return None
        filename = f"{asked.id}_{kind}.jsonl"
        with self._files.adding(filename, "batch_output", asked.owner) as file:
            for name in names:
                file.write(folder.read(name))
        return self._files.newest.id

    def _read(self, asked: AskedBatch) -> Iterator[tuple[int, bytes]]:
        self._files.get(asked.input_file_id, asked.owner)
        with self._files.reading(asked.input_file_id) as file:
            for number, raw in enumerate(file, start=1):
                if not is_blank(raw):
                    yield number, raw

    def _places(self) -> int:
        engines = sum(model.client.num_engines() for model in self._models)
        return self._places_per_engine * max(1, engines)

    def _leave(self) -> None:
        self._open -= 1

    async def _is_over(self, asked: AskedBatch) -> bool:
        if time.time() > asked.expires:
            return True
        return await asyncio.to_thread(self._batches.cancelled_at, asked.id) is not None


def _some(lines: Iterator[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    return [line for _, line in zip(range(LINES_AT_ONCE), lines, strict=False)]


def _entry(code: str, message: str, line: int | None, param: str | None) -> BatchErrorEntry:
    return BatchErrorEntry(code=code, message=message, line=line, param=param)
