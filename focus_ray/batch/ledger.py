"""What is done of a job: shards of records, and the manifest that says which of them count.

A shard is written first and named in the manifest then, each as a whole. A job that dies in
between leaves a shard that nobody names; its lines are done again, and it is removed at the end. So
a line has one record or none that counts, whatever is killed when. The manifest belongs to the job
that wrote it last: another one that finds it changed stops.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from focus_ray.batch.line_ranges import LineRanges, Range
from focus_ray.batch.records import Record
from focus_ray.batch.shards import FORMATS, ShardFormat
from focus_ray.batch.storage import Folder
from focus_ray.errors import FocusRayError

MANIFEST = "manifest.json"
RESULTS, ERRORS = "results", "errors"

Place = tuple[int, int]
"""Number of the file among the inputs, from 0, and of the line in it, from 1."""


class LostOwnership(FocusRayError):
    """Another job has taken up the same output."""


class Shard(BaseModel):
    """One commit.

    Args:
        results, errors: names of files; None where there is no such record.
        counts: tokens and steps, by the names of ``usage``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    results: str | None
    errors: str | None
    num_results: int
    num_errors: int
    counts: dict[str, int]


class Manifest(BaseModel):
    """All commits, and what the job was started with.

    Args:
        lines: by the number of the input file, those that have a record in any of the shards. Lines
            are done nearly in order, so that these are a few ranges, however many shards there are.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[2] = 2
    owner: str
    arguments: dict[str, Any]
    lines: dict[int, list[Range]] = Field(default_factory=dict)
    shards: list[Shard] = Field(default_factory=list)


class Ledger:
    """The records of a job in a folder.

    Args:
        folder: empty, or as an earlier start of the same job left it.
        arguments: all that decides what the records are; plain JSON.
        shard_format: a name of ``FORMATS``, for results; errors are always JSON lines.

    Raises:
        ValueError: the folder belongs to another job, or to none.
    """

    def __init__(
        self, folder: Folder, arguments: Mapping[str, Any], shard_format: str = "jsonl"
    ) -> None:
        self._folder = folder
        self._formats: dict[str, ShardFormat] = {
            RESULTS: FORMATS[shard_format],
            ERRORS: FORMATS["jsonl"],
        }
        self._manifest = self._taken_up(dict(arguments))
        self._done = {file: LineRanges(each) for file, each in self._manifest.lines.items()}
        self._counts: Counter[str] = Counter()
        self._num_results = self._num_errors = 0
        for shard in self.shards:
            self._count(shard)

    @property
    def shards(self) -> Sequence[Shard]:
        return self._manifest.shards

    @property
    def num_results(self) -> int:
        return self._num_results

    @property
    def num_errors(self) -> int:
        return self._num_errors

    @property
    def counts(self) -> dict[str, int]:
        """Tokens and steps of all records."""
        return dict(self._counts)

    def done(self, file: int) -> LineRanges:
        """Lines of an input file that have a record."""
        return self._done.get(file, LineRanges())

    def commit(self, records: Mapping[Place, Record]) -> None:
        """Make records count, all of them or none.

        Lines that have a record already keep that one.

        Raises:
            LostOwnership: another job has taken up the folder; nothing of this counts.
        """
        new = {place: each for place, each in records.items() if not self._is_done(place)}
        if not new:
            return
        name = f"{len(self.shards) + 1:06d}-{self._manifest.owner}"
        kinds = {
            RESULTS: [record.text for record in new.values() if not record.is_error],
            ERRORS: [record.text for record in new.values() if record.is_error],
        }
        files = {kind: self._write(kind, name, texts) for kind, texts in kinds.items()}
        counts: Counter[str] = Counter()
        for record in new.values():
            counts.update(record.counts)
        shard = Shard(
            results=files[RESULTS],
            errors=files[ERRORS],
            num_results=len(kinds[RESULTS]),
            num_errors=len(kinds[ERRORS]),
            counts=dict(counts),
        )
        try:
            self._check_owner()
        except LostOwnership:
            for file in filter(None, files.values()):
                self._folder.delete(file)
            raise
        for number, lines in _by_file(new).items():
            self._done[number] = self.done(number) | lines
            self._manifest.lines[number] = self._done[number].ranges
        self._manifest.shards.append(shard)
        self._count(shard)
        self._save()

    def finish(self) -> None:
        """Leave nothing but what counts, when all lines have a record.

        Not earlier: a job that was replaced may be about to name what it has written.

        Raises:
            LostOwnership: another job has taken up the folder.
            ValueError: a file that counts is gone.
        """
        self._check_owner()
        named = {name for shard in self.shards for name in (shard.results, shard.errors) if name}
        found = {*self._folder.names(RESULTS), *self._folder.names(ERRORS)}
        if gone := sorted(named - found):
            raise ValueError(
                f"{self._folder.url} has no {gone[0]}, which {MANIFEST} names; somebody removed "
                "it. Give another folder, or put it back"
            )
        for name in found - named:
            self._folder.delete(name)

    def _taken_up(self, arguments: dict[str, Any]) -> Manifest:
        owner = uuid.uuid4().hex[:8]
        try:
            manifest = Manifest.model_validate_json(self._folder.read(MANIFEST))
        except FileNotFoundError:
            foreign = [*self._folder.names(RESULTS), *self._folder.names(ERRORS)]
            if foreign:
                raise ValueError(
                    f"{self._folder.url} holds {foreign[0]} and no {MANIFEST}, so it is not the "
                    "output of a batch; give another folder"
                ) from None
            manifest = Manifest(owner=owner, arguments=arguments)
        except ValidationError:
            raise ValueError(
                f"{self._folder.url}/{MANIFEST} is of no job, or of one that another version of "
                "focus-ray began; give another folder"
            ) from None
        if differences := list(_differences(manifest.arguments, arguments)):
            raise ValueError(
                f"{self._folder.url} holds the output of a job with other arguments; give another "
                "folder, or the same arguments:\n  " + "\n  ".join(differences)
            )
        manifest.owner = owner
        self._manifest = manifest
        self._save()
        return manifest

    def _write(self, kind: str, name: str, texts: Sequence[str]) -> str | None:
        if not texts:
            return None
        file = f"{kind}/{name}{self._formats[kind].suffix}"
        self._folder.write(file, self._formats[kind].encode(texts))
        return file

    def _save(self) -> None:
        self._folder.write(MANIFEST, self._manifest.model_dump_json().encode())

    def _check_owner(self) -> None:
        found = Manifest.model_validate_json(self._folder.read(MANIFEST)).owner
        if found != self._manifest.owner:
            raise LostOwnership(
                f"another job has taken up {self._folder.url}; this one stops, and what it had "
                "committed counts"
            )

    def _is_done(self, place: Place) -> bool:
        return place[1] in self.done(place[0])

    def _count(self, shard: Shard) -> None:
        self._counts.update(shard.counts)
        self._num_results += shard.num_results
        self._num_errors += shard.num_errors


def _by_file(places: Iterable[Place]) -> dict[int, LineRanges]:
    lines: dict[int, list[int]] = {}
    for file, line in places:
        lines.setdefault(file, []).append(line)
    return {file: LineRanges.of(found) for file, found in lines.items()}


def _differences(old: Any, new: Any, name: str = "") -> Iterable[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            path = f"{name}.{key}" if name else key
            yield from _differences(old.get(key), new.get(key), path)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, pair in enumerate(zip(old, new, strict=True)):
            yield from _differences(*pair, f"{name}[{number}]")
    elif old != new:
        yield f"{name}: was {old!r}, is {new!r}"
