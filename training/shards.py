"""The pool of packed rows that batches are drawn from, filled by worker processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from packing import ROW_ARRAYS
from torch import Tensor

GROUP_ROWS = 4
"""Rows that stay together when batches are drawn."""
MAX_WAITING_ROWS = 25_600
"""Rows waiting on the device, at about 21 kB each, beyond which none are loaded."""

Batch = dict[str, Tensor]


class ShardPool:
    """Rows on the device, drawn at random without repetition; old ones again only when starved."""

    def __init__(
        self,
        folder: Path,
        tokenizer_file: Path,
        text_folder: Path,
        text_percent: int,
        num_workers: int,
        seed: int,
        device: torch.device,
        shard_rows: int = 64,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.npz"):
            old.unlink()
        self.folder, self.device, self.shard_rows = folder, device, shard_rows
        self.shards: list[Batch] = []
        self.fresh: list[tuple[int, int]] = []
        self.rows_drawn = self.rows_repeated = 0
        self._rng = np.random.default_rng(seed)
        self._stopping = threading.Event()
        script = Path(__file__).with_name("make_shards.py")
        command = [sys.executable, str(script), "--out", str(folder), "--seed", str(seed)]
        command += ["--tokenizer", str(tokenizer_file), "--text", str(text_folder)]
        command += ["--text-percent", str(text_percent), "--rows", str(shard_rows)]
        # one thread each: the workers themselves are the parallelism
        single = {
            "RAYON_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._workers = [
            subprocess.Popen(
                [*command, "--worker", str(worker), "--workers", str(num_workers)],
                env=os.environ | single,
            )
            for worker in range(num_workers)
        ]
        self._loader = threading.Thread(target=self._load, daemon=True)
        self._loader.start()

    def _load(self) -> None:
        """Move finished shards to the device; the files are removed."""
        while not self._stopping.wait(0.05):
            for path in self.folder.glob("shard-*.npz"):
                if len(self.fresh) * GROUP_ROWS > MAX_WAITING_ROWS or self._stopping.is_set():
                    break
                try:
                    with np.load(path) as arrays:
                        shard = {
                            name: torch.from_numpy(arrays[name]).to(self.device)
                            for name in ROW_ARRAYS
                        }
                except (OSError, zipfile.BadZipFile) as error:
                    print(f"shard {path.name} left out: {error}", flush=True)
                    continue
                finally:
                    path.unlink(missing_ok=True)
                self.shards.append(shard)
                index = len(self.shards) - 1
                self.fresh += [(index, row) for row in range(0, self.shard_rows, GROUP_ROWS)]

    def batch(self, num_rows: int) -> Batch:
        """``num_rows`` rows, a multiple of GROUP_ROWS; waits only where no row was made yet.

        Raises:
            RuntimeError: all workers have ended and there is no row.
        """
        groups = num_rows // GROUP_ROWS
        while len(self.fresh) < groups and (self.rows_drawn == 0 or not self.shards):
            if all(process.poll() is not None for process in self._workers):
                raise RuntimeError("no shard was made: every worker process has ended")
            time.sleep(0.05)
        chosen = []
        for _ in range(groups):
            if self.fresh:
                at = int(self._rng.integers(len(self.fresh)))
                self.fresh[at], self.fresh[-1] = self.fresh[-1], self.fresh[at]
                chosen.append(self.fresh.pop())
            else:
                shard = int(self._rng.integers(len(self.shards)))
                row = int(self._rng.integers(self.shard_rows // GROUP_ROWS)) * GROUP_ROWS
                chosen.append((shard, row))
                self.rows_repeated += GROUP_ROWS
        self.rows_drawn += num_rows
        return {
            name: torch.cat(
                [self.shards[shard][name][row : row + GROUP_ROWS] for shard, row in chosen]
            )
            for name in ROW_ARRAYS
        }

    def close(self) -> None:
        """End the workers and the loader."""
        self._stopping.set()
        for process in self._workers:
            process.terminate()
        for process in self._workers:
            process.wait()
        self._loader.join(5)
