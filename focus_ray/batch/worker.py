"""An engine in an actor of Ray Data's pool.

Many blocks of lines are in it at a time, as calls of one event loop, so that the engine is full
whatever the blocks are: none waits for another one's end.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from focus_ray.batch.answering import record_of_line
from focus_ray.batch.records import Record, Source, request_key
from focus_ray.config import EngineConfig
from focus_ray.errors import EngineDead
from focus_ray.openai.text_engine import EngineFactory, TextEngine

# Values of ``file`` that tell of the engine instead of a line; ``text`` says why.
ENGINE_ENDED, NOT_STARTED = -1, -2
# Time for the last words to leave the process.
EXIT_AFTER_S = 2.0
# Nobody reads an answer before its end, which is told at once.
LOOK_S = 30.0
# Each table is an object of Ray's, which costs the driver more than the records in it.
GATHER_S = 0.5

LINES = pa.schema([("file", pa.int64()), ("line", pa.int64()), ("raw", pa.binary())])
RECORDS = pa.schema(
    [
        ("file", pa.int64()),
        ("line", pa.int64()),
        ("text", pa.string()),
        ("is_error", pa.bool_()),
        ("counts", pa.string()),
    ]
)


@dataclass(frozen=True)
class WorkerSettings:
    """What an engine's process must know of the job.

    Args:
        job: a name for the work; requests are named after it and their line.
        files: names of the input files, as records call them.
        names: by which lines may call the model.
        defaults: fields of bodies that lines leave out.
        in_flight: most lines before the engine at a time; more than it has places.
    """

    job: str
    config: EngineConfig
    files: tuple[str, ...]
    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    in_flight: int


class EngineWorker:
    """Lines in, records out.

    Args:
        engine_factory: loads the model and starts the engine.
        exit_process: ends this process, which Ray then starts anew.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        engine_factory: EngineFactory,
        exit_process: Callable[[int], object] = os._exit,
    ) -> None:
        self._settings = settings
        self._exit_process = exit_process
        self._is_ending = False
        self._trouble: str | None = None
        self._places = asyncio.Semaphore(settings.in_flight)
        try:
            engine = engine_factory(settings.config)
        except Exception as error:  # told as a result, for Ray would try for ever
            self._trouble = str(error) or type(error).__name__
            return
        self._text = TextEngine(engine, lambda request: engine.generate(request, lambda: LOOK_S))

    async def __call__(self, lines: Any) -> AsyncIterator[Any]:
        """Records as their lines are finished, those of half a second at a time.

        Args:
            lines: a table as ``LINES``.

        Yields:
            tables as ``RECORDS``.
        """
        if self._trouble is not None:
            yield table([(NOT_STARTED, 0, Record(self._trouble, True))])
            return
        pending = {
            asyncio.create_task(self._record(**line))
            for line in lines.select(LINES.names).to_pylist()
        }
        try:
            while pending:
                done, pending = await asyncio.wait(pending, timeout=GATHER_S)
                if done:
                    yield table([task.result() for task in done])
        except EngineDead as death:
            if self._is_ending:  # the work of this call goes to the next process
                await asyncio.Event().wait()
            self._is_ending = True
            asyncio.get_running_loop().call_later(EXIT_AFTER_S, self._exit_process, 1)
            yield table([(ENGINE_ENDED, 0, Record(str(death), True))])
        finally:
            for task in pending:
                task.cancel()

    async def _record(self, file: int, line: int, raw: bytes) -> tuple[int, int, Record]:
        source = Source(self._settings.files[file], line)
        async with self._places:
            record = await record_of_line(
                raw,
                self._text,
                key=request_key(self._settings.job, source),
                source=source,
                names=self._settings.names,
                defaults=self._settings.defaults,
            )
        return file, line, record


def table(records: Sequence[tuple[int, int, Record]]) -> Any:
    """As ``RECORDS`` says."""
    return pa.Table.from_pylist(
        [
            {
                "file": file,
                "line": line,
                "text": record.text,
                "is_error": record.is_error,
                "counts": json.dumps(dict(record.counts)),
            }
            for file, line, record in records
        ],
        RECORDS,
    )
