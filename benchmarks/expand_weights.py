"""The weights of a larger model that computes what a small one does; why, says ``expand.py``.

Shape letters of the larger model: D hidden size, I intermediate size, H query heads, K KV heads,
d head size; N rows and W columns of any weight; V tokens of the small vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from focus_ray.benchmarks.expand_layout import (
    TINY,
    Reading,
    attended_groups,
    head_sources,
    paired_queries,
    reading_of,
    rotary_dims,
    stream_groups,
    unit_groups,
)
from focus_ray.models.decoder import HEAD_WEIGHT
from focus_ray.models.sdar import SdarConfig

EMBEDDING, LAST_NORM = "model.embed_tokens.weight", "model.norm.weight"

# A number that stands in one dimension of the stream whatever the token, in units of a usual
# embedding: too small to be heard in any sum it goes into.
CONSTANT = 2.0**-24
# The last norm makes it large, and the head subtracts it from the logits of surplus tokens.
CONSTANT_GAIN = 2.0**44


def num_copies(small: SdarConfig, large: SdarConfig) -> int:
    """How often the larger stream holds the small one; surplus tokens need a dimension besides.

    Raises:
        ValueError: not once.
    """
    num_spare = int(large.vocab_size > small.vocab_size)
    copies = (large.hidden_size - num_spare) // small.hidden_size
    if copies < 1:
        raise ValueError(
            f"hidden_size {large.hidden_size} must be above the small model's {small.hidden_size}, "
            f"because vocab_size {large.vocab_size} is above its {small.vocab_size}"
        )
    return copies


def stream_share(small: SdarConfig, large: SdarConfig) -> float:
    """Mean square of the larger stream in units of the small one's."""
    return num_copies(small, large) * small.hidden_size / large.hidden_size


