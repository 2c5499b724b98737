"""How fast are products of few tokens, by the way they are cut; and a whole step made of them?

    python benchmarks/linear_tuning.py --json linear.json

Needs a Hopper GPU. Each product of SDAR-8B at a few numbers of tokens: cuBLAS and candidates of
the kernel behind ``linear``, replayed from CUDA graphs over copies of the weight that together
exceed the cache. ``few_token_step.py`` asks what a whole step makes of them.

T tokens, O output size, D inner size.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.benchmarks.report_file import write_json
from focus_ray.kernels.linear_kernels import LinearTile, launch_linear
from focus_ray.kernels.swiglu import swiglu

DTYPE = torch.bfloat16
NUM_LAYERS = 36
ROTATED_BYTES = 400 << 20  # eight times the cache of an H100
COMPILERS = 12
REPLAYS = 4


@dataclass(frozen=True)
class Product:
    """One product of a layer, or the head's."""

    name: str
    out_size: int
    inner: int
    gated: bool = False

    @property
    def weight_bytes(self) -> int:
        return self.out_size * self.inner * DTYPE.itemsize


LAYER = (
    Product("qkv", 6144, 4096),
    Product("o", 4096, 4096),
    Product("gate_up", 24576, 4096, gated=True),
    Product("down", 4096, 12288),
)
HEAD = Product("head", 151936, 4096)
PRODUCTS = (*LAYER, HEAD)
TOKENS = (1, 8, 16, 32, 64, 128)

# block_o, block_d, num_warps, num_stages, num_held, by the tokens of a tile.
CUTS: dict[int, tuple[tuple[int, int, int, int, int], ...]] = {
    16: (
        (64, 128, 4, 3, 0),
        (64, 128, 4, 3, 2),
        (64, 128, 4, 4, 0),
        (64, 128, 4, 4, 2),
        (64, 128, 4, 6, 2),
        (64, 256, 4, 3, 0),
        (128, 128, 4, 3, 0),
        (32, 256, 4, 3, 1),
        (16, 256, 4, 5, 0),
    ),
    32: (
        (64, 128, 4, 3, 0),
        (64, 128, 4, 3, 2),
        (64, 128, 4, 5, 2),
        (64, 128, 4, 6, 2),
        (128, 128, 4, 3, 0),
        (32, 256, 4, 3, 1),
    ),
    64: (
        (64, 128, 4, 3, 0),
        (64, 128, 4, 3, 1),
        (64, 128, 4, 4, 1),
        (64, 64, 4, 5, 0),
        (128, 128, 8, 3, 0),
        (128, 128, 4, 4, 0),
    ),
    128: ((128, 64, 8, 4, 0), (128, 128, 8, 3, 0), (64, 128, 4, 4, 0)),
}
PROGRAMS_WANTED = (90, 128, 192, 250, 380)


