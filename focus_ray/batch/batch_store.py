"""Batches of the OpenAI Batch API in a folder: what was asked, how far it is, whether to stop.

Each of the three is a file of its own with one writer: whoever takes the request writes the first
and the last, whoever runs the batch the second.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from focus_ray.batch.storage import Folder
from focus_ray.openai.error_kinds import NoSuchObject
from focus_ray.openai.replies import BatchErrorEntry

Status = Literal[
    "validating",
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "cancelled",
    "expired",
]
ENDED: frozenset[Status] = frozenset({"completed", "failed", "cancelled", "expired"})
logger = logging.getLogger(__name__)

_ID = re.compile(r"batch_[0-9a-f]{24}")


class AskedBatch(BaseModel):
    """What a client asked for. Times are seconds since the epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    owner: str | None
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None
    created: int
    expires: int


class BatchState(BaseModel):
    """How far it is; ``times`` says when it came to each status."""

    model_config = ConfigDict(extra="forbid")

    status: Status = "validating"
    times: dict[str, int] = {}
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: list[BatchErrorEntry] = []

    def enter(self, status: Status) -> None:
        """The next status, from now on."""
        self.status = status
        self.times[status] = int(time.time())


class BatchStore:
    """All batches of a server, in ``batches/`` of its folder."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def add(
        self,
        input_file_id: str,
        endpoint: str,
        window: str,
        window_s: int,
        metadata: dict[str, str] | None,
        owner: str | None,
    ) -> AskedBatch:
        now = int(time.time())
        asked = AskedBatch(
            id=f"batch_{secrets.token_hex(12)}",
            owner=owner,
            input_file_id=input_file_id,
            endpoint=endpoint,
            completion_window=window,
            metadata=metadata,
            created=now,
            expires=now + window_s,
        )
        self.folder.write(f"batches/{asked.id}/asked.json", asked.model_dump_json().encode())
        return asked

    def get(self, batch_id: str, owner: str | None) -> AskedBatch:
        """Raises NoSuchObject, also of batches of others."""
        if _ID.fullmatch(batch_id):
            try:
                asked = self._asked(f"batches/{batch_id}/asked.json")
            except FileNotFoundError:
                pass
            else:
                if asked.owner == owner:
                    return asked
        raise NoSuchObject("batch", batch_id)

    def all(self, known: Mapping[str, AskedBatch]) -> list[AskedBatch]:
        """Batches of everybody, the oldest first.

        Args:
            known: by their ids, those that need not be read again: they never change.
        """
        names = [name for name in self.folder.names("batches") if name.endswith("/asked.json")]
        found = []
        for name in names:
            try:
                found.append(known.get(name.split("/")[1]) or self._asked(name))
            except ValueError:  # not of ours, or of another version
                logger.warning("%s/%s is no batch", self.folder.url, name)
        return sorted(found, key=lambda asked: (asked.created, asked.id))

    def list(self, owner: str | None) -> list[AskedBatch]:
        """Those of an owner, the newest first."""
        return [asked for asked in reversed(self.all({})) if asked.owner == owner]

    def state(self, batch_id: str) -> BatchState:
        """As its runner wrote it last, or as it begins."""
        try:
            return BatchState.model_validate_json(self.folder.read(_state(batch_id)))
        except FileNotFoundError:
            return BatchState()

    def save(self, batch_id: str, state: BatchState) -> None:
        self.folder.write(_state(batch_id), state.model_dump_json().encode())

    def ask_to_cancel(self, batch_id: str) -> None:
        """Its runner sees it soon."""
        if not self.folder.exists(_cancel(batch_id)):
            self.folder.write(_cancel(batch_id), str(int(time.time())).encode())

    def cancelled_at(self, batch_id: str) -> int | None:
        """When a client asked for the end, if one did."""
        try:
            return int(self.folder.read(_cancel(batch_id)))
        except FileNotFoundError:
            return None

    def records(self, batch_id: str) -> Folder:
        """Where the ledger of a batch is kept."""
        return self.folder.below(f"batches/{batch_id}/records")

    def forget_records(self, batch_id: str) -> None:
        """When a batch has ended and its files are made."""
        records = self.records(batch_id)
        for name in records.names():
            records.delete(name)

    def _asked(self, name: str) -> AskedBatch:
        return AskedBatch.model_validate_json(self.folder.read(name))


def _state(batch_id: str) -> str:
    return f"batches/{batch_id}/state.json"


def _cancel(batch_id: str) -> str:
    return f"batches/{batch_id}/cancel"
