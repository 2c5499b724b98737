"""The products of a model with its weights, timed by their number of rows.

Weights are read from memory, as in a step, and not from a cache: a recording goes through as many
copies of a weight as no cache holds. All sizes take turns, on a device that is warm, so that none
is measured at a better clock than the others.
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from focus_ray.benchmarks.timing import FLUSH_BYTES
from focus_ray.models.sdar import SdarConfig

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
class Product:
    """``[rows, inner] @ [inner, columns]``; ``columns`` are the weight's rows, as in a linear."""

    name: str
    inner: int
    columns: int

    @property
    def flops_per_row(self) -> int:
        return 2 * self.inner * self.columns

    def weight_bytes(self, itemsize: int) -> int:
        return self.inner * self.columns * itemsize


def products_of(config: SdarConfig) -> list[Product]:
    """Four of every layer, with projections of equal inputs fused, and the head."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    width, inner = config.hidden_size, config.intermediate_size
    return [
        Product("qkv", width, queries + 2 * keys),
        Product("o", queries, width),
        Product("gate_up", width, 2 * inner),
        Product("down", inner, width),
        Product("head", width, config.vocab_size),
    ]


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
        fastest = min(seconds for _, seconds in self.points)
        return self.product.weight_bytes(itemsize) / fastest

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
    weights: Tensor


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
    room = max(max(rows) * max(p.inner for p in products), 1)
    given = torch.randn(room, generator=generator, device=device).to(dtype)
    out = given.new_empty(max(size * p.columns for p in products for size in _rows(p, rows)))
    for product in products:
        copies = -(-flush_bytes // product.weight_bytes(dtype.itemsize))
        shape = (min(MOST_COPIES, copies), product.columns, product.inner)
        weights = torch.randn(shape, generator=generator, device=device, dtype=dtype) * 0.02
        for size in _rows(product, rows):
            x_MK = given[: size * product.inner].view(size, product.inner)
            y_MN = out[: size * product.columns].view(size, product.columns)
            run = _recorded(x_MK, weights, y_MN)
            recorded.append(_Size(product, size, run, weights))
    _warm_up(device, recorded)
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for each in recorded:
            seconds = _seconds(each.run, device) / len(each.weights)
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


def _recorded(x_MK: Tensor, weights: Tensor, y_MN: Tensor) -> Callable[[], None]:
    """One product with each copy of the weight; a replay of it, on a GPU."""

    def run() -> None:
        for weight_NK in weights:
            torch.mm(x_MK, weight_NK.T, out=y_MN)

    run()
    if x_MK.device.type == "cpu":
        return run
    torch.cuda.synchronize(x_MK.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


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
