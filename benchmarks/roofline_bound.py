"""What the tokens of a run would have cost at the device's ceiling.

Counted are the products with the model's weights, the reading of these weights, and the reading of
keys and values; of experts, the weights of those that some token goes through. Everything else a
step does is taken to be free: norms, rotations, the writing of keys and values, the arithmetic of
attention, the choice of experts and of tokens, the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from focus_ray.benchmarks.roofline_counts import RunCounts
from focus_ray.benchmarks.roofline_layers import Touched, layer_products
from focus_ray.benchmarks.roofline_products import ProductTimes
from focus_ray.models.decoder import DecoderConfig


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best with this model.

    Args:
        copy_bytes_per_s: of a large copy, read and write counted.
        products: by name; each has its own best rate.
        itemsize: bytes of a weight, of a key and of a value.
    """

    copy_bytes_per_s: float
    products: Mapping[str, ProductTimes]
    itemsize: int

    @property
    def bytes_per_s(self) -> float:
        """The best at which anything was moved: the copy, or the weights of a product."""
        streamed = (p.weights_per_s(self.itemsize) for p in self.products.values())
        return max(self.copy_bytes_per_s, *streamed)

    def seconds(self, name: str, rows: float, touched: Touched = ()) -> float:
        """A product at the ceiling: its arithmetic at its best rate, or its weights read once."""
        if not rows:
            return 0.0
        return max(rows / self.products[name].rows_per_s, self.read_seconds(name, rows, touched))

    def read_seconds(self, name: str, rows: float, touched: Touched = ()) -> float:
        """The reading of the weights that so many rows need, once."""
        product = self.products[name].product
        return product.bytes_read(rows, self.itemsize, touched) / self.bytes_per_s

    def own_seconds(self, name: str, rows: float) -> float:
        """The same product as the library runs it at this number of rows."""
        return self.products[name].seconds(rows) if rows else 0.0


@dataclass(frozen=True)
class Roofline:
    """Seconds of the mean step of a run, and their share in the measured time.

    ``fraction`` is the time at the ceiling over the measured one, every product at the best rate
    that it reaches at any size: the number to steer by. ``own_fraction`` takes the products as fast
    as the library runs them at the sizes of this run: what is left of it is ours.

    Steps are taken to be all as large as their mean. Products that wait for weights in some steps
    and compute in others would need more than the sum says, so both fractions err to the low side.
    """

    label: str
    step_s: float
    layers_s: float
    head_s: float
    kv_s: float
    own_products_s: float
    weights_s: float
    assumed: tuple[str, ...]

    @property
    def ceiling_s(self) -> float:
        return self.layers_s + self.head_s + self.kv_s

    @property
    def fraction(self) -> float:
        return self.ceiling_s / self.step_s

    @property
    def own_fraction(self) -> float:
        return (self.own_products_s + self.kv_s) / self.step_s

    @property
    def step_per_weights(self) -> float:
        """Time of a step over that of reading its weights once: what counts at concurrency 1."""
        return self.step_s / self.weights_s


def roofline_of(run: RunCounts, config: DecoderConfig, ceilings: Ceilings) -> Roofline:
    """Add up the mean step of ``run``."""
    whole = (run.processed_tokens + run.prefill_tokens) / run.steps
    retained = (run.retained_tokens + run.prefill_tokens) / run.steps
    head_rows = run.logit_rows / run.steps
    touched = run.experts_touched
    # Rows of each product: layer 0, layer 1 up to its keys and values, and all the rest.
    rows = [
        (name, whole if layer == 0 or (layer == 1 and name == "qkv") else retained)
        for layer, names in enumerate(layer_products(config))
        for name in names
    ]
    positions = run.kv_positions_read / run.steps
    kv_bytes = 2 * config.num_key_value_heads * config.head_dim * ceilings.itemsize
    has_experts = any(times.product.num_weights > 1 for times in ceilings.products.values())
    by_chance = ("experts are chosen by chance",) if has_experts and not touched else ()
    return Roofline(
        label=run.label,
        step_s=run.wall_s / run.steps,
        layers_s=sum(ceilings.seconds(name, n, touched) for name, n in rows),
        head_s=ceilings.seconds("head", head_rows),
        kv_s=config.num_hidden_layers * positions * kv_bytes / ceilings.bytes_per_s,
        own_products_s=sum(ceilings.own_seconds(name, n) for name, n in rows)
        + ceilings.own_seconds("head", head_rows),
        weights_s=sum(ceilings.read_seconds(name, n, touched) for name, n in rows)
        + ceilings.read_seconds("head", head_rows),
        assumed=(*run.assumed, *by_chance),
    )
