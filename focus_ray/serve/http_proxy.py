"""Which of Ray Serve's two HTTP proxies stands before the ingress of one machine.

Serve's own is a single Python process. It carries the streams of four engines at a thousand chunks
a second each; of eight it delivers a third, in three times the time. HAProxy, which comes with
``ray[serve]``, carries those of eight with a third of a core (``benchmarks/results``). It also
opens two ports for its own statistics on all interfaces, which is why few engines are served
without it.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

from focus_ray.serve import haproxy

MOST_ENGINES = 4
"""Of which Serve's own proxy carries the streams."""

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
PORTS = {"RAY_SERVE_HAPROXY_STATS_PORT": 8404, "RAY_SERVE_HAPROXY_METRICS_PORT": 9101}
FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": ".",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}


def proxy_settings(
    num_engines: int, folder: Path, environment: Mapping[str, str]
) -> dict[str, str]:
    """What Serve must find in the environment; nothing where its own proxy is enough.

    Args:
        num_engines: that may stream at once.
        folder: for HAProxy's files, of this server alone: Serve would let all servers of a machine
            share one, with a socket that anybody may command it by.
        environment: where the user may have switched it on or off.
    """
    command = haproxy.installed()
    wanted = "1" if num_engines > MOST_ENGINES and command else "0"
    if environment.get(SWITCH, wanted) != "1":
        return {}
    binary = {haproxy.BINARY: command} if command else {}
    ports = {name: str(_free_port(port)) for name, port in PORTS.items()}
    files = {name: str(folder / file) for name, file in FILES.items()}
    return {SWITCH: "1", **binary, **ports, **files}


def _free_port(wanted: int) -> int:
    """The wanted one, or another if somebody has it."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError("no port is free for HAProxy's statistics")
