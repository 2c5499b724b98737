"""Which cut of a mixture's products is fastest, by the tokens of a step?

    python benchmarks/moe_tuning.py --shape llada2.0-mini --json moe-tuning.json

Needs a GPU. Both products alone, with cold caches and spread routing, in every candidate that
compiles; those of one tile of tokens are added up, since both share its size. What wins belongs
into ``kernels/moe_tiles.py``, by the mean tokens of an expert.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from focus_ray.benchmarks.moe_work import SHAPES, SKEWS, Experts, MoeShape
from focus_ray.benchmarks.report_file import write_json
from focus_ray.benchmarks.timing import Timer
from focus_ray.kernels.moe_placement import place
from focus_ray.kernels.moe_products import ProductTile, expert_product

TOKENS = (1, 8, 64, 512, 2048, 8192)
DTYPE = torch.bfloat16
COMPILERS = 12
SHOWN = 3

BLOCKS_T = (16, 32, 64, 128, 256)
BLOCKS_O = (64, 128, 256)
BLOCKS_D = (64, 128)
STAGES = (3, 4, 5)
# Registers: sums of a program, in float32, of the 64 Ki that a multiprocessor has.
MOST_SUMS = 256 * 128
MOST_SHARED_BYTES = 227 << 10
# A taller tile than three times the mean wastes tensor cores, a lower one than a quarter reads
# weights over and over.
LEAST_OF_MEAN, MOST_OF_MEAN = 1 / 4, 3


@dataclass(frozen=True)
class Job:
    """One kernel: a product of a layer in one cut."""

    shape: MoeShape
    gated: bool
    block_t: int
    tile: ProductTile


@dataclass(frozen=True)
class Found:
    """How long it takes."""

    num_tokens: int
    job: Job
    seconds: float


def blocks_t(shape: MoeShape, num_tokens: int) -> list[int]:
    """Tile heights worth a try with so many tokens; always one."""
    mean = num_tokens * shape.num_chosen / shape.num_experts
    lowest, highest = BLOCKS_T[0], BLOCKS_T[-1]
    return [
        block
        for block in BLOCKS_T
        if (mean * LEAST_OF_MEAN <= block or block == highest)
        and (block <= mean * MOST_OF_MEAN or block == lowest)
    ]


def candidates(block_t: int) -> Iterator[ProductTile]:
    """Cuts that fit a multiprocessor of Hopper."""
    for block_o, block_d, stages in product(BLOCKS_O, BLOCKS_D, STAGES):
        if block_o * block_t > MOST_SUMS:
            continue
        if (block_o + block_t) * block_d * stages * DTYPE.itemsize > MOST_SHARED_BYTES:
            continue
        for num_warps in (4, 8):
            if 64 * num_warps // 4 <= block_o and block_o * block_t <= 128 * 32 * num_warps:
                yield ProductTile(block_o, block_d, num_warps, stages)


class Inputs:
    """What the products of so many tokens read, the same for every cut."""

    def __init__(self, experts: Experts, num_tokens: int) -> None:
        shape = experts.shape
        self.experts = experts
        self.expert_Tk = experts.route(experts.logits(num_tokens, SKEWS["spread"])).expert_Tk
        self.x_TD = experts.tokens(num_tokens)
        num_pairs = num_tokens * shape.num_chosen
        self.hidden_PI = experts.normal(num_pairs, shape.intermediate_size).to(DTYPE)

    def product(self, job: Job) -> partial[Tensor]:
        """The product, ready to be launched again and again."""
        shape, experts = job.shape, self.experts
        return partial(
            expert_product,
            self.x_TD if job.gated else self.hidden_PI,
            experts.gate_up_E2ID if job.gated else experts.down_EDI,
            place(self.expert_Tk, len(experts.down_EDI), job.block_t),
            job.tile,
            pairs_per_row=shape.num_chosen if job.gated else 1,
            gated=job.gated,
        )


@cache
def few_inputs(shape: MoeShape) -> Inputs:
    """Of a layer with few experts, which runs the same kernels."""
    few = replace(shape, num_experts=2 * shape.num_chosen)
    return Inputs(Experts(few, torch.device("cuda"), DTYPE), 4)


def compile_job(job: Job) -> str | None:
    """Run it in another process, which leaves it in Triton's cache; why it cannot."""
    try:
        few_inputs(job.shape).product(job)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return None


def tune(shape: MoeShape, tokens: Sequence[int]) -> list[Found]:
    """Everything measured; prints the fastest of each number of tokens."""
    jobs = [
        Job(shape, gated, block_t, tile)
        for block_t in sorted({block for count in tokens for block in blocks_t(shape, count)})
        for gated in (True, False)
        for tile in candidates(block_t)
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(COMPILERS, mp_context=spawn) as pool:
        reasons = list(pool.map(compile_job, jobs, chunksize=4))
    for job, why in zip(jobs, reasons, strict=True):
        if why is not None:
            print(f"  cannot run {job}: {why}")
    runnable = [job for job, why in zip(jobs, reasons, strict=True) if why is None]
    timer = Timer(torch.device("cuda"), budget_s=0.05, most_runs=15)
    experts = Experts(shape, timer.device, DTYPE)
    table: list[Found] = []
    for num_tokens in tokens:
        inputs = Inputs(experts, num_tokens)
        found = [
            Found(num_tokens, job, timer.seconds(inputs.product(job)))
            for job in runnable
            if job.block_t in blocks_t(shape, num_tokens)
        ]
        print_fastest(shape.name, num_tokens, found)
        table += found
    return table


def print_fastest(name: str, num_tokens: int, found: Sequence[Found]) -> None:
    for block_t in sorted({one.job.block_t for one in found}):
        total, texts = 0.0, []
        for gated in (True, False):
            of_product = [o for o in found if o.job.gated == gated and o.job.block_t == block_t]
            fastest = sorted(of_product, key=lambda one: one.seconds)[:SHOWN]
            total += fastest[0].seconds
            texts.append("  ".join(describe(one) for one in fastest))
        print(
            f"{name}, {num_tokens} tokens, tiles of {block_t}: {total * 1e6:.1f} us\n"
            f"    gate and up  {texts[0]}\n    down         {texts[1]}"
        )


def describe(one: Found) -> str:
    tile = one.job.tile
    cut = f"{tile.block_o}x{tile.block_d} w{tile.num_warps} s{tile.num_stages}"
    return f"{one.seconds * 1e6:6.1f} {cut:15s}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="llada2.0-mini", help="the layer")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help=f"default {TOKENS}")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("moe_tuning measures kernels of a GPU: torch.cuda.is_available() is false here")
    with torch.inference_mode():
        table = tune(SHAPES[args.shape], args.tokens)
    if args.json:
        write_json(args.json, [asdict(one) for one in table])


if __name__ == "__main__":
    main()
