"""A plain forward pass of any family under the block mask, apart from everything in the engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.models.decoder import DecoderForCausalLM, DecoderLayer
from focus_ray.models.layers import SwiGLU
from focus_ray.models.loading import LoadedModel


@dataclass(frozen=True)
class Pass:
    """Logits ``[T, V]``, and queries, keys and normed inputs of each layer."""

    logits: Tensor
    queries: list[Tensor]
    keys: list[Tensor]
    inputs: list[Tensor]


def run(loaded: LoadedModel, token_ids_T: Tensor, dtype: torch.dtype | None = None) -> Pass:
    """One pass over all tokens, in another dtype if wanted; of experts only in their own."""
    assert isinstance(loaded.model, DecoderForCausalLM)
    config, decoder = loaded.model.config, loaded.model.model
    dtype, dim = dtype or loaded.dtype, config.head_dim
    half, still = config.rotary_dim // 2, dim - config.rotary_dim
    positions = torch.arange(len(token_ids_T))
    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = (positions[:, None] * frequency)[:, None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    block = positions // loaded.spec.block_length
    hidden_from = block[:, None] < block[None]

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(dtype, torch.float32))
        mean_square = wide.square().mean(-1, keepdim=True)
        return (wide * (mean_square + config.rms_norm_eps).rsqrt() * weight.to(dtype)).to(dtype)

    def turned(x: Tensor) -> Tensor:
        left, right, rest = x.split((half, half, still), -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1)

    queries, keys, inputs = [], [], []
    x = decoder.embed_tokens.weight.to(dtype)[token_ids_T]
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        attention, mlp = layer.self_attn, layer.mlp
        h = normed(x, layer.input_layernorm.weight)
        fused = (h @ attention.qkv_proj.weight.to(dtype).T).unflatten(1, (-1, dim))
        kv_heads = config.num_key_value_heads
        q, k, v = fused.split((config.num_attention_heads, kv_heads, kv_heads), 1)
        q = turned(normed(q, attention.q_norm.weight))
        k = turned(normed(k, attention.k_norm.weight))
        inputs.append(h)
        queries.append(q)
        keys.append(k)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * dim**-0.5
        weight = scores.masked_fill(hidden_from, -torch.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", weight, v).flatten(1)
        x = x + attended @ attention.o_proj.weight.to(dtype).T
        h = normed(x, layer.post_attention_layernorm.weight)
        inputs += [attended, h]
        if isinstance(mlp, SwiGLU):
            gate, up = (h @ mlp.gate_up_proj.weight.to(dtype).T).chunk(2, 1)
            inputs.append(F.silu(gate) * up)
            x = x + inputs[-1] @ mlp.down_proj.weight.to(dtype).T
        else:
            added = mlp(h, torch.tensor([len(h)], dtype=torch.int32))
            assert isinstance(added, Tensor)
            x = x + added
    h = normed(x, decoder.norm.weight)
    head = decoder.embed_tokens if loaded.model.lm_head is None else loaded.model.lm_head
    return Pass(h @ head.weight.to(dtype).T, queries, keys, [*inputs, h])


def importance(q_THd: Tensor, k_TKd: Tensor) -> Tensor:
    """Attention, pooled over neighbours, that masked tokens side by side pay to each other."""
    k_THd = k_TKd.repeat_interleave(q_THd.shape[1] // k_TKd.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q_THd, k_THd) * q_THd.shape[-1] ** -0.5
    return F.max_pool1d(scores, 3, stride=1, padding=1).softmax(-1).sum((0, 1))
