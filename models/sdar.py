"""SDAR, dense: a Qwen3 decoder under a block mask (JetLM/SDAR-{1.7B,4B,8B}-Chat and relatives).

Follows training/model/SDAR-4B-Chat of JetAstra/SDAR (commit c2041a8); written anew from its
description.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Self

import torch
from pydantic import PositiveInt

from focus_ray.models.base import ModelConfig
from focus_ray.models.decoder import DecoderConfig, DecoderForCausalLM
from focus_ray.models.layers import FeedForward, SwiGLU
from focus_ray.models.parallel import Shards
from focus_ray.models.published import published_decoder

# Switches of the published configuration that this file does not compute otherwise.
ONLY_SUPPORTED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
}


class SdarConfig(DecoderConfig):
    """What SDAR computes with, under the names of its ``config.json``."""

    default_block_length: ClassVar[int] = 4
    default_mask_token_id: ClassVar[int] = 151669

    intermediate_size: PositiveInt

    @property
    def divided(self) -> dict[str, int]:
        return {**super().divided, "intermediate_size": self.intermediate_size}

    @classmethod
    def from_published(cls, fields: dict[str, object]) -> Self:
        return cls.model_validate(published_decoder(fields, cls.model_fields, ONLY_SUPPORTED))


class SdarForCausalLM(DecoderForCausalLM):
    """SDAR with its head."""

    config_class: ClassVar[type[ModelConfig]] = SdarConfig

    @classmethod
    def feed_forward(
        cls,
        config: ModelConfig,
        layer_index: int,
        stored_names: Collection[str],
        dtype: torch.dtype,
        shards: Shards,
    ) -> FeedForward:
        assert isinstance(config, SdarConfig)
        return SwiGLU(config.hidden_size, config.intermediate_size, dtype, shards)
