"""Which products with weights a model consists of, layer by layer.

Projections of equal inputs are fused. The experts of a layer are one product of many weights, of
which each row takes some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from focus_ray.models.decoder import DecoderConfig
from focus_ray.models.llada2 import Llada2Config
from focus_ray.models.sdar import SdarConfig
from focus_ray.models.sdar_moe import SdarMoeConfig

Touched = Sequence[tuple[int, float]]
"""``(tokens, experts)``: how many experts so many tokens go through, ascending; empty: unknown."""

ATTENTION = ("qkv", "o")
DENSE = ("gate_up", "down")
EXPERTS = ("router", "experts_gate_up", "experts_down")
SHARED = ("shared_gate_up", "shared_down")


@dataclass(frozen=True)
class Product:
    """``[rows, inner] @ [inner, columns]``; ``columns`` are the weight's rows, as in a linear.

    Args:
        num_weights: so many weights of this size.
        num_chosen: so many of them each row is multiplied with.
    """

    name: str
    inner: int
    columns: int
    num_weights: int = 1
    num_chosen: int = 1

    @property
    def flops_per_row(self) -> int:
        return 2 * self.inner * self.columns * self.num_chosen

    def weight_bytes(self, itemsize: int) -> int:
        """Of all weights."""
        return self.inner * self.columns * self.num_weights * itemsize

    def bytes_read(self, rows: float, itemsize: int, touched: Touched = ()) -> float:
        """Of the weights that ``rows`` rows need."""
        share = self.weights_read(rows, touched) / self.num_weights
        return self.weight_bytes(itemsize) * share

    def weights_read(self, rows: float, touched: Touched = ()) -> float:
        """How many weights ``rows`` rows need.

        By chance, if every row chose for itself and all weights were chosen alike; times what was
        counted over that, where something was counted.
        """
        if self.num_weights == 1:
            return 1.0
        if not touched:
            return self._by_chance(rows)
        sizes, counts = zip(*touched, strict=True)
        ratios = [count / self._by_chance(size) for size, count in zip(sizes, counts, strict=True)]
        return self._by_chance(rows) * float(np.interp(rows, sizes, ratios))

    def _by_chance(self, rows: float) -> float:
        missed: float = (1.0 - self.num_chosen / self.num_weights) ** rows
        return self.num_weights * (1.0 - missed)


def layer_products(config: DecoderConfig) -> list[tuple[str, ...]]:
    """Names of the products of every layer."""
    return [(*ATTENTION, *_feed_forward(config, i)) for i in range(config.num_hidden_layers)]


def products_of(config: DecoderConfig) -> list[Product]:
    """Each product that occurs in some layer, and the head."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    width = config.hidden_size
    possible = [
        Product("qkv", width, queries + 2 * keys),
        Product("o", queries, width),
        *_feed_forward_products(config),
    ]
    occurring = {name for names in layer_products(config) for name in names}
    layers = [product for product in possible if product.name in occurring]
    return [*layers, Product("head", width, config.vocab_size)]


def _feed_forward(config: DecoderConfig, layer_index: int) -> tuple[str, ...]:
    if isinstance(config, SdarMoeConfig):
        return EXPERTS if config.is_sparse(layer_index) else DENSE
    if isinstance(config, Llada2Config) and layer_index >= config.first_k_dense_replace:
        return EXPERTS + SHARED if config.num_shared_experts else EXPERTS
    return DENSE


def _feed_forward_products(config: DecoderConfig) -> list[Product]:
    width = config.hidden_size
    assert isinstance(config, SdarConfig | SdarMoeConfig | Llada2Config)
    products = []
    if config.intermediate_size is not None:
        products += _network(DENSE, width, config.intermediate_size)
    if isinstance(config, SdarConfig):
        return products
    inner, counts = config.moe_intermediate_size, (config.num_experts, config.num_experts_per_tok)
    products.append(Product("router", width, config.num_experts))
    products += _network(EXPERTS[1:], width, inner, *counts)
    if isinstance(config, Llada2Config):
        products += _network(SHARED, width, config.num_shared_experts * inner)
    return products


def _network(
    names: tuple[str, ...], width: int, inner: int, num_weights: int = 1, num_chosen: int = 1
) -> list[Product]:
    gate_up, down = names
    return [
        Product(gate_up, width, 2 * inner, num_weights, num_chosen),
        Product(down, inner, width, num_weights, num_chosen),
    ]
