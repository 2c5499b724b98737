"""Times of kernels, of the model's products, and of a step that is added up from its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from focus_ray.benchmarks.kernel_operations import (
    Operation,
    attention_operation,
    eviction_operations,
    operations,
)
from focus_ray.benchmarks.sdar_step import Shape, Step
from focus_ray.benchmarks.timing import Ceilings, Timer, measure_ceilings
from focus_ray.kernels.confidence import confidence
from focus_ray.models.sdar import SdarConfig
from focus_ray.models.step import StepTensors

FEW_QUERIES = (1, 4, 8, 16)


@dataclass(frozen=True)
class KernelTime:
    """One row of the table; seconds, and shares of the ceiling that is nearer."""

    name: str
    shape: str
    kernel_s: float
    definition_s: float
    bytes_per_s: float
    flops_per_s: float
    share_of_ceiling: float


@dataclass(frozen=True)
class ProductTime:
    """A product of the model, ``[rows, inner] @ [inner, columns]``."""

    name: str
    rows: int
    inner: int
    columns: int
    seconds: float
    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the model by part, on the device alone."""

    shape: str
    num_processed: int
    num_retained: int
    num_retained_masked: int
    embedding_s: float
    first_layers_s: float
    other_layers_s: float
    head_s: float
    eviction_s: float

    @property
    def total_s(self) -> float:
        layers_s = self.first_layers_s + self.other_layers_s
        return self.embedding_s + layers_s + self.head_s + self.eviction_s

    @property
    def eviction_share(self) -> float:
        return self.eviction_s / self.total_s


@dataclass(frozen=True)
class KernelReport:
    """All that was measured; attention with few queries in every row apart."""

    ceilings: Ceilings
    kernels: list[KernelTime]
    attention_few_queries: list[KernelTime]
    products: list[ProductTime]
    steps: list[StepTime]

    def as_json(self) -> dict[str, object]:
        steps = [
            asdict(step) | {"total_s": step.total_s, "eviction_share": step.eviction_share}
            for step in self.steps
        ]
        return asdict(self) | {"steps": steps}


def measure(
    timer: Timer, config: SdarConfig, shapes: Sequence[Shape], largest: tuple[int, int]
) -> KernelReport:
    """Everything, shape by shape, so that their tensors need not fit together.

    Args:
        shapes: the first is the one that products and few queries are measured at.
        largest: bytes of the copy and size of the product that are taken for ceilings.
    """
    ceilings = measure_ceilings(timer, *largest)
    report = KernelReport(ceilings, [], [], [], [])
    for shape in shapes:
        dtype = torch.float32 if timer.device.type == "cpu" else torch.bfloat16
        step = Step(config, shape, timer.device, dtype)
        for operation in operations(step):
            report.kernels.append(time_operation(timer, ceilings, operation, shape))
        report.steps.append(time_step(timer, step))
        if shape == shapes[0]:
            report.products.extend(time_products(timer, step))
            for queries in FEW_QUERIES:
                operation = attention_operation(step, queries)
                report.attention_few_queries.append(
                    time_operation(timer, ceilings, operation, shape)
                )
    return report


def time_operation(
    timer: Timer, ceilings: Ceilings, operation: Operation, shape: Shape
) -> KernelTime:
    kernel_s = timer.seconds(operation.kernel)
    definition_s = timer.seconds(operation.definition, recordable=False)
    bytes_per_s, flops_per_s = operation.num_bytes / kernel_s, operation.num_flops / kernel_s
    return KernelTime(
        operation.name,
        shape.name,
        kernel_s,
        definition_s,
        bytes_per_s,
        flops_per_s,
        max(bytes_per_s / ceilings.copy_bytes_per_s, flops_per_s / ceilings.matmul_flops_per_s),
    )


def time_products(timer: Timer, step: Step) -> list[ProductTime]:
    """The products of a layer at both counts, and the head's."""
    config = step.config
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    shapes = [("q, k and v", hidden, q_size + 2 * kv_size), ("o", q_size, hidden)]
    shapes += [("gate and up", hidden, 2 * inner), ("down", inner, hidden)]
    found = [
        (name, rows, k, n)
        for rows in (step.num_processed, step.num_retained)
        for name, k, n in shapes
    ]
    found.append(("head", step.num_masked, hidden, config.vocab_size))
    return [_time_product(timer, step, *product) for product in found]


def _time_product(
    timer: Timer, step: Step, name: str, rows: int, inner: int, columns: int
) -> ProductTime:
    x, weight = step.random(rows, inner), step.random(columns, inner)
    seconds = timer.seconds(lambda: F.linear(x, weight))
    num_bytes = (x.numel() + weight.numel() + rows * columns) * step.dtype.itemsize
    flops = 2 * rows * inner * columns
    return ProductTime(name, rows, inner, columns, seconds, flops / seconds, num_bytes / seconds)


def time_step(timer: Timer, step: Step) -> StepTime:
    """Measure every part of a step and add up."""
    config, layer, kv = step.config, step.layer(), step.layer_kv

    def halves(facts: StepTensors, num_tokens: int) -> tuple[float, float]:
        x_TD, added_TD = (step.random(num_tokens, config.hidden_size) for _ in range(2))
        q_THd, _ = step.heads(num_tokens)
        begin_s = timer.seconds(lambda: layer.begin(x_TD, added_TD, step.table_P2r2, facts, kv))
        return begin_s, timer.seconds(lambda: layer.finish(x_TD, q_THd, facts, kv))

    begin_s, finish_s = halves(step.processed, step.num_processed)
    kept_begin_s, kept_finish_s = halves(step.kept, step.num_retained)
    vocabulary = step.random(config.vocab_size, config.hidden_size)
    x_RD, added_RD = (step.random(step.num_retained, config.hidden_size) for _ in range(2))
    masked_row_Q = torch.arange(step.num_masked, device=step.device)

    def head() -> object:
        hidden_RD, _ = layer.input_layernorm(x_RD, added_RD)
        return confidence(F.linear(hidden_RD[masked_row_Q], vocabulary), config.vocab_size - 1)

    importance_, retain_, compact_ = eviction_operations(step)

    def evict() -> None:
        for operation in (importance_, importance_, retain_, compact_):
            operation.kernel()

    return StepTime(
        shape=step.shape.name,
        num_processed=step.num_processed,
        num_retained=step.num_retained,
        num_retained_masked=step.num_masked,
        embedding_s=timer.seconds(lambda: F.embedding(step.processed.token_ids_T, vocabulary)),
        first_layers_s=2 * begin_s + finish_s + kept_finish_s,
        other_layers_s=(config.num_hidden_layers - 2) * (kept_begin_s + kept_finish_s),
        head_s=timer.seconds(head),
        eviction_s=timer.seconds(evict),
    )
