"""One Ray with one Serve for all tests that need them; they bring and delete their applications."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from focus_ray.cluster.local_ray import StartFailed, local_ray
from focus_ray.openai.text_engine import EngineFactory
from focus_ray.serve.args import ServeArgs
from focus_ray.serve.local import LocalServer, start_serve

HOST = "127.0.0.1"


class ServerOnRay(LocalServer):
    """``LocalServer`` in a Ray that is there already, and stays."""

    def __enter__(self) -> Self:
        try:
            self._start_application()
        except StartFailed:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from ray import serve

        from focus_ray.serve.app import APP_NAME

        serve.delete(APP_NAME)


@dataclass(frozen=True)
class SharedRay:
    """Where it is: its folder with logs, and the port of Serve's proxy."""

    folder: Path
    port: int

    def server(self, args: ServeArgs, engine_factory: EngineFactory | None = None) -> ServerOnRay:
        """A context manager: this application, at ``url``."""
        return ServerOnRay(args, HOST, self.port, engine_factory=engine_factory)


@contextmanager
def shared_ray() -> Iterator[SharedRay]:
    folder = Path(tempfile.mkdtemp(prefix="fr-", dir="/tmp"))  # Ray's sockets need a short path
    try:
        with local_ray(object_store_bytes=128 << 20, environment={}, temp_dir=folder):
            port = free_port()
            start_serve(HOST, port)
            yield SharedRay(folder, port)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Of this machine, a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
