"""Settings of Ray Serve with which streaming costs a third of the CPU time that it does by default.

Serve reads them from the environment of its processes when they start: one event loop in each, and
chunks that come by gRPC rather than as Ray objects (``benchmarks/http_overhead.py`` measures them).
Serve's own switch for all of these has more to it.
"""

from __future__ import annotations

from collections.abc import Mapping

REPLICA_SETTINGS = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""Of our own processes: the application brings them along to whatever cluster it comes to."""

PROXY_SETTINGS = {
    "RAY_SERVE_PROXY_USE_GRPC": "1",  # HAProxy has no use for it
    # On a busy machine HAProxy and what watches it take longer than Serve's 5 s, and are killed.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""Of Serve's proxies, which find them where Ray starts."""


def replica_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Those that this environment leaves open, for processes that inherit the rest."""
    return {name: value for name, value in REPLICA_SETTINGS.items() if name not in environment}