def candidates(product: Product, block_t: int) -> list[LinearTile]:
    """Every cut with the splits that give from less than one to three programs a multiprocessor."""
    found: list[LinearTile] = []
    for block_o, block_d, num_warps, num_stages, num_held in CUTS[block_t]:
        num_tiles, num_passes = -(-product.out_size // block_o), product.inner // block_d
        shares = [n for n in range(1, 25) if num_passes % n == 0 and num_passes // n > num_held]
        splits = {
            next((n for n in shares if n * num_tiles >= wanted), shares[-1])
            for wanted in PROGRAMS_WANTED
        }
        found += (
            LinearTile(block_o, block_d, n, num_warps, num_stages, num_held) for n in sorted(splits)
        )
    return found


def compile_tile(inner: int, gated: bool, block_t: int, tile: LinearTile) -> str | None:
    """Run the tile once in another process, which leaves it in Triton's cache; why it cannot."""
    x_TD = torch.ones(block_t, inner, dtype=DTYPE, device="cuda")
    weight_OD = torch.ones(256, inner, dtype=DTYPE, device="cuda")
    try:
        launch_linear(x_TD, weight_OD, tile, gated=gated)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return None


def seconds(run: Callable[[], object], calls: int, repeats: int = 7) -> float:
    """Median time of one of ``calls`` calls that ``run`` makes, replayed from a graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times: list[float] = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):  # one after the other, so that launching the graph is hidden
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / REPLAYS)
    return statistics.median(times[2:]) / calls


def bandwidths() -> tuple[float, float]:
    """Bytes per second of a large copy (reads and writes counted) and of reading alone."""
    source = torch.randint(0, 255, (1 << 31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds(lambda: target.copy_(source), 1)
    words = source.view(torch.int64)
    read = source.numel() / seconds(lambda: words.amax(), 1)
    return copy, read


def exact(x_TD: Tensor, weight_OD: Tensor, product: Product) -> tuple[Tensor, slice]:
    """The product in float64, of at most 8192 of the columns, the last ones."""
    if product.gated:
        both = (x_TD.double() @ weight_OD.double().T).to(DTYPE)
        gate, up = both.chunk(2, dim=1)
        return F.silu(gate) * up, slice(None)
    columns = slice(max(0, len(weight_OD) - 8192), None)
    return x_TD.double() @ weight_OD[columns].double().T, columns


@dataclass(frozen=True)
class Measured:
    """One way to compute one product."""

    product: str
    num_tokens: int
    way: str
    tile: LinearTile | None
    seconds: float
    bytes_per_s: float
    error: float


Way = Callable[[Tensor, Tensor], Tensor]


def cublas(x_TD: Tensor, weight_OD: Tensor, *, gated: bool) -> Tensor:
    """What the kernel is compared with."""
    out = F.linear(x_TD, weight_OD)
    return swiglu(*out.chunk(2, dim=1)) if gated else out


def ways(
    product: Product, num_tokens: int, failed: Iterable[object]
) -> Iterable[tuple[str, LinearTile | None, Way]]:
    """Every way to compute the product that compiled."""
    yield "cuBLAS", None, partial(cublas, gated=product.gated)
    block_t = max(16, 1 << (num_tokens - 1).bit_length())
    for tile in candidates(product, block_t):
        if (product.inner, product.gated, block_t, tile) not in failed:
            yield "kernel", tile, partial(launch_linear, tile=tile, gated=product.gated)


def measure(
    product: Product, weights: list[Tensor], num_tokens: int, failed: Iterable[object]
) -> list[Measured]:
    """All ways, fastest first."""
    x_TD = torch.randn(num_tokens, product.inner, device="cuda", dtype=DTYPE)
    expected, columns = exact(x_TD, weights[-1], product)
    expected = expected.double()
    found = []
    for name, tile, way in ways(product, num_tokens, failed):
        out = way(x_TD, weights[-1])[:, columns].double()
        error = ((out - expected).norm() / expected.norm()).item()

        def run(way: Way = way) -> None:
            for weight in weights:
                way(x_TD, weight)

        time_s = seconds(run, len(weights))
        found.append(
            Measured(
                product.name, num_tokens, name, tile, time_s, product.weight_bytes / time_s, error
            )
        )
    return sorted(found, key=lambda one: one.seconds)


def describe(one: Measured) -> str:
    if one.tile is None:
        return one.way
    tile = one.tile
    return (
        f"{tile.block_o}x{tile.block_d}/{tile.num_splits} "
        f"w{tile.num_warps} s{tile.num_stages} h{tile.num_held}"
    )


def precompile(
    jobs: list[tuple[int, bool, int, LinearTile]],
) -> set[tuple[int, bool, int, LinearTile]]:
    """Compile in parallel; the jobs that failed."""
    spawn = multiprocessing.get_context("spawn")
    failed = set()
    with ProcessPoolExecutor(COMPILERS, mp_context=spawn) as pool:
        results = pool.map(compile_tile, *zip(*jobs, strict=True), chunksize=4)
        for job, why in zip(jobs, results, strict=True):
            if why is not None:
                failed.add(job)
                print(f"  cannot run {job}: {why}")
    return failed


def tune(read_bytes_per_s: float) -> list[Measured]:
    """Measure and print every product."""
    started = time.perf_counter()
    jobs = {
        (product.inner, product.gated, block_t, tile)
        for product in PRODUCTS
        for block_t in CUTS
        for tile in candidates(product, block_t)
    }
    failed = precompile(sorted(jobs, key=str))
    print(f"{len(jobs)} kernels compiled in {time.perf_counter() - started:.0f} s")
    table: list[Measured] = []
    print("product   T    cuBLAS us (GB/s)    best kernels: us (GB/s) cut")
    for product in PRODUCTS:
        copies = max(2, -(-ROTATED_BYTES // product.weight_bytes))
        weights = [
            torch.randn(product.out_size, product.inner, device="cuda", dtype=DTYPE) * 0.02
            for _ in range(copies)
        ]
        for num_tokens in TOKENS:
            found = measure(product, weights, num_tokens, failed)
            table += found
            print_product(found)
        del weights
        torch.cuda.empty_cache()
    for num_tokens in TOKENS:
        print_sum(table, num_tokens, read_bytes_per_s)
    worst = max(table, key=lambda one: one.error)
    print(
        f"largest relative error {worst.error:.1e}: "
        f"{worst.product}, T {worst.num_tokens}, {describe(worst)}"
    )
    return table


def print_product(found: list[Measured]) -> None:
    theirs = next(one for one in found if one.tile is None)
    ours = [one for one in found if one.tile is not None]
    text = "  ".join(
        f"{one.seconds * 1e6:6.1f} ({one.bytes_per_s / 1e9:4.0f}) {describe(one):21s}"
        for one in ours[:4]
    )
    print(
        f"{theirs.product:8s} {theirs.num_tokens:3d}  {theirs.seconds * 1e6:6.1f} "
        f"({theirs.bytes_per_s / 1e9:4.0f})   {text}"
    )


def print_sum(table: list[Measured], num_tokens: int, read_bytes_per_s: float) -> None:
    """All products of a step, against reading their weights."""
    weight_bytes = sum(product.weight_bytes for product in LAYER) * NUM_LAYERS + HEAD.weight_bytes
    floor = weight_bytes / read_bytes_per_s
    sums = []
    for is_ours in (False, True):
        best = {
            product.name: min(
                one.seconds
                for one in table
                if (one.product, one.num_tokens) == (product.name, num_tokens)
                and (one.tile is not None) == is_ours
            )
            for product in PRODUCTS
        }
        sums.append(sum(best[product.name] for product in LAYER) * NUM_LAYERS + best["head"])
    both = ", ".join(
        f"{name} {total * 1e3:.3f} ms ({total / floor:.3f})"
        for name, total in zip(("cuBLAS", "kernel"), sums, strict=True)
    )
    print(f"products of a step, T {num_tokens}: {both}; weights alone {floor * 1e3:.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("linear_tuning measures kernels of a GPU: torch.cuda.is_available() is false here")
    torch.manual_seed(0)
    copy, read = bandwidths()
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e9:.0f} GB/s, read {read / 1e9:.0f} GB/s")
    table = tune(read)
    if options.json:
        values = {
            "copy_bytes_per_s": copy,
            "read_bytes_per_s": read,
            "products": [asdict(one) for one in table],
        }
        write_json(options.json, values)


if __name__ == "__main__":
    main()
