"""A private Ray on this machine, for one command's lifetime."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from focus_ray.errors import FocusRayError

# Ray's sockets lie some 70 characters below its folder, and a socket's path ends at 107.
MAX_TEMP_DIR_CHARS = 40
SIGNAL_PERIOD_S = 0.1


class StartFailed(FocusRayError):
    """What a command needs did not start; the message holds the reason and nothing else."""


@contextlib.contextmanager
def local_ray(
    *,
    object_store_bytes: int,
    environment: Mapping[str, str],
    dashboard: bool = False,
    temp_dir: Path | None = None,
) -> Iterator[None]:
    """Start Ray, and stop it at the end.

    Args:
        environment: what Ray must find there, unless the user says otherwise.
        temp_dir: Ray's folder for logs and sockets; None: one that is deleted at the end.

    Raises:
        StartFailed: on entering.
    """
    with contextlib.ExitStack() as cleanup:
        temp_dir = temp_dir or cleanup.enter_context(_short_temp_dir())
        temp_dir.mkdir(parents=True, exist_ok=True)
        if "ray" not in sys.modules:  # it reads some of these when it is imported
            for name, value in {**private(), **environment}.items():
                os.environ.setdefault(name, value)
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        # Ray's processes die with the thread that starts them, so this one lives to the end. It is
        # not the main one, because half a start cannot be undone: a signal that interrupts us here
        # finds the other half waited for.
        starter = cleanup.enter_context(ThreadPoolExecutor(1))
        cleanup.callback(ray.shutdown)
        with away_from_the_checkout(temp_dir):
            start = starter.submit(
                ray.init,
                address="local",
                include_dashboard=dashboard,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=object_store_bytes,
                _temp_dir=str(temp_dir),
            )
            cleanup.callback(wait, [start])
            while not start.done():
                wait([start], timeout=SIGNAL_PERIOD_S)
                _take_back_sigterm()
            try:
                start.result()
            except (
                Exception
            ) as error:  # whatever keeps Ray from starting, its words are all there is
                raise StartFailed(f"Ray did not start: {error}") from error
        yield


def private() -> dict[str, str]:
    """For a Ray that belongs to one command.

    A token of this run's own keeps other users of the machine from running code through Ray's
    ports, and leaves no file in the home folder.
    """
    return {
        "RAY_worker_niceness": "0",  # engines are not background work
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def away_from_the_checkout(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Where a driver must be when it connects.

    Ray puts the driver's folder at the front of every worker's path. In a checkout of this project
    that would hide the package ``kernels`` which transformers looks for.
    """
    chdir: Callable[[Path], contextlib.AbstractContextManager[None]] = contextlib.chdir
    return chdir(folder)


def _take_back_sigterm() -> None:
    """Ray's core puts a handler of its own, which aborts the process, in the program's place."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


@contextlib.contextmanager
def _short_temp_dir() -> Iterator[Path]:
    base = tempfile.gettempdir()
    folder = tempfile.mkdtemp(
        prefix="focus-ray-", dir=base if len(base) <= MAX_TEMP_DIR_CHARS else "/tmp"
    )
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
