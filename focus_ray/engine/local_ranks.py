"""Ranks as processes of this machine, started by this one: no Ray."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

from focus_ray.config import EngineConfig
from focus_ray.engine.rank_process import RankSetup, run_rank
from focus_ray.engine.ranks import RankGroup

LOOPBACK = "127.0.0.1"
# A fresh interpreter and not a fork of this process, which has threads and may have CUDA; not
# multiprocessing's either, which would import the user's script again. -P leaves the working
# directory off the path, -c names no file of a checkout.
COMMAND = ("-P", "-c", "from focus_ray.engine.local_ranks import main; main()")


class LocalRanks(RankGroup):
    """Rank r takes GPU r of this machine, or shares the CPU."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, LOOPBACK)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def _start(self, setup: RankSetup) -> None:
        process = subprocess.Popen(
            [sys.executable, *COMMAND],
            stdin=subprocess.PIPE,
            # of a session of its own: Ctrl-C is for rank 0, which ends the others when it ends
            start_new_session=True,
            env={**os.environ, "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"},
        )
        self._processes[setup.rank] = process
        assert process.stdin is not None
        with process.stdin as stdin:
            pickle.dump(setup, stdin)

    def _gpu_of(self, rank: int) -> int:
        return rank

    def _end_of(self, rank: int) -> str | None:
        status = self._processes[rank].poll()
        if status is None:
            return None
        return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"

    def _kill(self, rank: int) -> None:
        if (process := self._processes.get(rank)) is not None:
            process.kill()
            process.wait()


def main() -> None:
    """The whole life of such a process; its setup comes on the standard input."""
    run_rank(pickle.load(sys.stdin.buffer))
