"""The products of a model with its weights, timed by their number of rows.

Weights are read from memory, as in a step, and not from a cache: a recording goes through as many
copies of a weight as no cache holds. All sizes take turns, on a device that is warm, so that none
is measured at a better clock than the others.

Experts are a batched product of so many as the rows touch by chance, the rows spread evenly.
"""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from focus_ray.benchmarks.roofline_layers import Product
from focus_ray.benchmarks.timing import FLUSH_BYTES

ROWS = tuple(
    rows
    for power in range(15)
    for rows in ((1 << power, 3 << (power - 1)) if 4 < power < 14 else (1 << power,))
)
"""1, 2, 4, ... 16384, and the middle between them from 32 on."""

MOST_HEAD_ROWS = 4096
"""Logits of more rows are never held at once."""

ROUNDS = 7
WARM_UP_S = 1.0
MOST_COPIES = 16


@dataclass(frozen=True)
class ProductTimes:
    """Measured seconds of a product.

    Args:
        points: ``(rows, seconds)``, ascending in rows.
    """

    product: Product
    points: tuple[tuple[int, float], ...]

    @property
    def rows_per_s(self) -> float:
        """The best of all sizes."""
        return max(rows / seconds for rows, seconds in self.points)

    @property
    def flops_per_s(self) -> float:
        return self.rows_per_s * self.product.flops_per_row

    def weights_per_s(self, itemsize: int) -> float:
        """Bytes of weight per second with one row, or where that is best."""
        return max(
            self.product.bytes_read(rows, itemsize) / seconds for rows, seconds in self.points
        )

    def seconds(self, rows: float) -> float:
        """At some number of rows, or padded up to more where that is faster.

        Linear between measured sizes, in proportion behind the last.
        """
        best: list[tuple[int, float]] = []
        for size, seconds in reversed(self.points):
            best.append((size, min(seconds, best[-1][1]) if best else seconds))
        best.reverse()
        index = bisect_left(best, rows, key=lambda point: point[0])
        if index == len(best):
            size, seconds = best[-1]
            return seconds * rows / size
        if index == 0:
            return best[0][1]
        (left, left_s), (right, right_s) = best[index - 1 : index + 1]
        return left_s + (right_s - left_s) * (rows - left) / (right - left)


@dataclass(frozen=True)
class _Size:
    product: Product
    rows: int
    run: Callable[[], None]
    num_weights: int


def measure_products(
    products: Sequence[Product],
    device: torch.device,
    dtype: torch.dtype,
    *,
    rows: Sequence[int] = ROWS,
    rounds: int = ROUNDS,
    flush_bytes: int = FLUSH_BYTES,
) -> list[ProductTimes]:
    """Median of every product at every number of rows, with random data."""
    generator = torch.Generator(device).manual_seed(0)
    recorded: list[_Size] = []
    sizes = [(product, size) for product in products for size in _rows(product, rows)]
    room = max(math.prod(_batch(product, size)) * product.inner for product, size in sizes)
    given = torch.randn(room, generator=generator, device=device, dtype=dtype)
    room = max(math.prod(_batch(product, size)) * product.columns for product, size in sizes)
    out = given.new_empty(room)
    for product in products:
        copies = min(MOST_COPIES, -(-flush_bytes // product.weight_bytes(dtype.itemsize)))
        shape = (copies, product.num_weights, product.columns, product.inner)
        weights = torch.empty(shape, device=device, dtype=dtype)
        weights.normal_(0.0, 0.02, generator=generator)
        for size in _rows(product, rows):
            batch = _batch(product, size)
            x_BMK = given[: math.prod(batch) * product.inner].view(*batch, product.inner)
            y_BMN = out[: math.prod(batch) * product.columns].view(*batch, product.columns)
            # Whole sets of so many experts, each of which is read once.
            sets = [one for copy in weights for one in copy.split(batch[0]) if len(one) == batch[0]]
            run = _recorded(x_BMK, sets[:MOST_COPIES], y_BMN)
            recorded.append(_Size(product, size, run, len(sets[:MOST_COPIES])))
    _warm_up(device, recorded)
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for each in recorded:
            seconds = _seconds(each.run, device) / each.num_weights
            times.setdefault((each.product.name, each.rows), []).append(seconds)
    return [
        ProductTimes(
            product,
            tuple((n, statistics.median(times[product.name, n])) for n in _rows(product, rows)),
        )
        for product in products
    ]


def _rows(product: Product, rows: Sequence[int]) -> list[int]:
    most = MOST_HEAD_ROWS if product.name == "head" else max(rows)
    return [size for size in rows if size <= most]


def _batch(product: Product, rows: int) -> tuple[int, int]:
    """How many weights take part, and with how many rows each."""
    num_weights = round(product.weights_read(rows))
    return num_weights, -(-rows * product.num_chosen // num_weights)


def _recorded(x_BMK: Tensor, weights: Sequence[Tensor], y_BMN: Tensor) -> Callable[[], None]:
    """One product with each copy of the weight; a replay of it, on a GPU.

    Whatever it returns keeps the operands alive, which a graph by itself does not.
    """

    def run() -> None:
        for weight_BNK in weights:
            if len(weight_BNK) == 1:
                torch.mm(x_BMK[0], weight_BNK[0].T, out=y_BMN[0])
            else:
                torch.bmm(x_BMK, weight_BNK.mT, out=y_BMN)

    run()
    if x_BMK.device.type == "cpu":
        return run
    torch.cuda.synchronize(x_BMK.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(*, operands: tuple[object, ...] = (x_BMK, weights, y_BMN)) -> None:
        graph.replay()

    return replay


def _warm_up(device: torch.device, sizes: Sequence[_Size]) -> None:
    """Bring the clock to where it stays under load."""
    largest = max(sizes, key=lambda size: size.rows * size.product.flops_per_row)
    until = time.perf_counter() + (WARM_UP_S if device.type == "cuda" else 0.0)
    while True:
        largest.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if time.perf_counter() >= until:
            return


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()  # also keeps the GPU busy until the host has queued what follows
    start.record()
    run()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3
