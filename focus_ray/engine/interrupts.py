"""Ctrl-C between two steps: within one, host and device would lose count of each other."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def between_steps() -> Iterator[Callable[[], None]]:
    """Put off the first SIGINT inside the block until the yielded function is called.

    It is then handled as it would have been; a second one is handled at once, wherever it arrives.
    Off the main thread, where no signal arrives, and where SIGINT has no handler in Python, nothing
    changes.
    """
    handler = signal.getsignal(signal.SIGINT)
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or not callable(handler):
        yield _nothing
        return
    handle = handler
    waiting: list[tuple[int, FrameType | None]] = []

    def put_off(number: int, frame: FrameType | None) -> None:
        if waiting:
            handle(number, frame)
        else:
            waiting.append((number, frame))

    def take() -> None:
        if waiting:
            handle(*waiting.pop())

    signal.signal(signal.SIGINT, put_off)
    try:
        yield take
    finally:
        signal.signal(signal.SIGINT, handler)


def _nothing() -> None:
    pass
