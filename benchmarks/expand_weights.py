"""The weights of a larger model that computes what a small one does; why, says ``expand.py``.

Shape letters of the larger model: D hidden size, H query heads, K KV heads, d head size; N rows of
any weight; V tokens of the small vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from focus_ray.benchmarks.expand_feed_forward import FeedForwardExpansion, Network
from focus_ray.benchmarks.expand_layout import (
    TINY,
    attended_groups,
    head_sources,
    paired_queries,
    rotary_dims,
)
from focus_ray.benchmarks.expand_values import Values, size_of
from focus_ray.models.decoder import Attention, DecoderForCausalLM, DecoderLayer
from focus_ray.models.layers import SwiGLU
from focus_ray.models.moe import SparseMLP

# A number that stands in one dimension of the stream whatever the token, in units of a usual
# embedding: too small to be heard in any sum it goes into.
CONSTANT = 2.0**-24
# The last norm makes it large, and the head subtracts it from the logits of surplus tokens.
CONSTANT_GAIN = 2.0**44


class Expansion:
    """Fills the weights of a larger model, part by part.

    Args:
        small: the small model, dense.
        large: the model to fill in, of any family.
        whitening: for layers with experts: ``expand_routing.whitening_of(small)``.
        seed: of everything random.

    Raises:
        ValueError: the larger shape cannot hold the small one.
    """

    def __init__(
        self,
        small: DecoderForCausalLM,
        large: DecoderForCausalLM,
        whitening: Sequence[Tensor],
        seed: int,
    ) -> None:
        self.small, self.large, self.whitening = small, large, whitening
        self.small_layers, self.large_layers = layers_of(small), layers_of(large)
        from_config, to_config = small.config, large.config
        weight = large.model.embed_tokens.weight
        self.values = values = Values(from_config, to_config, weight.device, weight.dtype, seed)
        num_units = _dense(self.small_layers[0]).down_proj.weight.shape[1]
        self.feed_forward = FeedForwardExpansion(values, num_units)

        queries, kvs = head_sources(
            (from_config.num_attention_heads, from_config.num_key_value_heads),
            (to_config.num_attention_heads, to_config.num_key_value_heads),
        )
        small_dim, large_dim = from_config.head_dim, to_config.head_dim
        turned, live = rotary_dims(
            (small_dim, from_config.rope_theta),
            (to_config.rotary_dim, to_config.rope_theta),
            large_dim,
        )
        num_copied = large_dim // small_dim * small_dim
        value_dims = [i % small_dim for i in range(num_copied)]
        value_dims += range(small_dim, small_dim + large_dim - num_copied)

        self.query_H, self.kv_K = values.tensor(queries), values.tensor(kvs)
        self.turned_d, self.live_d = values.tensor(turned), values.tensor(live)
        self.value_d = values.tensor(value_dims)
        # Scores grow with the square root of the head size; queries take that back.
        self.query_growth = num_copied / large_dim * math.sqrt(large_dim / small_dim)
        self.constant = None
        if to_config.vocab_size > from_config.vocab_size:
            self.constant = values.stream.index(from_config.hidden_size)

        heads = from_config.num_attention_heads
        self.read_attended = values.reading(
            attended_groups(queries, value_dims, heads, small_dim), heads * small_dim
        )
        # In a surplus layer, equal heads stand side by side.
        paired = paired_queries(to_config.num_attention_heads, to_config.num_key_value_heads)
        attended = attended_groups(paired, range(large_dim), len(paired), large_dim)
        self.paired_rows_N = values.tensor(attended)
        self.cancel_attended = values.reading(attended, 0)

    def fill(self, token_V: Tensor) -> None:
        """Everything.

        Args:
            token_V: id in the larger vocabulary of each token of the small one.
        """
        self._fill_ends(token_V)
        num_own = len(self.small_layers)
        for index, large in enumerate(self.large_layers):
            if index < num_own:
                self._fill_layer(large, self.small_layers[index])
            else:
                self._fill_surplus_layer(large, self.small_layers[-1])
            self._fill_feed_forward(large, min(index, num_own))

    def _fill_ends(self, token_V: Tensor) -> None:
        """Embedding, last norm and head."""
        values, small, large = self.values, self.small, self.large
        assert large.lm_head is not None
        embedding, norm, head = (
            large.model.embed_tokens.weight,
            large.model.norm.weight,
            large.lm_head.weight,
        )
        small_embedding = values.own(small.model.embed_tokens.weight)
        small_head = small_embedding if small.lm_head is None else values.own(small.lm_head.weight)
        read_VW = values.read(small_head, values.read_stream)
        values.randomise(embedding, like=small_embedding)
        values.randomise(head, like=read_VW)
        values.fill_stream_norm(norm, values.own(small.model.norm.weight))
        embedding[token_V] = values.written(small_embedding.T).T
        if self.constant is not None:
            embedding[:, self.constant] = CONSTANT * size_of(small_embedding)
            norm[self.constant] = CONSTANT_GAIN
            head[:, self.constant] = -1.0
            read_VW[:, self.constant] *= TINY
        head[token_V] = read_VW

    def _fill_layer(self, large: DecoderLayer, small: DecoderLayer) -> None:
        """Attention and norms of a layer of the small model, at the same place."""
        values = self.values
        for of_large, of_small in (
            (large.input_layernorm, small.input_layernorm),
            (large.post_attention_layernorm, small.post_attention_layernorm),
        ):
            values.fill_stream_norm(of_large.weight, values.own(of_small.weight))
        for large_ND, small_ND, head_N, row_d, own in zip(
            _projections(large.self_attn),
            _projections(small.self_attn),
            (self.query_H, self.kv_K, self.kv_K),
            (self.turned_d, self.turned_d, self.value_d),
            (TINY, TINY, 1.0),
            strict=True,
        ):
            read = values.read(values.own(small_ND), values.read_stream)
            heads = read.split(self.small.config.head_dim)
            rows = torch.stack([values.rows(head, row_d, own) for head in heads])
            large_ND.copy_(rows[head_N].flatten(0, 1))
        self._fill_head_norms(large.self_attn, small.self_attn)
        output = values.read(values.own(small.self_attn.o_proj.weight), self.read_attended)
        large.self_attn.o_proj.weight.copy_(values.written(output))

    def _fill_surplus_layer(self, large: DecoderLayer, like: DecoderLayer) -> None:
        """Random attention that adds nothing: equal heads are subtracted."""
        values, attention = self.values, large.self_attn
        values.fill_any_norm(large.input_layernorm.weight)
        # As the last norm, so that a gate's inputs are those that its whitening knows.
        values.fill_stream_norm(
            large.post_attention_layernorm.weight, values.own(self.small.model.norm.weight)
        )
        for norm in (attention.q_norm, attention.k_norm):
            values.fill_any_norm(norm.weight)
        query_ND, *others = _projections(attention)
        small_query_ND, *small_others = _projections(like.self_attn)
        values.randomise(query_ND, like=small_query_ND)
        query_ND.copy_(query_ND[self.paired_rows_N])
        for large_ND, small_ND in zip(others, small_others, strict=True):
            values.randomise(large_ND, like=small_ND)
        output = values.read(values.own(like.self_attn.o_proj.weight), self.cancel_attended)
        attention.o_proj.weight.copy_(values.written(output))

    def _fill_feed_forward(self, large: DecoderLayer, index: int) -> None:
        """What the small model's layer ``index`` adds, or nothing where it has none."""
        carries = index < len(self.small_layers)
        like = self.small_layers[index if carries else -1]
        small = Network(*map(self.values.own, vars(Network.of(_dense(like))).values()))
        if isinstance(large.mlp, SparseMLP):
            self.feed_forward.fill_sparse(large.mlp, small, self.whitening[index], carries=carries)
        else:
            self.feed_forward.fill_dense(_dense(large), small, carries=carries)

    def _fill_head_norms(self, large: Attention, small: Attention) -> None:
        for of_large, of_small, scale, unread in (
            (large.q_norm, small.q_norm, self.query_growth, TINY),
            (large.k_norm, small.k_norm, 1.0, 1.0),
        ):
            small_d, large_d = self.values.own(of_small.weight).float(), of_large.weight
            self.values.fill_any_norm(large_d)
            scaled = small_d[self.turned_d.clamp(max=len(small_d) - 1)] * scale
            large_d.copy_(torch.where(self.live_d, scaled, large_d.float() * unread))


def layers_of(model: DecoderForCausalLM) -> list[DecoderLayer]:
    return [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]


def _dense(layer: DecoderLayer) -> SwiGLU:
    assert isinstance(layer.mlp, SwiGLU)
    return layer.mlp


def _projections(attention: Attention) -> tuple[Tensor, ...]:
    """Weights of queries, keys and values, as views."""
    fused = attention.qkv_proj
    return tuple(fused.weight.split([len(part) for part in fused.parts.values()]))
