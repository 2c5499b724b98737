"""Ray Data between pieces of files and records: reading in parallel, and a pool of engines."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from focus_ray.batch.inputs import InputFile, Piece, pieces_of, read_piece
from focus_ray.batch.pool import EnginePool
from focus_ray.batch.worker import LINES, EngineWorker, WorkerSettings
from focus_ray.openai.text_engine import EngineFactory

# A block is given to one engine: small ones spread well, large ones cost less of the driver.
LEAST_BLOCK_BYTES, MOST_BLOCK_BYTES = 4 << 10, 256 << 10
BLOCKS_PER_ENGINE = 64
LEAST_CALLS = 4
# Each is a process that takes seconds to start.
READERS_PER_ENGINE = 1


class PieceSource(Datasource):
    """The lines of pieces, as a source of Ray Data; a task reads one piece."""

    def __init__(self, files: Sequence[InputFile], pieces: Sequence[Piece]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._files = files
        self._pieces = pieces

    def get_name(self) -> str:
        return "Lines"

    def estimate_inmemory_data_size(self) -> int:
        return sum(piece.size for piece in self._pieces)

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_read, self._files[piece.file], piece),
                BlockMetadata(len(piece.lines), piece.size, None, None),
            )
            for piece in self._pieces
        ]


def cut(files: Sequence[InputFile], num_engines: int) -> list[Piece]:
    """All files in pieces; each file is read once for it, all side by side."""
    lines_per_piece = _lines_per_piece(sum(file.size for file in files), num_engines)
    remote = ray.remote(pieces_of).options(num_cpus=0)
    found = ray.get(
        [remote.remote(number, file, lines_per_piece) for number, file in enumerate(files)]
    )
    return [piece for pieces in found for piece in pieces]


def records(
    files: Sequence[InputFile],
    pieces: Sequence[Piece],
    pool: EnginePool,
    settings: WorkerSettings,
    engine_factory: EngineFactory,
    longest_first: bool,
) -> Iterator[Any]:
    """Tables of records as they are finished, in any order.

    A call that is lost with its engine gives none; whoever asked finds out by what is missing.
    """
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it tells is ours to tell
    context = DataContext.get_current()
    context.enable_progress_bars = False  # the command has its own; the dashboard has Ray Data's
    context.max_errored_blocks = -1
    size = sum(file.size for file in files)
    context.target_max_block_size = _block_bytes(size, pool.num_replicas)
    lines = ray.data.read_datasource(
        PieceSource(files, pieces),
        num_cpus=0,  # engines may have all cores, and reading hardly needs one
        concurrency=READERS_PER_ENGINE * pool.num_replicas,
        override_num_blocks=len(pieces),
    )
    if longest_first:  # before there are engines, which would hold the cores that sorting needs
        lines = lines.sort("length", descending=True).materialize()
    rows_per_piece = max(1, sum(len(piece.lines) for piece in pieces) // len(pieces))
    num_calls = max(LEAST_CALLS, -(-settings.in_flight // rows_per_piece))
    with warnings.catch_warnings():
        # The one way to an actor's own placement group; to be replaced in Ray 2.64.
        warnings.filterwarnings("ignore", message="`ray_remote_args_fn` is deprecated")
        answered = lines.map_batches(
            EngineWorker,
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=pool.num_replicas,
                max_tasks_in_flight_per_actor=num_calls + 2,
                max_concurrent_calls_per_actor=num_calls,
            ),
            fn_constructor_args=(settings, engine_factory),
            ray_remote_args_fn=pool.actor_options,
            num_cpus=pool.rank.num_cpus,
        )
    yield from answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _read(file: InputFile, piece: Piece) -> list[Any]:
    lines = list(read_piece(file, piece))
    columns = {
        "file": [piece.file] * len(lines),
        "line": [line for line, _ in lines],
        "raw": [raw for _, raw in lines],
        "length": [len(raw) for _, raw in lines],
    }
    return [pa.table(columns, pa.schema([*LINES, ("length", pa.int64())]))]


def _block_bytes(total_bytes: int, num_engines: int) -> int:
    even = total_bytes // (num_engines * BLOCKS_PER_ENGINE)
    return min(max(even, LEAST_BLOCK_BYTES), MOST_BLOCK_BYTES)


def _lines_per_piece(total_bytes: int, num_engines: int) -> int:
    """Of lines of half a kilobyte, about one block."""
    return max(4, _block_bytes(total_bytes, num_engines) // 512)
