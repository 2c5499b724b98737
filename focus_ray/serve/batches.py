"""The routes of the Files API and the Batch API, as far as batches need them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Annotated, TypeVar

from fastapi import Query, Request, Response
from starlette.datastructures import UploadFile
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive

from focus_ray.batch.batch_store import ENDED, AskedBatch, BatchStore
from focus_ray.batch.file_store import FileStore, StoredFile
from focus_ray.batch.storage import Folder
from focus_ray.errors import RequestRejected
from focus_ray.openai.error_kinds import BodyTooLarge
from focus_ray.openai.protocol import BatchCreateRequest
from focus_ray.openai.replies import (
    BatchCounts,
    BatchErrors,
    BatchList,
    BatchReply,
    FileDeleted,
    FileList,
    FileReply,
)
from focus_ray.serve.bodies import read_body

WINDOW_S = 24 * 3600
COPY_BYTES = 1 << 20
FIELD_BYTES = 1 << 16  # what multipart adds around a file
MAX_FILENAME_CHARS = 255

Item = TypeVar("Item", StoredFile, AskedBatch)
After = Annotated[str | None, Query(description="The id behind which the list goes on.")]
Limit = Annotated[int, Query(ge=1, le=10_000, description="Most entries.")]


class BatchRoutes:
    """Route handlers over a folder that all ingresses share.

    Args:
        owner_of: names the owner of what a request brings or asks for.
        max_file_bytes: longest upload.
        max_body_bytes: longest other body.
    """

    def __init__(
        self,
        folder: Folder,
        owner_of: Callable[[Request], str | None],
        max_file_bytes: int,
        max_body_bytes: int,
    ) -> None:
        self._files = FileStore(folder)
        self._batches = BatchStore(folder)
        self._owner_of = owner_of
        self._max_file_bytes = max_file_bytes
        self._max_body_bytes = max_body_bytes

    async def upload(self, request: Request) -> FileReply:
        """Keep a file; ``purpose`` must be batch."""
        limited = Request(request.scope, _within(request, self._max_file_bytes + FIELD_BYTES))
        async with limited.form(max_files=1, max_fields=8) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if purpose != "batch":
                raise RequestRejected(f"purpose: must be 'batch', got {purpose!r}", "purpose")
            if not isinstance(file, UploadFile):
                raise RequestRejected(
                    "file: send a file as multipart/form-data, with purpose=batch", "file"
                )
            if unknown := set(form.keys()) - {"file", "purpose"}:
                name = min(unknown)
                raise RequestRejected(
                    f"Unsupported parameter: {name!r}; files are kept until they are deleted", name
                )
            if (file.size or 0) > self._max_file_bytes:
                raise _too_large(self._max_file_bytes)
            filename = (file.filename or "upload.jsonl")[-MAX_FILENAME_CHARS:]
            owner = self._owner_of(request)
            copy = partial(shutil.copyfileobj, file.file)
            return _file(await asyncio.to_thread(self._files.add, copy, filename, "batch", owner))

    async def files(
        self,
        request: Request,
        after: After = None,
        limit: Limit = 10_000,
        order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
        purpose: str | None = None,
    ) -> FileList:
        """All files, the newest first."""
        found = await asyncio.to_thread(self._files.list, self._owner_of(request))
        found = [file for file in found if purpose in (None, file.purpose)]
        page, has_more = _page(found if order == "desc" else found[::-1], after, limit)
        first, last = _ends(page)
        data = [_file(file) for file in page]
        return FileList(object="list", data=data, first_id=first, last_id=last, has_more=has_more)

    async def file(self, request: Request, file_id: str) -> FileReply:
        """What is known of a file."""
        return _file(await self._found(request, file_id))

    async def content(self, request: Request, file_id: str) -> Response:
        """The file itself."""
        file = await self._found(request, file_id)
        return StreamingResponse(
            self._pieces(file.id),
            media_type="application/octet-stream",
            headers={"Content-Length": str(file.size)},
        )

    async def delete(self, request: Request, file_id: str) -> FileDeleted:
        """Forget a file that no unfinished batch needs."""
        file = await self._found(request, file_id)
        for asked in await asyncio.to_thread(self._batches.list, file.owner):
            state = await asyncio.to_thread(self._batches.state, asked.id)
            if asked.input_file_id == file.id and state.status not in ENDED:
                raise RequestRejected(
                    f"file_id: {file_id!r} is the input of {asked.id!r}, which is "
                    f"{state.status}; cancel it first",
                    "file_id",
                )
        await asyncio.to_thread(self._files.delete, file.id, file.owner)
        return FileDeleted(id=file_id, object="file", deleted=True)

    async def create(self, request: Request) -> BatchReply:
        """Ask for a batch; it is checked and run by and by."""
        body = await read_body(request, BatchCreateRequest, self._max_body_bytes)
        file = await self._found(request, body.input_file_id)
        asked = await asyncio.to_thread(
            self._batches.add,
            file.id,
            body.endpoint,
            body.completion_window,
            WINDOW_S,
            body.metadata,
            file.owner,
        )
        return await asyncio.to_thread(self._batch, asked)

    async def batch(self, request: Request, batch_id: str) -> BatchReply:
        """How far a batch is."""
        owner = self._owner_of(request)
        asked = await asyncio.to_thread(self._batches.get, batch_id, owner)
        return await asyncio.to_thread(self._batch, asked)

    async def batches(self, request: Request, after: After = None, limit: Limit = 20) -> BatchList:
        """All batches, the newest first."""
        found = await asyncio.to_thread(self._batches.list, self._owner_of(request))
        page, has_more = _page(found, after, limit)
        data = await asyncio.to_thread(lambda: [self._batch(asked) for asked in page])
        first, last = _ends(page)
        return BatchList(object="list", data=data, first_id=first, last_id=last, has_more=has_more)

    async def cancel(self, request: Request, batch_id: str) -> BatchReply:
        """End a batch; what it has done stays."""
        owner = self._owner_of(request)
        asked = await asyncio.to_thread(self._batches.get, batch_id, owner)
        state = await asyncio.to_thread(self._batches.state, asked.id)
        if state.status in ENDED and state.status != "cancelled":
            raise RequestRejected(f"batch_id: {batch_id!r} is {state.status} already", "batch_id")
        await asyncio.to_thread(self._batches.ask_to_cancel, asked.id)
        return await asyncio.to_thread(self._batch, asked)

    async def _found(self, request: Request, file_id: str) -> StoredFile:
        return await asyncio.to_thread(self._files.get, file_id, self._owner_of(request))

    def _pieces(self, file_id: str) -> Iterator[bytes]:
        with self._files.reading(file_id) as file, closing(file):
            while piece := file.read(COPY_BYTES):
                yield piece

    def _batch(self, asked: AskedBatch) -> BatchReply:
        state = self._batches.state(asked.id)
        cancelling = self._batches.cancelled_at(asked.id)
        status: str = state.status
        if cancelling is not None and status not in ENDED:
            status = "cancelling"
        return BatchReply(
            id=asked.id,
            object="batch",
            endpoint=asked.endpoint,
            errors=BatchErrors(object="list", data=state.errors) if state.errors else None,
            input_file_id=asked.input_file_id,
            completion_window=asked.completion_window,
            status=status,
            output_file_id=state.output_file_id,
            error_file_id=state.error_file_id,
            created_at=asked.created,
            in_progress_at=state.times.get("in_progress"),
            expires_at=asked.expires,
            finalizing_at=state.times.get("finalizing"),
            completed_at=state.times.get("completed"),
            failed_at=state.times.get("failed"),
            expired_at=state.times.get("expired"),
            cancelling_at=cancelling,
            cancelled_at=state.times.get("cancelled"),
            request_counts=BatchCounts(
                total=state.total, completed=state.completed, failed=state.failed
            ),
            metadata=asked.metadata,
        )


def _file(file: StoredFile) -> FileReply:
    return FileReply(
        id=file.id,
        object="file",
        bytes=file.size,
        created_at=file.created,
        filename=file.filename,
        purpose=file.purpose,
        status="processed",
    )


def _page(items: list[Item], after: str | None, limit: int) -> tuple[list[Item], bool]:
    if after is not None:
        ids = [item.id for item in items]
        if after not in ids:
            raise RequestRejected(f"after: {after!r} is no entry of this list", "after")
        items = items[ids.index(after) + 1 :]
    return items[:limit], len(items) > limit


def _ends(page: Sequence[Item]) -> tuple[str | None, str | None]:
    return (page[0].id, page[-1].id) if page else (None, None)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"file: has more than {max_bytes} bytes; split it, or raise max_batch_file_bytes"
    )


def _within(request: Request, max_bytes: int) -> Receive:
    """Receive a body as long as it is not too long."""
    length = 0

    async def receive() -> Message:
        nonlocal length
        message = await request.receive()
        length += len(message.get("body", b""))
        if length > max_bytes:
            raise _too_large(max_bytes - FIELD_BYTES)
        return message

    return receive