class Expansion:
    """Fills the weights of a larger model, part by part.

    Args:
        small: weights of the small model by name, where ``large`` is and of its dtype.
        large: the weights to fill in, by name.
        from_config: shape of the small model.
        to_config: shape of the larger one.
        seed: of everything random.

    Raises:
        ValueError: the larger shape cannot hold the small one.
    """

    def __init__(
        self,
        small: Mapping[str, Tensor],
        large: Mapping[str, Tensor],
        from_config: SdarConfig,
        to_config: SdarConfig,
        seed: int,
    ) -> None:
        self.small, self.large = small, large
        self.from_config, self.to_config = from_config, to_config
        self.device, self.dtype = large[EMBEDDING].device, large[EMBEDDING].dtype
        self.generator = torch.Generator(self.device).manual_seed(seed)

        small_size, large_size = from_config.hidden_size, to_config.hidden_size
        copies = num_copies(from_config, to_config)
        stream = stream_groups(small_size, large_size, copies, seed=seed)
        units = unit_groups(
            from_config.intermediate_size, to_config.intermediate_size, seed=seed + 1
        )
        queries, kvs = head_sources(
            (from_config.num_attention_heads, from_config.num_key_value_heads),
            (to_config.num_attention_heads, to_config.num_key_value_heads),
        )
        small_dim, large_dim = from_config.head_dim, to_config.head_dim
        turned, live = rotary_dims(
            (small_dim, from_config.rope_theta), (large_dim, to_config.rope_theta)
        )
        num_copied = large_dim // small_dim * small_dim
        values = [i % small_dim for i in range(num_copied)]
        values += range(small_dim, small_dim + large_dim - num_copied)

        self.stream_D, self.unit_I = self._tensor(stream), self._tensor(units)
        self.query_H, self.kv_K = self._tensor(queries), self._tensor(kvs)
        self.turned_d, self.live_d = self._tensor(turned), self._tensor(live)
        self.value_d = self._tensor(values)
        self.constant = None
        if to_config.vocab_size > from_config.vocab_size:
            self.constant = stream.index(small_size)
        self.head_share = num_copied / large_dim

        heads = from_config.num_attention_heads
        self.read_stream = self._reading(stream, small_size, lone=1.0)
        self.read_units = self._reading(units, from_config.intermediate_size)
        self.read_attended = self._reading(
            attended_groups(queries, values, heads, small_dim), heads * small_dim
        )
        # In a surplus layer, equal heads and equal units stand side by side.
        paired = paired_queries(to_config.num_attention_heads, to_config.num_key_value_heads)
        attended = attended_groups(paired, range(large_dim), len(paired), large_dim)
        paired_units = [unit - unit % 2 for unit in range(len(units))]
        self.paired_rows_N, self.paired_I = self._tensor(attended), self._tensor(paired_units)
        self.cancel_attended = self._reading(attended, 0)
        self.cancel_units = self._reading(paired_units, 0)

    def fill_ends(self, token_V: Tensor) -> None:
        """Embedding, last norm and head.

        Args:
            token_V: id in the larger vocabulary of each token of the small one.
        """
        embedding, head = self.large[EMBEDDING], self.large[HEAD_WEIGHT]
        small_embedding = self.small[EMBEDDING]
        small_head = self.small.get(HEAD_WEIGHT, small_embedding)
        read_VW = self._read(small_head, self.read_stream)
        self._randomise(embedding, like=small_embedding)
        self._randomise(head, like=read_VW)
        self._fill_stream_norm(LAST_NORM)
        embedding[token_V] = self._written(small_embedding.T).T
        if self.constant is not None:
            embedding[:, self.constant] = CONSTANT * _size(small_embedding)
            self.large[LAST_NORM][self.constant] = CONSTANT_GAIN
            head[:, self.constant] = -1.0
            read_VW[:, self.constant] *= TINY
        head[token_V] = read_VW

    def fill_layer(self, index: int) -> None:
        """A layer of the small model, at the same place."""
        at = f"model.layers.{index}."
        attention, mlp = f"{at}self_attn.", f"{at}mlp."
        self._fill_stream_norm(f"{at}input_layernorm.weight")
        self._fill_stream_norm(f"{at}post_attention_layernorm.weight")
        for name, head_N, row_d, own in (
            (f"{attention}q_proj.weight", self.query_H, self.turned_d, TINY),
            (f"{attention}k_proj.weight", self.kv_K, self.turned_d, TINY),
            (f"{attention}v_proj.weight", self.kv_K, self.value_d, 1.0),
        ):
            read = self._read(self.small[name], self.read_stream)
            heads = read.split(self.from_config.head_dim)
            rows = torch.stack([self._rows(head, row_d, own) for head in heads])
            self.large[name].copy_(rows[head_N].flatten(0, 1))
        self._fill_head_norms(attention)
        for name in (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"):
            read = self._read(self.small[name], self.read_stream)
            self.large[name].copy_(self._rows(read, self.unit_I, 1.0))
        for name, reading in (
            (f"{attention}o_proj.weight", self.read_attended),
            (f"{mlp}down_proj.weight", self.read_units),
        ):
            self.large[name].copy_(self._written(self._read(self.small[name], reading)))

    def fill_surplus_layer(self, index: int) -> None:
        """A random layer that adds nothing: equal heads, and equal units, are subtracted."""
        at, like = (f"model.layers.{i}." for i in (index, self.from_config.num_hidden_layers - 1))
        for name in ("input_layernorm", "post_attention_layernorm"):
            self._fill_any_norm(self.large[f"{at}{name}.weight"])
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            self._fill_any_norm(self.large[f"{at}{name}.weight"])
        for part, same_N in (
            ("self_attn.q", self.paired_rows_N),
            ("self_attn.k", None),
            ("self_attn.v", None),
            ("mlp.gate", self.paired_I),
            ("mlp.up", self.paired_I),
        ):
            weight = self.large[f"{at}{part}_proj.weight"]
            self._randomise(weight, like=self.small[f"{like}{part}_proj.weight"])
            if same_N is not None:
                weight.copy_(weight[same_N])
        for part, reading in (
            ("self_attn.o", self.cancel_attended),
            ("mlp.down", self.cancel_units),
        ):
            small = self.small[f"{like}{part}_proj.weight"]
            self.large[f"{at}{part}_proj.weight"].copy_(self._written(self._read(small, reading)))

    def _read(self, small_NW: Tensor, reading: Reading) -> Tensor:
        """Columns of the larger model for the small model's rows; random, and the same in sum."""
        width = len(reading.source_W)
        std = _size(small_NW) * math.sqrt(small_NW.shape[1] / width)
        noise = self._random(len(small_NW), reading.num_noise, std=std)
        # One of the two is zero in every column, so that nothing is rounded.
        return small_NW[:, reading.source_W] * reading.share_W + (
            noise[:, reading.noise_W] * reading.scale_W
        )

    def _rows(self, weight_NW: Tensor, row_N: Tensor, own: float) -> Tensor:
        """Rows ``row_N`` of a weight; beyond its end follow random ones, ``own`` times as large."""
        num_own = max(0, int(row_N.max()) + 1 - len(weight_NW))
        more = self._random(num_own, weight_NW.shape[1], std=own * _size(weight_NW))
        return torch.cat([weight_NW, more])[row_N]

    def _written(self, weight_NW: Tensor) -> Tensor:
        """Rows for what is added to the stream: each copy the same, next to nothing elsewhere."""
        return self._rows(weight_NW, self.stream_D, TINY)

    def _fill_stream_norm(self, name: str) -> None:
        """The norm divides by less where the stream has dimensions left over."""
        small, large = self.small[name].float(), self.large[name]
        scale = math.sqrt(stream_share(self.from_config, self.to_config))
        self._fill_any_norm(large)
        carried_D = self.stream_D < len(small)
        scaled = small[self.stream_D.clamp(max=len(small) - 1)] * scale
        large.copy_(torch.where(carried_D, scaled, large.float()))

    def _fill_head_norms(self, attention: str) -> None:
        """Scores grow with the square root of the head size; queries take that back."""
        growth = self.head_share * math.sqrt(self.to_config.head_dim / self.from_config.head_dim)
        for name, scale, unread in (("q_norm", growth, TINY), ("k_norm", 1.0, 1.0)):
            small = self.small[f"{attention}{name}.weight"].float()
            large = self.large[f"{attention}{name}.weight"]
            self._fill_any_norm(large)
            scaled = small[self.turned_d.clamp(max=len(small) - 1)] * scale
            large.copy_(torch.where(self.live_d, scaled, large.float() * unread))

    def _fill_any_norm(self, weight: Tensor) -> None:
        weight.uniform_(0.5, 1.5, generator=self.generator)

    def _randomise(self, weight_NW: Tensor, *, like: Tensor) -> None:
        """Normal values of such a size that what is computed is as large as with ``like``."""
        std = _size(like) * math.sqrt(like.shape[1] / weight_NW.shape[1])
        weight_NW.normal_(0.0, std, generator=self.generator)

    def _random(self, rows: int, columns: int, *, std: float) -> Tensor:
        values = torch.empty(rows, columns, device=self.device, dtype=self.dtype)
        return values.normal_(0.0, std, generator=self.generator)

    def _reading(self, groups: Sequence[int], num_sources: int, lone: float = TINY) -> Reading:
        return reading_of(groups, num_sources, lone=lone).to(self.device, self.dtype)

    def _tensor(self, values: Sequence[int] | Sequence[bool]) -> Tensor:
        return torch.tensor(values, device=self.device)


def _size(weight: Tensor) -> float:
    return float(weight.float().square().mean().sqrt())
