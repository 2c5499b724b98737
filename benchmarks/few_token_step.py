"""What does one step of one sequence cost beside reading the weights?

    python benchmarks/few_token_step.py --tokens 16 32

Needs a Hopper GPU of 80 GB. The layers and the head of SDAR-8B with random weights, one sequence in
mid-text, recorded as one CUDA graph: once with cuBLAS and a kernel per operation, then with what
joins operations, then with the kernels for few tokens, then these beginning while predecessors run,
and norms adding up what such kernels share. Every way is compared with the first.

T tokens, D hidden size, O output size, W width of queries, keys and values together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.benchmarks.linear_tuning import (
    DTYPE,
    HEAD,
    LAYER,
    NUM_LAYERS,
    bandwidths,
    seconds,
)
from focus_ray.kernels import overlap
from focus_ray.kernels.confidence import confidence
from focus_ray.kernels.fill_kv import fill_kv
from focus_ray.kernels.linear import linear, linear_swiglu, partial_linear
from focus_ray.kernels.linear_kernels import LinearTile, launch_linear, launch_partial_linear
from focus_ray.kernels.norm_rotary import norm_rotary
from focus_ray.kernels.norm_rotary_fill import norm_rotary_fill
from focus_ray.kernels.paged_attention import paged_attention
from focus_ray.kernels.partial_sums import Summand
from focus_ray.kernels.rms_norm import add_rms_norm
from focus_ray.kernels.rotary import rotary_table
from focus_ray.kernels.swiglu import swiglu

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 32, 8, 128, 4096
CONTEXT, PAGE_SIZE, EPS = 1024, 64, 1e-6
MASK_TOKEN = 151669

Weights = dict[str, Tensor]
Multiply = Callable[[str, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Products:
    """How a step multiplies, by the products' names: those that norms add, and all others."""

    plain: Multiply
    added: Callable[[str, Tensor, Tensor], Summand]


class Skeleton:
    """Weights of all layers, and the pages of one sequence; T tokens behind its context."""

    def __init__(self) -> None:
        self.layers: list[Weights] = []
        for _ in range(NUM_LAYERS):
            layer = {p.name: random_weight(p.out_size, p.inner) for p in LAYER}
            layer |= {f"norm {i}": random_weight(HIDDEN) + 1 for i in range(2)}
            layer |= {f"{name} norm": random_weight(HEAD_DIM) + 1 for name in "qk"}
            self.layers.append(layer)
        self.head = random_weight(HEAD.out_size, HEAD.inner)
        self.num_pages = CONTEXT // PAGE_SIZE + 8
        shape = (2, NUM_LAYERS, self.num_pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)
        self.pages = torch.randn(shape, device="cuda", dtype=DTYPE)
        self.table_P2r2 = rotary_table(
            4096, HEAD_DIM, 1e6, dtype=DTYPE, device=torch.device("cuda")
        )

    def inputs(self, num_tokens: int) -> dict[str, Tensor]:
        place_T = torch.arange(CONTEXT, CONTEXT + num_tokens, device="cuda")
        return {
            "x_TD": torch.randn(num_tokens, HIDDEN, device="cuda", dtype=DTYPE),
            "zeros_TD": torch.zeros(num_tokens, HIDDEN, device="cuda", dtype=DTYPE),
            "place_T": place_T,  # positions, and slots: page i holds positions from 64 i on
            "limit_T": torch.full_like(place_T, CONTEXT + num_tokens, dtype=torch.int32),
            "page_table_MP": torch.arange(self.num_pages, device="cuda", dtype=torch.int32)[None],
            "row_table_S": torch.zeros(1, dtype=torch.int32, device="cuda"),
            "offsets_S1": torch.tensor([0, num_tokens], dtype=torch.int32, device="cuda"),
        }

    def step(self, given: dict[str, Tensor], products: Products, *, fused: bool) -> Tensor:
        """The logits, choices made; ``fused``: with the operations that join several."""
        x_TD, place_T = given["x_TD"], given["place_T"]
        added_TD: Summand = given["zeros_TD"]
        for index, layer in enumerate(self.layers):
            keys, values = self.pages[0, index], self.pages[1, index]
            normed_TD, x_TD = add_rms_norm(x_TD, added_TD, layer["norm 0"], EPS)
            qkv_TW = products.plain("qkv", normed_TD, layer["qkv"])
            rotary = (layer["q norm"], layer["k norm"], EPS, self.table_P2r2, place_T)
            if fused:
                q_THd, _ = norm_rotary_fill(qkv_TW, *rotary, place_T, keys, values, keep_keys=False)
            else:
                heads = qkv_TW.unflatten(1, (-1, HEAD_DIM))
                q_THd, k_TKd, v_TKd = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
                q_THd, k_TKd = norm_rotary(q_THd, k_TKd, *rotary)
                fill_kv(k_TKd, v_TKd, place_T, keys, values)
            out_TD = attend(q_THd, keys, values, given)
            added_TD = products.added("o", out_TD, layer["o"])
            normed_TD, x_TD = add_rms_norm(x_TD, added_TD, layer["norm 1"], EPS)
            gated_TI = products.plain("gate_up", normed_TD, layer["gate_up"])
            added_TD = products.added("down", gated_TI, layer["down"])
        normed_TD, _ = add_rms_norm(x_TD, added_TD, self.layers[0]["norm 0"], EPS)
        logits_TV = products.plain("head", normed_TD, self.head)
        confidence(logits_TV, MASK_TOKEN)
        return logits_TV


