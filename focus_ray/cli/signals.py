"""Stop requests from outside, as one exception."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def until_stopped() -> Iterator[None]:
    """Run a block; Ctrl-C, SIGTERM or SIGHUP ends it early and quietly.

    The first signal raises KeyboardInterrupt inside the block. Those that an impatient user sends
    after it do nothing, so that the block's clean-up leaves nothing behind. They are not ignored in
    the sense of SIG_IGN, which processes started from here would inherit.
    """
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            raise KeyboardInterrupt

    before = {each: signal.signal(each, stop) for each in STOP_SIGNALS}
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
