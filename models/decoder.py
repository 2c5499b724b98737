"""The decoder that all families share: a pre-norm transformer under a block mask, and its head.

Families differ in their configuration, in what stands between the norm after attention and the
stream, and in the names of their weights. Attributes have the names of SDAR's checkpoints; a family
that uses others lists them in ``published_names``.

T tokens, D hidden size, H query heads, K KV heads, d head size, R rows, V vocabulary; of heads and
vocabulary, what the rank holds.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import ClassVar, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from focus_ray.kernels.linear import linear
from focus_ray.kernels.norm_rotary_fill import norm_rotary_fill
from focus_ray.kernels.paged_attention import paged_attention
from focus_ray.kernels.partial_sums import Summand
from focus_ray.models.base import BlockDiffusionModel, ModelConfig, OnLayer, ignore_layer
from focus_ray.models.eviction import Eviction
from focus_ray.models.kv_cache import KVCache, LayerKV
from focus_ray.models.layers import (
    Embedding,
    FeedForward,
    FusedLinear,
    Linear,
    RMSNorm,
    Rotary,
    SummandLinear,
    stored_shards,
)
from focus_ray.models.parallel import WHOLE, Shard, Shards
from focus_ray.models.step import StepTensors

HEAD_WEIGHT = "lm_head.weight"


class DecoderConfig(ModelConfig):
    """What every decoder computes with, under the names of its ``config.json``."""

    stores_qkv_whole: ClassVar[bool] = False
    """Checkpoints store the projections of queries, keys and values as one weight."""

    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    rms_norm_eps: PositiveFloat
    rope_theta: PositiveFloat
    tie_word_embeddings: bool | None = Field(
        None, description="False: the head must be stored; else a missing head is the embedding."
    )

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that turn with the position."""
        return self.head_dim

    @property
    def divided(self) -> dict[str, int]:
        return {**super().divided, "num_attention_heads": self.num_attention_heads}

    @model_validator(mode="after")
    def _query_heads_share_kv_heads_evenly(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        return self

    @model_validator(mode="after")
    def _head_dim_is_even(self) -> Self:
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary needs pairs")
        return self


class Attention(nn.Module):
    """Grouped-query attention with a norm on each query and key head before the rotation.

    Ranks divide the query heads; each holds the KV heads of its own, which several ranks may do.
    """

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, shards: Shards = WHOLE) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries = shards.part(config.num_attention_heads).times(config.head_dim)
        kv = shards.part(config.num_key_value_heads).times(config.head_dim)
        self.qkv_proj = FusedLinear(
            config.hidden_size,
            {"q_proj": queries, "k_proj": kv, "v_proj": kv},
            dtype,
            stored_whole=config.stores_qkv_whole,
        )
        self.o_proj = SummandLinear(queries.whole, config.hidden_size, dtype, shards)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)

    def write_kv(
        self,
        x_TD: Tensor,
        rotary_P2r2: Tensor,
        step: StepTensors,
        layer_kv: LayerKV,
        keep_keys: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries ``[T, H, d]``, and keys ``[T, K, d]`` if wanted; KV is in its slots."""
        return norm_rotary_fill(
            self.qkv_proj(x_TD),
            self.q_norm.weight,
            self.k_norm.weight,
            self.q_norm.eps,
            rotary_P2r2,
            step.positions_T,
            step.slot_T,
            layer_kv.key_pages,
            layer_kv.value_pages,
            keep_keys=keep_keys,
        )

    def attend(self, q_THd: Tensor, step: StepTensors, layer_kv: LayerKV) -> Summand:
        """What the queries read from the pages, projected to ``[T, D]``."""
        out_THd = paged_attention(
            q_THd,
            layer_kv.key_pages,
            layer_kv.value_pages,
            step.page_table_MP,
            step.row_table_S,
            step.row_offsets_S1,
            step.kv_limit_T,
            max_row_len=step.max_row_len,
            max_kv_len=step.max_kv_len,
            busy_rows=step.busy_rows,
            scale=self.head_dim**-0.5,
        )
        projected_TD: Summand = self.o_proj(out_THd.flatten(1))
        return projected_TD


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each on a normalised input and added to the stream.

    What feed-forward adds is handed over beside the stream: the next norm adds it on its way. What
    ranks make of their shards of either half is added up here, and the stream is the same on all.
    """

    def __init__(
        self,
        config: DecoderConfig,
        mlp: FeedForward,
        dtype: torch.dtype,
        shards: Shards = WHOLE,
    ) -> None:
        super().__init__()
        self.shards = shards
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, dtype, shards)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = mlp

    def begin(
        self,
        x_TD: Tensor,
        added_TD: Summand | None,
        rotary_P2r2: Tensor,
        step: StepTensors,
        layer_kv: LayerKV,
        *,
        keep_keys: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Up to the keys and values in their slots.

        Returns:
            The stream, the queries, and the keys if they are wanted.
        """
        normed_TD, x_TD = self.input_layernorm(x_TD, added_TD)
        attention = self.self_attn
        q_THd, k_TKd = attention.write_kv(normed_TD, rotary_P2r2, step, layer_kv, keep_keys)
        return x_TD, q_THd, k_TKd

    def finish(
        self, x_TD: Tensor, q_THd: Tensor, step: StepTensors, layer_kv: LayerKV
    ) -> tuple[Tensor, Summand]:
        """From the queries on, for all tokens or for those that are retained.

        Returns:
            The stream, and what is still to be added to it.
        """
        attended_TD = self._of_all_ranks(self.self_attn.attend(q_THd, step, layer_kv))
        normed_TD, x_TD = self.post_attention_layernorm(x_TD, attended_TD)
        return x_TD, self._of_all_ranks(self.mlp(normed_TD, step.num_tokens_1))

    def _of_all_ranks(self, added_TD: Summand) -> Summand:
        if self.shards.size == 1:
            return added_TD
        assert isinstance(added_TD, Tensor), "what a rank of several adds is whole"
        return self.shards.add_up(added_TD)


class Decoder(nn.Module):
    """Embedding, layers, final norm: everything below the head."""

    def __init__(
        self,
        config: DecoderConfig,
        feed_forward: Callable[[int], FeedForward],
        dtype: torch.dtype,
        shards: Shards,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, shards)
        self.layers = nn.ModuleList(
            DecoderLayer(config, feed_forward(index), dtype, shards)
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.rotary = Rotary(
            config.max_position_embeddings, config.rotary_dim, config.rope_theta, dtype
        )

    def begin(
        self, step: StepTensors, cache: KVCache, eviction: Eviction | None, on_layer: OnLayer
    ) -> tuple[Tensor, Tensor]:
        rotary_P2r2, evicts = self.rotary.table_P2r2, eviction is not None
        first, *others = self._layers()
        first_kv = cache.layer(0)
        x_TD: Tensor = self.embed_tokens(step.token_ids_T)
        x_TD, q_THd, k_TKd = first.begin(x_TD, None, rotary_P2r2, step, first_kv, keep_keys=evicts)
        if not others:
            assert eviction is None, "eviction compares two layers, and there is one"
            return x_TD, q_THd
        if eviction is not None and k_TKd is not None:
            eviction.observe(q_THd, k_TKd, step)
        x_TD, added_TD = first.finish(x_TD, q_THd, step, first_kv)
        on_layer(1)
        x_TD, q_THd, k_TKd = others[0].begin(
            x_TD, added_TD, rotary_P2r2, step, cache.layer(1), keep_keys=evicts
        )
        if eviction is not None and k_TKd is not None:
            eviction.choose(q_THd, k_TKd, step)
        return x_TD, q_THd

    def finish(
        self,
        x_RD: Tensor,
        q_RHd: Tensor,
        step: StepTensors,
        cache: KVCache,
        on_layer: OnLayer,
    ) -> Tensor:
        layers = self._layers()
        begun = min(1, len(layers) - 1)
        x_RD, added_RD = layers[begun].finish(x_RD, q_RHd, step, cache.layer(begun))
        for index, layer in enumerate(layers[begun + 1 :], begun + 1):
            on_layer(index)
            layer_kv = cache.layer(index)
            x_RD, q_RHd, _ = layer.begin(x_RD, added_RD, self.rotary.table_P2r2, step, layer_kv)
            x_RD, added_RD = layer.finish(x_RD, q_RHd, step, layer_kv)
        hidden_RD: Tensor
        hidden_RD, _ = self.norm(x_RD, added_RD)
        return hidden_RD

    def _layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]


class DecoderForCausalLM(BlockDiffusionModel):
    """A decoder with its head, which is the embedding itself where the checkpoint ties them."""

    published_names: ClassVar[Mapping[str, str]] = {}
    """What a checkpoint calls the parts that have another name here; whole words between dots."""

    def __init__(
        self,
        config: DecoderConfig,
        feed_forward: Callable[[int], FeedForward],
        *,
        tied: bool,
        dtype: torch.dtype,
        shards: Shards,
    ) -> None:
        super().__init__()
        self.config = config
        self._shards = shards
        self.model = Decoder(config, feed_forward, dtype, shards)
        self.lm_head = (
            None if tied else Linear(config.hidden_size, config.vocab_size, dtype, shards)
        )

    @classmethod
    @abstractmethod
    def feed_forward(
        cls,
        config: ModelConfig,
        layer_index: int,
        stored_names: Collection[str],
        dtype: torch.dtype,
        shards: Shards,
    ) -> FeedForward:
        """The second half of a layer, for a checkpoint that stores weights of these names."""

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        stored_names: Collection[str],
        dtype: torch.dtype,
        shards: Shards = WHOLE,
    ) -> Self:
        assert isinstance(config, DecoderConfig)
        # A stored head is used even where the flag says tied: whoever stored it trained with it.
        tied = HEAD_WEIGHT not in stored_names and config.tie_word_embeddings is not False

        def feed_forward(layer_index: int) -> FeedForward:
            return cls.feed_forward(config, layer_index, stored_names, dtype, shards)

        return cls(config, feed_forward, tied=tied, dtype=dtype, shards=shards)

    @property
    def shards(self) -> Shards:
        return self._shards

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def query_shape(self) -> tuple[int, int]:
        return len(self._shards.part(self.config.num_attention_heads)), self.config.head_dim

    @property
    def kv_shape(self) -> tuple[int, int]:
        return len(self._shards.part(self.config.num_key_value_heads)), self.config.head_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def begin(
        self,
        step: StepTensors,
        cache: KVCache,
        eviction: Eviction | None = None,
        on_layer: OnLayer = ignore_layer,
    ) -> tuple[Tensor, Tensor]:
        return self.model.begin(step, cache, eviction, on_layer)

    def finish(
        self,
        x_RD: Tensor,
        q_RHd: Tensor,
        step: StepTensors,
        cache: KVCache,
        on_layer: OnLayer = ignore_layer,
    ) -> Tensor:
        return self.model.finish(x_RD, q_RHd, step, cache, on_layer)

    def compute_logits(self, hidden_RD: Tensor) -> Tensor:
        if self.lm_head is None:
            return linear(hidden_RD, self.model.embed_tokens.weight)
        logits_RV: Tensor = self.lm_head(hidden_RD)
        return logits_RV

    def shard_map(self) -> dict[str, Shard]:
        return {
            _published(name, self.published_names): shard
            for name, shard in stored_shards(self).items()
        }


def _published(name: str, published_names: Mapping[str, str]) -> str:
    """The checkpoint's name of a weight."""
    for ours, theirs in published_names.items():
        name = re.sub(rf"(?<=\.){re.escape(ours)}(?=\.)", theirs, name)
    return name