def random_weight(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE) * 0.02


def attend(q_THd: Tensor, keys: Tensor, values: Tensor, given: dict[str, Tensor]) -> Tensor:
    num_tokens = len(q_THd)
    out_THd = paged_attention(
        q_THd,
        keys,
        values,
        given["page_table_MP"],
        given["row_table_S"],
        given["offsets_S1"],
        given["limit_T"],
        max_row_len=num_tokens,
        max_kv_len=CONTEXT + num_tokens,
        busy_rows=1,
        scale=HEAD_DIM**-0.5,
    )
    return out_THd.flatten(1)


def cublas(name: str, x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    out = F.linear(x_TD, weight_OD)
    return swiglu(*out.chunk(2, dim=1)) if name == "gate_up" else out


def shipped(name: str, x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """As a model multiplies."""
    return (linear_swiglu if name == "gate_up" else linear)(x_TD, weight_OD)


def shipped_added(name: str, x_TD: Tensor, weight_OD: Tensor) -> Summand:
    return partial_linear(x_TD, weight_OD)


def streamed(tiles: dict[str, LinearTile], name: str, x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """Each product by the kernel with a given cut."""
    return launch_linear(x_TD, weight_OD, tiles[name], gated=name == "gate_up")


def streamed_added(
    tiles: dict[str, LinearTile], name: str, x_TD: Tensor, weight_OD: Tensor
) -> Summand:
    several = tiles[name].num_splits > 1
    return (launch_partial_linear if several else launch_linear)(x_TD, weight_OD, tiles[name])


@contextmanager
def one_after_the_other() -> Iterator[None]:
    """No kernel begins before its predecessor has ended."""
    asked = overlap.overlaps
    overlap.overlaps = lambda device: False
    try:
        yield
    finally:
        overlap.overlaps = asked


def read_tiles(path: Path, num_tokens: int) -> dict[str, LinearTile]:
    """The fastest cuts of what ``linear_tuning.py`` wrote."""
    products = json.loads(path.read_text())["products"]
    ours = [p for p in products if p["tile"] and p["num_tokens"] == num_tokens]
    ours.sort(key=lambda one: -one["seconds"])
    return {p["product"]: LinearTile(**p["tile"]) for p in ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument(
        "--tiles", type=Path, help="JSON of linear_tuning.py: its fastest cuts, too"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("few_token_step needs a GPU: torch.cuda.is_available() is false here")
    torch.manual_seed(0)
    _, read = bandwidths()
    weight_bytes = sum(p.weight_bytes for p in LAYER) * NUM_LAYERS + HEAD.weight_bytes
    floor = weight_bytes / read
    print(
        f"weights {weight_bytes / 1e9:.2f} GB, read at {read / 1e9:.0f} GB/s: {floor * 1e3:.3f} ms"
    )
    skeleton = Skeleton()
    for num_tokens in options.tokens:
        tiles = read_tiles(options.tiles, num_tokens) if options.tiles else None
        compare(skeleton, num_tokens, tiles, floor)


def compare(
    skeleton: Skeleton, num_tokens: int, tiles: dict[str, LinearTile] | None, floor_s: float
) -> None:
    """Print the time of every way, and how far its logits are from the first's."""
    given = skeleton.inputs(num_tokens)
    first: list[Tensor] = []

    def show(way: str, products: Products, *, fused: bool = True) -> None:
        def run() -> Tensor:
            return skeleton.step(given, products, fused=fused)

        logits_TV = run().float()
        first.append(logits_TV)
        difference = ((logits_TV - first[0]).norm() / first[0].norm()).item()
        time_s = seconds(run, 1)
        print(
            f"  {way:38s} {time_s * 1e3:7.3f} ms, {time_s / floor_s:.3f} of the weights' time; "
            f"logits {difference:.1e} apart"
        )

    theirs, ours = Products(cublas, cublas), Products(shipped, shipped_added)
    print(f"T {num_tokens}")
    with one_after_the_other():
        show("cuBLAS", theirs, fused=False)
        show("cuBLAS, norm_rotary_fill", theirs)
        show("as shipped, one after the other", ours)
    show("cuBLAS, the rest overlapping", theirs)
    show("as shipped, products add up themselves", Products(shipped, shipped))
    show("as shipped", ours)
    if tiles:
        show(
            "fastest cuts alone",
            Products(partial(streamed, tiles), partial(streamed_added, tiles)),
        )


if __name__ == "__main__":
    main()
