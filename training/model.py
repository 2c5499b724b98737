"""SDAR for training: parameters named as in the published checkpoints, layers as one pure function.

Letters of tensor shapes: R rows, T positions of a row, D hidden size, H query heads, K KV heads,
d head size, V vocabulary. The function form lets one compiled graph serve all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q ``[R, H, T, d]``, k and v ``[R, K, T, d]`` to ``[R, H, T, d]``."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers of ``config.json``; the defaults are sdar-tiny."""

    vocab_size: int = 4096
    hidden_size: int = 320
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 2048
    block_size: int = 32
    mask_token_id: int = 4095
    eos_token_id: int = 4092
    end_of_turn_id: int = 4094


class _Weight(nn.Module):
    """A bare matrix or vector under the name ``weight``."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))


class _Attention(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        queries = shape.num_attention_heads * shape.head_dim
        keys = shape.num_key_value_heads * shape.head_dim
        self.q_proj = _Weight(queries, shape.hidden_size)
        self.k_proj = _Weight(keys, shape.hidden_size)
        self.v_proj = _Weight(keys, shape.hidden_size)
        self.o_proj = _Weight(shape.hidden_size, queries)
        self.q_norm = _Weight(shape.head_dim)
        self.k_norm = _Weight(shape.head_dim)


class _Mlp(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = _Weight(shape.intermediate_size, shape.hidden_size)
        self.up_proj = _Weight(shape.intermediate_size, shape.hidden_size)
        self.down_proj = _Weight(shape.hidden_size, shape.intermediate_size)


class _Layer(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = _Weight(shape.hidden_size)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = _Weight(shape.hidden_size)
        self.mlp = _Mlp(shape)

    def weights(self) -> tuple[Tensor, ...]:
        """In the order ``layer_forward`` takes them."""
        attention, mlp = self.self_attn, self.mlp
        return (
            self.input_layernorm.weight,
            attention.q_proj.weight,
            attention.k_proj.weight,
            attention.v_proj.weight,
            attention.o_proj.weight,
            attention.q_norm.weight,
            attention.k_norm.weight,
            self.post_attention_layernorm.weight,
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.down_proj.weight,
        )


class _Body(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embed_tokens = _Weight(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = _Weight(shape.hidden_size)


class Sdar(nn.Module):
    """The parameters, and the loop over layers; attention is the caller's."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = _Body(shape)
        self.lm_head = _Weight(shape.vocab_size, shape.hidden_size)
        self._initialise()

    def _initialise(self) -> None:
        """Blocks start as the identity (zero output matrices), the head nearly uniform."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                continue
            if "embed_tokens" in name:
                nn.init.normal_(parameter, std=0.5)
            elif "lm_head" in name:
                nn.init.normal_(parameter, std=0.002)
            elif "o_proj" in name or "down_proj" in name:
                nn.init.zeros_(parameter)
            else:
                bound = math.sqrt(3 / parameter.shape[1])
                nn.init.uniform_(parameter, -bound, bound)

    def layer_weights(self) -> Iterator[tuple[Tensor, ...]]:
        for layer in self.model.layers:
            assert isinstance(layer, _Layer)
            yield layer.weights()

    def hidden(
        self,
        ids_RT: Tensor,
        cos_RTd: Tensor,
        sin_RTd: Tensor,
        run_layer: Callable[..., Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        """``[R, T, D]`` after the last norm.

        ``run_layer(layer_index, x_RTD, cos, sin, *weights)`` computes one layer.
        """
        x_RTD = F.embedding(ids_RT, self.model.embed_tokens.weight).to(dtype)
        cos, sin = cos_RTd[:, None].to(dtype), sin_RTd[:, None].to(dtype)
        for index, weights in enumerate(self.layer_weights()):
            x_RTD = run_layer(index, x_RTD, cos, sin, *weights)
        return rms_norm(x_RTD, self.model.norm.weight, self.shape.rms_norm_eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In float32, back in the dtype of ``x``."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split: dimension j turns with j + d/2."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def rotary_tables(shape: ModelShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, ``[max_position_embeddings, d]`` float32."""
    steps = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
    positions = torch.arange(shape.max_position_embeddings, dtype=torch.float64)
    angles = torch.outer(positions, shape.rope_theta**-steps).repeat(1, 2)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def layer_forward(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
    head_dim: int,
    eps: float,
    norm_in: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    norm_post: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
) -> Tensor:
    """One decoder layer on ``x [R, T, D]``; q, k and v, gate and up are one product each."""
    rows, length, _ = x.shape
    dtype = x.dtype
    wide, narrow = w_q.shape[0], w_k.shape[0]
    h = rms_norm(x, norm_in, eps)
    q, k, v = F.linear(h, torch.cat([w_q, w_k, w_v]).to(dtype)).split([wide, narrow, narrow], -1)
    q = rms_norm(q.view(rows, length, wide // head_dim, head_dim), q_norm, eps).transpose(1, 2)
    k = rms_norm(k.view(rows, length, narrow // head_dim, head_dim), k_norm, eps).transpose(1, 2)
    v = v.view(rows, length, narrow // head_dim, head_dim).transpose(1, 2)
    attended = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
    x = x + F.linear(attended.transpose(1, 2).reshape(rows, length, wide), w_o.to(dtype))
    h = rms_norm(x, norm_post, eps)
    gate, up = F.linear(h, torch.cat([w_gate, w_up]).to(dtype)).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, w_down.to(dtype))
