"""Files of input: found by path, folder, pattern or URL, and cut into pieces of a few lines.

A piece says where its lines begin, so that any process reads them without the rest of the file.
Lines of a Parquet file are its rows, written as JSON; a piece of it is a row group.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import fsspec  # type: ignore[import-untyped]

from focus_ray.batch.line_ranges import LineRanges
from focus_ray.batch.lines import is_blank
from focus_ray.batch.storage import opened

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
PATTERN_CHARS = "*?["


@dataclass(frozen=True)
class InputFile:
    """A file, and what tells whether it is still the same.

    Args:
        url: as fsspec takes it; a local path is absolute.
        name: as records call it.
        version: entity tag or time of its last change.
    """

    url: str
    name: str
    kind: str
    size: int
    version: str

    def identity(self) -> dict[str, Any]:
        return {"file": self.url, "size": self.size, "version": self.version}


@dataclass(frozen=True)
class Piece:
    """Lines of one file that are read at once.

    Args:
        file: number of the file among the inputs.
        start: byte at which the first line begins, or the number of the row group.
        size: bytes; 0 for a row group.
        first_line: its number in the file, from 1.
        lines: those that are requests and to be done.
    """

    file: int
    start: int
    size: int
    first_line: int
    lines: LineRanges

    def without(self, done: LineRanges) -> Piece | None:
        """What is left to do of it."""
        left = [
            line
            for first, last in self.lines.ranges
            for line in range(first, last + 1)
            if line not in done
        ]
        if not left:
            return None
        return replace(self, lines=LineRanges.of(left))


def find_inputs(given: Sequence[str]) -> list[InputFile]:
    """All files that paths, folders, patterns and URLs name, in order, each once.

    Raises:
        ValueError: one of them names nothing, or a file of another kind.
    """
    found: dict[str, InputFile] = {}
    for url in given:
        files, path = opened(url)
        if any(char in path for char in PATTERN_CHARS):
            paths = sorted(files.glob(path))
        elif files.isdir(path):
            paths = sorted(each for each in files.find(path) if _kind(each))
        else:
            paths = [path] if files.exists(path) else []
        if not paths:
            raise ValueError(f"--input {url!r}: there is no such file, or nothing in the folder")
        for each in paths:
            if (kind := _kind(each)) is None:
                raise ValueError(
                    f"--input {each!r}: must end in one of {', '.join(SUFFIXES)}, which says how "
                    "it is read"
                )
            info = files.info(each)
            version = info.get("ETag") or info.get("etag") or info.get("mtime") or ""
            whole = files.unstrip_protocol(each)
            found[whole] = InputFile(whole, _name(whole), kind, int(info["size"]), str(version))
    return list(found.values())


def pieces_of(number: int, file: InputFile, lines_per_piece: int) -> list[Piece]:
    """Read the whole file once and say where its lines are."""
    with fsspec.open(file.url, "rb") as opened_file:
        if file.kind == "parquet":
            return list(_row_groups(number, opened_file))
        return list(_runs_of_lines(number, opened_file, lines_per_piece))


def read_piece(file: InputFile, piece: Piece) -> Iterator[tuple[int, bytes]]:
    """The lines of a piece that are to be done, by their numbers."""
    with fsspec.open(file.url, "rb") as opened_file:
        if file.kind == "parquet":
            yield from _read_rows(opened_file, piece)
            return
        opened_file.seek(piece.start)
        data = opened_file.read(piece.size)
        for line, raw in enumerate(_split(data), start=piece.first_line):
            if line in piece.lines:
                yield line, raw


def _runs_of_lines(number: int, file: BinaryIO, lines_per_piece: int) -> Iterator[Piece]:
    start = end = 0
    first_line = line = 1
    requests: list[int] = []
    for raw in file:
        end += len(raw)
        if not is_blank(raw):
            requests.append(line)
        line += 1
        if line - first_line == lines_per_piece:
            if requests:
                yield Piece(number, start, end - start, first_line, LineRanges.of(requests))
            start, first_line, requests = end, line, []
    if requests:
        yield Piece(number, start, end - start, first_line, LineRanges.of(requests))


def _split(data: bytes) -> list[bytes]:
    """At line feeds alone: other separators may stand within JSON."""
    return data.removesuffix(b"\n").split(b"\n")


def _row_groups(number: int, file: BinaryIO) -> Iterator[Piece]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    metadata = pq.ParquetFile(file).metadata
    first = 1
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if rows:
            lines = LineRanges([(first, first + rows - 1)])
            yield Piece(number, group, 0, first, lines)
        first += rows


def _read_rows(file: BinaryIO, piece: Piece) -> Iterator[tuple[int, bytes]]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file).read_row_group(piece.start)
    line = piece.first_line
    for batch in table.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            if line in piece.lines:
                yield line, json.dumps(row, default=repr).encode()
            line += 1


def _kind(path: str) -> str | None:
    return SUFFIXES.get(os.path.splitext(path)[1].lower())


def _name(url: str) -> str:
    return url.removeprefix("file://")
