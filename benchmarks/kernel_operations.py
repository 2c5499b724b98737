"""Every kernel on the tensors of a step, with its definition and its least work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from focus_ray.benchmarks.sdar_step import Step
from focus_ray.kernels.compact import compact, compact_reference
from focus_ray.kernels.confidence import Draw, confidence, confidence_reference
from focus_ray.kernels.fill_kv import fill_kv, fill_kv_reference
from focus_ray.kernels.importance import importance, importance_reference
from focus_ray.kernels.norm_rotary import norm_rotary, norm_rotary_reference
from focus_ray.kernels.paged_attention import paged_attention, paged_attention_reference
from focus_ray.kernels.retain import retain, retain_reference
from focus_ray.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from focus_ray.kernels.swiglu import swiglu, swiglu_reference


@dataclass(frozen=True)
class Operation:
    """One launch, its definition, and what it moves and computes at the least."""

    name: str
    kernel: Callable[[], object]
    definition: Callable[[], object]
    num_bytes: int
    num_flops: int = 0


def operations(step: Step) -> Iterator[Operation]:
    """Every kernel on the tensors of a step: decisions at the processed count, the rest at the
    retained one, which 34 of 36 layers have.
    """
    yield from eviction_operations(step)
    yield from layer_operations(step)
    yield attention_operation(step)
    yield from token_operations(step)


def token_operations(step: Step) -> Iterator[Operation]:
    """The best token of each row of logits, and a drawn one."""
    logits_QV = step.random(step.num_masked, step.config.vocab_size)
    mask_id = step.config.vocab_size - 1
    num_bytes = logits_QV.numel() * step.dtype.itemsize
    number_Q = torch.arange(step.num_masked, device=step.device)
    draw = Draw(torch.full_like(number_Q, 0.8, dtype=torch.float32), number_Q, number_Q, number_Q)
    yield Operation(
        "confidence",
        lambda: confidence(logits_QV, mask_id),
        lambda: confidence_reference(logits_QV, mask_id, suppressed_RK=None, draw=None),
        num_bytes,
    )
    yield Operation(
        "confidence, drawn",
        lambda: confidence(logits_QV, mask_id, draw=draw),
        lambda: confidence_reference(logits_QV, mask_id, suppressed_RK=None, draw=draw),
        num_bytes,
    )


def eviction_operations(step: Step) -> Iterator[Operation]:
    """What FOCUS adds to a step."""
    config, size = step.config, step.dtype.itemsize
    q_THd, k_TKd = step.heads(step.num_processed)
    x_TD = step.random(step.num_processed, config.hidden_size)
    blocks = (step.processed.row_offsets_S1, step.processed_NB, step.masked_NB)
    num_heads, head_dim = config.num_attention_heads, config.head_dim
    masked_N = step.masked_NB.sum(1)
    yield Operation(
        "importance",
        lambda: importance(q_THd, k_TKd, *blocks),
        lambda: importance_reference(q_THd, k_TKd, *blocks),
        int(masked_N.sum()) * (num_heads + config.num_key_value_heads) * head_dim * size,
        2 * int(masked_N.square().sum()) * num_heads * head_dim,
    )
    yield Operation(
        "retain",
        lambda: step.retain(retain),
        lambda: step.retain(retain_reference),
        step.masked_NB.numel() * (3 * 4 + 3) + step.shape.num_seqs * 28,
    )
    facts = step.processed
    given = (
        x_TD,
        q_THd,
        facts.positions_T,
        facts.slot_T,
        facts.kv_limit_T,
        facts.row_offsets_S1,
        step.processed_NB,
        step.masked_NB,
        step.retained,
        step.block_start_N,
    )
    counts = {"num_evicted": step.num_evicted, "num_masked": step.num_masked}
    row_bytes = (config.hidden_size + num_heads * head_dim) * size + 20
    yield Operation(
        "compact",
        lambda: compact(*given, **counts),
        lambda: compact_reference(*given),
        2 * step.num_retained * row_bytes,
    )


def layer_operations(step: Step) -> Iterator[Operation]:
    """The elementwise steps of a layer."""
    config, size, rows = step.config, step.dtype.itemsize, step.num_retained
    eps, width = config.rms_norm_eps, config.hidden_size
    x_RD, added_RD = step.random(rows, width), step.random(rows, width)
    weight, head_weight = step.random(width), step.random(config.head_dim)
    q_RHd, k_RKd = step.heads(rows)
    gate_RI, up_RI = (step.random(rows, config.intermediate_size) for _ in range(2))
    rotary = (head_weight, head_weight, eps, step.table_P2r2, step.kept.positions_T)
    slots_and_pages = (step.kept.slot_T, step.layer_kv.key_pages, step.layer_kv.value_pages)
    yield Operation(
        "rms_norm",
        lambda: rms_norm(x_RD, weight, eps),
        lambda: rms_norm_reference(x_RD, weight, eps),
        2 * x_RD.numel() * size,
    )
    yield Operation(
        "add_rms_norm",
        lambda: add_rms_norm(x_RD, added_RD, weight, eps),
        lambda: add_rms_norm_reference(x_RD, added_RD, weight, eps),
        4 * x_RD.numel() * size,
    )
    yield Operation(
        "norm_rotary",
        lambda: norm_rotary(q_RHd, k_RKd, *rotary),
        lambda: norm_rotary_reference(q_RHd, k_RKd, *rotary),
        (2 * (q_RHd.numel() + k_RKd.numel()) + rows * config.head_dim) * size,
    )
    yield Operation(
        "fill_kv",
        lambda: fill_kv(k_RKd, k_RKd, *slots_and_pages),
        lambda: fill_kv_reference(k_RKd, k_RKd, *slots_and_pages),
        3 * k_RKd.numel() * size + 8 * rows,  # one tensor is read, as keys and as values
    )
    yield Operation(
        "swiglu",
        lambda: swiglu(gate_RI, up_RI),
        lambda: swiglu_reference(gate_RI, up_RI),
        3 * gate_RI.numel() * size,
    )


def attention_operation(step: Step, queries_per_row: int | None = None) -> Operation:
    """Attention at the retained count, or with as many queries in every row."""
    config, size, facts = step.config, step.dtype.itemsize, step.kept
    offsets, limit_R = facts.row_offsets_S1, facts.kv_limit_T
    name = "paged_attention"
    if queries_per_row is not None:
        name = f"paged_attention, {queries_per_row} per row"
        offsets = torch.arange(step.shape.num_seqs + 1, device=step.device) * queries_per_row
        limit_R = torch.full((int(offsets[-1]),), facts.max_kv_len, device=step.device)
        offsets, limit_R = offsets.int(), limit_R.int()
    q_RHd, _ = step.heads(len(limit_R))
    pages = (step.layer_kv.key_pages, step.layer_kv.value_pages, facts.page_table_SP)
    sizes = {
        "max_row_len": queries_per_row or facts.max_row_len,
        "max_kv_len": facts.max_kv_len,
        "scale": config.head_dim**-0.5,
    }
    positions = int(limit_R[offsets[:-1].long()].sum())  # the limits of a row are equal
    kv_bytes = 2 * positions * config.num_key_value_heads * config.head_dim * size
    return Operation(
        name,
        lambda: paged_attention(q_RHd, *pages, offsets, limit_R, **sizes),
        lambda: paged_attention_reference(q_RHd, *pages, offsets, limit_R, **sizes),
        kv_bytes + 2 * q_RHd.numel() * size,
        4 * int(limit_R.sum()) * config.num_attention_heads * config.head_dim,
    )
