"""A folder at an URL: of this machine, or of an object store that fsspec knows.

Every file appears whole or not at all. Locally that takes a rename after the bytes are on the disk;
object stores make an object visible when its last byte has arrived.
"""

from __future__ import annotations

import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import fsspec  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

# What a write that was cut short may leave behind; never listed.
PARTIAL = ".partial-"
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs"}


class Folder:
    """Files by their names below an URL; names may have parts, as in ``results/000001.jsonl``.

    Args:
        url: a path, or ``s3://bucket/folder`` and the like. It need not exist.

    Raises:
        ValueError: the URL's kind is unknown, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._files, root = opened(url)
        self._root = root.rstrip("/") or "/"
        self._is_local = isinstance(self._files, LocalFileSystem)

    def below(self, name: str) -> Folder:
        """A folder within this one."""
        return Folder(f"{self.url.rstrip('/')}/{self._checked(name)}")

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        return cast(bytes, self._files.cat_file(self._path(name)))

    @contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        """The file, to be read piece by piece; raises FileNotFoundError."""
        with self._files.open(self._path(name), "rb") as file:
            yield file

    def write(self, name: str, data: bytes) -> None:
        """Replace the file as a whole; a reader sees the old one or the new one."""
        with self.writing(name) as file:
            file.write(data)

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """As ``write``, piece by piece; the file appears at the end, and not after an error."""
        path = self._path(name)
        if self._is_local:
            with _local_file(path) as file:
                yield file
            return
        with tempfile.NamedTemporaryFile() as file:
            yield cast(BinaryIO, file)
            file.flush()
            self._files.makedirs(posixpath.dirname(path), exist_ok=True)
            self._files.put_file(file.name, path)

    def exists(self, name: str) -> bool:
        return bool(self._files.exists(self._path(name)))

    def size(self, name: str) -> int:
        """Bytes; raises FileNotFoundError."""
        return int(self._files.info(self._path(name))["size"])

    def names(self, below: str = "") -> list[str]:
        """All files below a name, sorted; whole names, as ``read`` takes them."""
        self._files.invalidate_cache()
        found = self._files.find(self._path(below)) if below else self._files.find(self._root)
        names = (posixpath.relpath(path, self._root) for path in found)
        return sorted(name for name in names if PARTIAL not in name)

    def delete(self, name: str) -> None:
        """Also of a file that is not there."""
        if self.exists(name):
            self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, self._checked(name))

    def _checked(self, name: str) -> str:
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name!r} is not a name below {self.url}")
        return name


def opened(url: str) -> tuple[Any, str]:
    """The file system of an URL, and the path that it has there.

    Raises:
        ValueError: the URL's kind is unknown, or its package is not installed.
    """
    try:
        files, path = fsspec.core.url_to_fs(os.path.expanduser(url))
    except (ImportError, ValueError) as error:
        package = PACKAGES.get(url.split("://")[0])
        remedy = f"pip install {package}" if package else "use a path, s3://, gs:// or abfs://"
        raise ValueError(f"{url!r} cannot be opened ({error}); {remedy}") from None
    return files, path


@contextmanager
def _local_file(path: str) -> Iterator[BinaryIO]:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    partial = os.path.join(folder, f"{PARTIAL}{uuid.uuid4().hex}-{name}")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename, too, survives a power cut
    finally:
        os.close(directory)
