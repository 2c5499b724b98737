"""LLaDA2.0 and 2.1: BailingMoeV2 under a block mask (inclusionAI/LLaDA2.0-mini, -flash, -CAP).

Follows modeling_llada2_moe.py of LLaDA2.0-mini as published in sands-lab/FOCUS (commit 277f1d1) and
inclusionAI/dFactory (commit 92b6890); written anew from its description.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from focus_ray.models.base import ModelConfig
from focus_ray.models.decoder import DecoderConfig, DecoderForCausalLM
from focus_ray.models.layers import FeedForward, SwiGLU
from focus_ray.models.moe import Experts, GroupedGate, SparseMLP
from focus_ray.models.parallel import Shards
from focus_ray.models.published import published_decoder

# Switches of the published configuration that this file does not compute otherwise. The authors'
# class takes an absent use_bias for true; whether there are biases is seen in the weights then,
# which are refused by name.
ONLY_SUPPORTED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "use_bias": (False,),
    "use_qkv_bias": (False,),
    "use_qk_norm": (True,),
    "norm_head": (False,),
    "score_function": ("sigmoid", None),
    "router_dtype": ("fp32", "float32", None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    # The authors' code divides the weights by their sum whatever it says.
    "norm_topk_prob": (True, False, None),
}

# Of the authors' configuration class, where they say something about the computation. They are not
# the values of the published models.
CLASS_DEFAULTS: dict[str, object] = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
    "num_shared_experts": 0,
    "num_experts_per_tok": 2,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 0,
}


class Llada2Config(DecoderConfig):
    """What LLaDA2 computes with, under the names of its ``config.json``."""

    default_block_length: ClassVar[int] = 32
    default_mask_token_id: ClassVar[int] = 156895
    default_stop_token_ids: ClassVar[tuple[int, ...]] = (156892,)
    turn_ends: ClassVar[tuple[str, ...]] = ("<|role_end|>",)
    stores_qkv_whole: ClassVar[bool] = True

    intermediate_size: PositiveInt | None = Field(None, description="Of dense layers, if any.")
    moe_intermediate_size: PositiveInt = Field(description="Of one expert.")
    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    num_shared_experts: NonNegativeInt = Field(
        description="Experts of every token; stored as one of so many times the size."
    )
    n_group: PositiveInt
    topk_group: PositiveInt
    routed_scaling_factor: PositiveFloat
    moe_router_enable_expert_bias: bool | None = Field(
        None, description="None: if the checkpoint stores it."
    )
    first_k_dense_replace: NonNegativeInt = Field(description="Layers before the first experts.")
    partial_rotary_factor: float = Field(gt=0, le=1, description="Share of a head that turns.")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def divided(self) -> dict[str, int]:
        sizes = {"moe_intermediate_size": self.moe_intermediate_size}
        if self.first_k_dense_replace and self.intermediate_size is not None:
            sizes["intermediate_size"] = self.intermediate_size
        return {**super().divided, **sizes}

    @model_validator(mode="after")
    def _turning_dimensions_are_pairs(self) -> Self:
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} turns {self.rotary_dim} of "
                f"{self.head_dim} dimensions of a head; rotary needs pairs"
            )
        return self

    @model_validator(mode="after")
    def _groups_hold_the_experts(self) -> Self:
        if self.num_experts % self.n_group:
            raise ValueError(
                f"num_experts {self.num_experts} is not a multiple of n_group {self.n_group}"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group {self.topk_group} is above n_group {self.n_group}")
        num_eligible = self.num_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > num_eligible:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is above the {num_eligible} "
                f"experts of {self.topk_group} of {self.n_group} groups"
            )
        return self

    @model_validator(mode="after")
    def _dense_layers_have_a_size(self) -> Self:
        if self.first_k_dense_replace and self.intermediate_size is None:
            raise ValueError(
                f"intermediate_size is missing, and first_k_dense_replace says that "
                f"{self.first_k_dense_replace} layers are dense"
            )
        return self

    @classmethod
    def from_published(cls, fields: dict[str, object]) -> Self:
        rotary_dim = fields.get("rotary_dim")
        fields = {name: value for name, value in fields.items() if name != "rotary_dim"}
        if fields.get("head_dim") is None:
            fields["head_dim"] = _mean_head_dim(fields)
        config = cls.model_validate(
            published_decoder(fields, cls.model_fields, ONLY_SUPPORTED, defaults=CLASS_DEFAULTS)
        )
        if rotary_dim not in (None, config.rotary_dim):
            raise ValueError(
                f"rotary_dim {rotary_dim!r} is not partial_rotary_factor "
                f"{config.partial_rotary_factor} of head_dim {config.head_dim}"
            )
        return config


def _mean_head_dim(fields: Mapping[str, object]) -> object:
    """What the authors' class takes where ``head_dim`` is absent."""
    hidden_size, num_heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if not isinstance(hidden_size, int) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError("head_dim is missing, and so are hidden_size or num_attention_heads")
    return hidden_size // num_heads


class Llada2ForCausalLM(DecoderForCausalLM):
    """LLaDA2 with its head."""

    config_class: ClassVar[type[ModelConfig]] = Llada2Config
    published_names: ClassVar[Mapping[str, str]] = {
        "embed_tokens": "word_embeddings",
        "self_attn.qkv_proj": "attention.query_key_value",
        "self_attn.o_proj": "attention.dense",
        "self_attn.q_norm": "attention.query_layernorm",
        "self_attn.k_norm": "attention.key_layernorm",
    }

    @classmethod
    def feed_forward(
        cls,
        config: ModelConfig,
        layer_index: int,
        stored_names: Collection[str],
        dtype: torch.dtype,
        shards: Shards,
    ) -> FeedForward:
        assert isinstance(config, Llada2Config)
        hidden, num_experts = config.hidden_size, config.num_experts
        if layer_index < config.first_k_dense_replace:
            assert config.intermediate_size is not None
            return SwiGLU(hidden, config.intermediate_size, dtype, shards)
        bias_name = f"model.layers.{layer_index}.mlp.gate.expert_bias"
        biased = config.moe_router_enable_expert_bias
        gate = GroupedGate(
            hidden,
            num_experts,
            config.num_experts_per_tok,
            dtype,
            biased=bias_name in stored_names if biased is None else biased,
            num_groups=config.n_group,
            num_chosen_groups=config.topk_group,
            scaling=config.routed_scaling_factor,
        )
        experts = Experts(num_experts, hidden, config.moe_intermediate_size, dtype, shards)
        shared_size = config.num_shared_experts * config.moe_intermediate_size
        shared = SwiGLU(hidden, shared_size, dtype, shards) if shared_size else None
        return SparseMLP(gate, experts, shared)
