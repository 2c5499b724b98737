"""SDAR-MoE: Qwen3-MoE under a block mask (JetLM/SDAR-30B-A3B-Chat and relatives).

Follows modeling_sdar_moe.py as published in PKU-SEC-Lab/TEAM-MoE-dLLM (commit e9c502e); written
anew from its description.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from focus_ray.models.base import ModelConfig
from focus_ray.models.decoder import DecoderConfig, DecoderForCausalLM
from focus_ray.models.layers import FeedForward, SwiGLU
from focus_ray.models.moe import Experts, SoftmaxGate, SparseMLP
from focus_ray.models.parallel import Shards
from focus_ray.models.published import published_decoder
from focus_ray.models.sdar import ONLY_SUPPORTED, SdarConfig


class SdarMoeConfig(DecoderConfig):
    """What SDAR-MoE computes with; defaults are those of Qwen3-MoE's configuration class."""

    default_block_length: ClassVar[int] = SdarConfig.default_block_length
    default_mask_token_id: ClassVar[int] = SdarConfig.default_mask_token_id

    intermediate_size: PositiveInt | None = Field(None, description="Of dense layers, if any.")
    moe_intermediate_size: PositiveInt = Field(description="Of one expert.")
    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt = 8
    norm_topk_prob: bool = False
    decoder_sparse_step: PositiveInt = 1
    mlp_only_layers: tuple[NonNegativeInt, ...] = ()

    @model_validator(mode="after")
    def _there_are_experts_enough(self) -> Self:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is above num_experts "
                f"{self.num_experts}"
            )
        return self

    @model_validator(mode="after")
    def _dense_layers_have_a_size(self) -> Self:
        if self.dense_layers and self.intermediate_size is None:
            raise ValueError(
                f"intermediate_size is missing, and layers {self.dense_layers} are dense"
            )
        return self

    @property
    def dense_layers(self) -> list[int]:
        """Layers without experts."""
        return [index for index in range(self.num_hidden_layers) if not self.is_sparse(index)]

    @property
    def divided(self) -> dict[str, int]:
        sizes = {"moe_intermediate_size": self.moe_intermediate_size}
        if self.dense_layers and self.intermediate_size is not None:
            sizes["intermediate_size"] = self.intermediate_size
        return {**super().divided, **sizes}

    def is_sparse(self, layer_index: int) -> bool:
        """Whether a layer has experts; any other is dense."""
        on_step = (layer_index + 1) % self.decoder_sparse_step == 0
        return on_step and layer_index not in self.mlp_only_layers

    @classmethod
    def from_published(cls, fields: dict[str, object]) -> Self:
        # A list that the authors' class takes for empty where it is null.
        fields = {**fields, "mlp_only_layers": fields.get("mlp_only_layers") or []}
        return cls.model_validate(published_decoder(fields, cls.model_fields, ONLY_SUPPORTED))


class SdarMoeForCausalLM(DecoderForCausalLM):
    """SDAR-MoE with its head."""

    config_class: ClassVar[type[ModelConfig]] = SdarMoeConfig

    @classmethod
    def feed_forward(
        cls,
        config: ModelConfig,
        layer_index: int,
        stored_names: Collection[str],
        dtype: torch.dtype,
        shards: Shards,
    ) -> FeedForward:
        assert isinstance(config, SdarMoeConfig)
        hidden, num_experts = config.hidden_size, config.num_experts
        if not config.is_sparse(layer_index):
            assert config.intermediate_size is not None
            return SwiGLU(hidden, config.intermediate_size, dtype, shards)
        gate = SoftmaxGate(
            hidden,
            num_experts,
            config.num_experts_per_tok,
            dtype,
            renormalise=config.norm_topk_prob,
        )
        experts = Experts(num_experts, hidden, config.moe_intermediate_size, dtype, shards)
        return SparseMLP(gate, experts, None)
