"""What is written of a line: the OpenAI Batch API's output line, and where the line stood.

https://platform.openai.com/docs/api-reference/batch/request-output
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from focus_ray.openai.error_kinds import body_of, kind_of
from focus_ray.openai.replies import Reply


@dataclass(frozen=True)
class Source:
    """Where a line stands: a file of the input, and its number there, from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Record:
    """The outcome of one line.

    Args:
        text: one line of JSON, without its end.
        is_error: it belongs among the errors.
        counts: tokens and steps that it took, by the names of ``usage``.
    """

    text: str
    is_error: bool
    counts: Mapping[str, int] = field(default_factory=dict)


def request_key(job: str, source: Source) -> str:
    """A name for the work on a line; the same however often the line is run."""
    return hashlib.sha256(f"{job}\0{source}".encode()).hexdigest()[:24]


def result_record(
    key: str, custom_id: str, reply: Reply, counts: Mapping[str, int], source: Source | None
) -> Record:
    """Of a line that was answered."""
    return Record(_line(key, custom_id, 200, reply.to_json(), source), False, counts)


def error_record(key: str, custom_id: str, error: Exception, source: Source | None) -> Record:
    """Of a line that was refused, or that went wrong: the error as the HTTP endpoint tells it."""
    body = json.dumps(body_of(error).model_dump())
    return Record(_line(key, custom_id, kind_of(error).status, body, source), True)


def unrun_record(key: str, custom_id: str, code: str, message: str) -> Record:
    """Of a line that was never run: its batch ended before."""
    error = json.dumps({"code": code, "message": message})
    return Record(f'{{{_head(key, custom_id)}, "response": null, "error": {error}}}', True)


def _line(key: str, custom_id: str, status: int, body: str, source: Source | None) -> str:
    response = f'{{"status_code": {status}, "request_id": "{key}", "body": {body}}}'
    where = ""
    if source is not None:
        where = f', "source": {json.dumps({"file": source.file, "line": source.line})}'
    return f'{{{_head(key, custom_id)}, "response": {response}, "error": null{where}}}'


def _head(key: str, custom_id: str) -> str:
    return f'"id": "batch_req_{key}", "custom_id": {json.dumps(custom_id)}'
