"""Uploaded and produced files, each with a description, in a folder."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict

from focus_ray.batch.storage import Folder
from focus_ray.openai.error_kinds import NoSuchObject

_ID = re.compile(r"file-[0-9a-f]{24}")


class StoredFile(BaseModel):
    """What is known of a file.

    Args:
        owner: hash of the key that brought it; None where there are no keys.
        size: bytes.
        created: seconds since the epoch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    filename: str
    purpose: str
    owner: str | None
    size: int
    created: int


class FileStore:
    """All files of a server, in ``files/`` of its folder."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def add(
        self,
        write: Callable[[BinaryIO], object],
        filename: str,
        purpose: str,
        owner: str | None,
        *,
        made_for: str | None = None,
    ) -> StoredFile:
        """Keep what ``write`` writes; it is there as a whole or not at all.

        Args:
            made_for: names the file, so that who makes it again, after a kill, replaces it.
        """
        name = secrets.token_hex(12) if made_for is None else _digest(made_for)
        file_id = f"file-{name}"
        with self._folder.writing(_content(file_id)) as content:
            write(content)
        file = StoredFile(
            id=file_id,
            filename=filename,
            purpose=purpose,
            owner=owner,
            size=self._folder.size(_content(file_id)),
            created=int(time.time()),
        )
        self._folder.write(_about(file_id), file.model_dump_json().encode())
        return file

    def get(self, file_id: str, owner: str | None) -> StoredFile:
        """Raises NoSuchObject, also of files of others."""
        if _ID.fullmatch(file_id):
            try:
                file = StoredFile.model_validate_json(self._folder.read(_about(file_id)))
            except FileNotFoundError:
                pass
            else:
                if file.owner == owner:
                    return file
        raise NoSuchObject("file", file_id)

    def list(self, owner: str | None) -> list[StoredFile]:
        """All files of an owner, the newest first."""
        names = [name for name in self._folder.names("files") if name.endswith("/about.json")]
        mine = []
        for name in names:
            with suppress(FileNotFoundError):  # deleted meanwhile
                file = StoredFile.model_validate_json(self._folder.read(name))
                if file.owner == owner:
                    mine.append(file)
        return sorted(mine, key=lambda file: (file.created, file.id), reverse=True)

    @contextmanager
    def reading(self, file_id: str) -> Iterator[BinaryIO]:
        """The content of a file that was found."""
        with self._folder.reading(_content(file_id)) as file:
            yield file

    def delete(self, file_id: str, owner: str | None) -> None:
        """Raises NoSuchObject."""
        self.get(file_id, owner)
        self._folder.delete(_about(file_id))
        self._folder.delete(_content(file_id))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _about(file_id: str) -> str:
    return f"files/{file_id}/about.json"


def _content(file_id: str) -> str:
    return f"files/{file_id}/content"
