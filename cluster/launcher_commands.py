"""The commands of Ray's cluster launcher that bring a cluster up, show it and take it down.

Two things that the launcher of Ray 2.60 leaves out where machines are listed by address are done
here. Pure: words of commands, for who runs them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

Command = list[str]

REMOTE_SERVE_FILE = "~/focus-ray-serve.yaml"


def up_commands(
    config: Mapping[str, Any], file: str, serve_file: str | None, *, yes: bool
) -> Iterator[Command]:
    """Start it, and deploy a configuration of Ray Serve if there is one.

    Args:
        config: what the launcher file holds.
        yes: do not ask.
    """
    up = ["ray", "up", *(["--yes"] if yes else []), file]
    # All machines being of one type, the second autoscaler counts the head as one of the workers,
    # and starts one too few. The first one starts all.
    yield ["env", "RAY_UP_enable_autoscaler_v2=0", *up] if _is_local(config) else up
    if serve_file is not None:
        yield ["ray", "rsync-up", file, serve_file, REMOTE_SERVE_FILE]
        yield ["ray", "exec", file, f"serve deploy {REMOTE_SERVE_FILE}"]


def status_commands(file: str) -> Iterator[Command]:
    """Machines and what is free on them, then what runs."""
    yield ["ray", "exec", file, "ray status && serve status"]


def down_commands(config: Mapping[str, Any], file: str) -> Iterator[Command]:
    """Stop it, without asking."""
    if _is_local(config) and config["provider"]["worker_ips"]:
        # ray down stops Ray on the head alone. Workers then end by themselves, a minute later and
        # but for a process that watches their logs. The head first: its autoscaler would start
        # them again.
        yield ["ray", "exec", file, "; ".join(["ray stop", *_worker_stops(config)])]
    yield ["ray", "down", "--yes", file]


def _is_local(config: Mapping[str, Any]) -> bool:
    return bool(config["provider"]["type"] == "local")


def _worker_stops(config: Mapping[str, Any]) -> Iterator[str]:
    """Run on the head, which reaches the workers as the autoscaler does."""
    auth = config.get("auth") or {}
    key = "-i ray_bootstrap_key.pem " if auth.get("ssh_private_key") else ""
    user = f"{auth['ssh_user']}@" if "ssh_user" in auth else ""
    for address in config["provider"]["worker_ips"]:
        target = shlex.quote(f"{user}{address}")
        stop = "\"bash --login -i -c 'source ~/.bashrc; ray stop'\""
        yield f"ssh -tt -o StrictHostKeyChecking=no {key}{target} {stop}"
