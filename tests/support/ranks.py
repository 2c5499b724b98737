"""Ranks of a tensor-parallel model as processes of this machine, which run functions of tests.

Starting one costs seconds, so they are started once and asked for as many things as there are.
A function that runs on them stands in any test file; what it takes and returns is pickled, and is
of classes that can be imported.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 200.0
"""A rank that says nothing for so long hangs, most likely in a collective call."""

MOST = 4
"""Ranks that are started."""


class Ranks:
    """So many processes; a function can run on the first few of them, as all ranks of a model."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(shards, *args)`` returns on each of ``size`` ranks.

        Raises:
            RuntimeError: it raised on some rank; quotes what.
        """
        # Its file, since pytest gives modules of tests names that nobody else knows.
        job = pickle.dumps((size, function.__code__.co_filename, function.__name__, args))
        for pipe in self._pipes[:size]:
            pipe.send_bytes(job)
        answers = [_receive(pipe) for pipe in self._pipes[:size]]
        failures = [answer for failed, answer in answers if failed]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [answer for _, answer in answers]


@contextmanager
def started_ranks(folder: Path) -> Iterator[Ranks]:
    """Ranks that are ended in the end.

    Args:
        folder: an empty one, where they find each other.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(MOST):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, theirs, folder), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        for pipe in pipes:
            _receive(pipe)  # it is ready
        yield Ranks(pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def _receive(pipe: Connection) -> Any:
    if not pipe.poll(TIMEOUT_S):
        raise RuntimeError(f"a rank has said nothing for {TIMEOUT_S:g} s")
    return pickle.loads(pipe.recv_bytes())


def _serve(rank: int, pipe: Connection, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    from focus_ray.models.parallel import Shards

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=MOST
    )
    groups = {size: dist.new_group(range(size)) for size in range(2, MOST + 1)}
    pipe.send_bytes(pickle.dumps("ready"))
    while True:
        try:
            size, file, name, args = pickle.loads(pipe.recv_bytes())
        except EOFError:  # whoever started it is gone
            return
        try:
            shards = Shards(rank, size, groups[size])
            answer = (False, getattr(_module(file), name)(shards, *args))
        except Exception:  # told to the test, whatever it is
            answer = (True, f"rank {rank} of {size}: {traceback.format_exc()}")
        pipe.send_bytes(pickle.dumps(answer))


def _module(file: str) -> Any:
    """The module of a file, loaded once."""
    import importlib.util

    name = f"on_ranks:{file}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
