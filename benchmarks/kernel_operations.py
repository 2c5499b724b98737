"""Every kernel on the tensors of a step, with its definition and its least work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from focus_ray.benchmarks.sdar_step import Step
from focus_ray.kernels.compact import compact, compact_reference
from focus_ray.kernels.confidence import Draw, confidence, confidence_reference
from focus_ray.kernels.importance import importance, importance_reference
from focus_ray.kernels.norm_rotary_fill import norm_rotary_fill, norm_rotary_fill_reference
from focus_ray.kernels.paged_attention import paged_attention, paged_attention_reference
from focus_ray.kernels.retain import Retained, retain, retain_reference
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
    offsets, masked_NB = step.processed.row_offsets_S1, step.masked_NB
    blocks = (offsets, step.processed_NB, masked_NB, step.target_N)
    num_heads, head_dim = config.num_attention_heads, config.head_dim
    masked_N = masked_NB.sum(1)
    masked_N = masked_N * (masked_N > step.target_N)  # others are not looked at
    yield Operation(
        "importance",
        lambda: importance(q_THd, k_TKd, *blocks),
        lambda: importance_reference(q_THd, k_TKd, *blocks),
        int(masked_N.sum()) * (num_heads + config.num_key_value_heads) * head_dim * size,
        2 * int(masked_N.square().sum()) * num_heads * head_dim,
    )
    chosen = Retained.allocate(len(masked_NB), masked_NB.shape[1], step.device)
    yield Operation(
        "retain",
        lambda: step.retain(partial(retain, out=chosen)),
        lambda: step.retain(retain_reference),
        step.masked_NB.numel() * (3 * 4 + 3) + step.shape.num_seqs * 28,
    )
    out = step.compacted()
    row_bytes = (config.hidden_size + num_heads * head_dim) * size + 20
    yield Operation(
        "compact",
        lambda: step.compact(compact, x_TD, q_THd, out),
        lambda: step.compact(compact_reference, x_TD, q_THd, out),
        2 * step.num_retained * row_bytes,
    )


def layer_operations(step: Step) -> Iterator[Operation]:
    """The elementwise steps of a layer."""
    config, size, rows = step.config, step.dtype.itemsize, step.num_retained
    eps, width = config.rms_norm_eps, config.hidden_size
    x_RD, added_RD = step.random(rows, width), step.random(rows, width)
    weight, head_weight = step.random(width), step.random(config.head_dim)
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    qkv_RW = step.random(rows, (num_heads + 2 * num_kv_heads) * config.head_dim)
    gate_RI, up_RI = (step.random(rows, config.intermediate_size) for _ in range(2))
    facts, pages = step.kept, (step.layer_kv.key_pages, step.layer_kv.value_pages)
    rotary = (head_weight, head_weight, eps, step.table_P2r2, facts.positions_T, facts.slot_T)
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
        "norm_rotary_fill",
        lambda: norm_rotary_fill(qkv_RW, *rotary, *pages, keep_keys=False),
        lambda: norm_rotary_fill_reference(qkv_RW, *rotary, *pages),
        (2 * qkv_RW.numel() + rows * config.head_dim) * size + 16 * rows,
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
    pages = (step.layer_kv.key_pages, step.layer_kv.value_pages)
    tables = (facts.page_table_MP, facts.row_table_S)
    sizes = {
        "max_row_len": queries_per_row or facts.max_row_len,
        "max_kv_len": facts.max_kv_len,
        "scale": config.head_dim**-0.5,
    }
    busy = facts.busy_rows
    positions = int(limit_R[offsets[:-1].long()].sum())  # the limits of a row are equal
    kv_bytes = 2 * positions * config.num_key_value_heads * config.head_dim * size
    return Operation(
        name,
        lambda: paged_attention(q_RHd, *pages, *tables, offsets, limit_R, busy_rows=busy, **sizes),
        lambda: paged_attention_reference(q_RHd, *pages, *tables, offsets, limit_R, **sizes),
        kv_bytes + 2 * q_RHd.numel() * size,
        4 * int(limit_R.sum()) * config.num_attention_heads * config.head_dim,
    )
