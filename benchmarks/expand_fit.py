"""Whether a shape can hold a small model, and what of the shape has to give way for it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from focus_ray.benchmarks.expand_values import stream_share
from focus_ray.models.decoder import DecoderConfig
from focus_ray.models.llada2 import Llada2Config
from focus_ray.models.sdar import SdarConfig
from focus_ray.models.sdar_moe import SdarMoeConfig
from focus_ray.models.shapes import family_of
from focus_ray.models.spec import ModelSpec

# A whole number of times the small model's, so that its heads are repeated evenly.
MULTIPLES = ("num_attention_heads", "num_key_value_heads")
AT_LEAST = ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")


def fit(shape: DecoderConfig, small: SdarConfig) -> DecoderConfig:
    """The shape with constants as the construction needs them; none of them changes the cost.

    Raises:
        ValueError: it cannot hold the small model; says which field.
    """
    sizes = {name: (getattr(shape, name), getattr(small, name)) for name in (*AT_LEAST, *MULTIPLES)}
    sizes |= {name: (have, small.intermediate_size) for name, have in _units(shape).items()}
    for name, (have, need) in sizes.items():
        if have < need or (name in MULTIPLES and have % need):
            rule = "a multiple of" if name in MULTIPLES else "at least"
            raise ValueError(f"{name} {have} must be {rule} the small model's {need}")
    if shape.tie_word_embeddings:
        raise ValueError("tie_word_embeddings must not be set: surplus tokens need a head")
    _require_whole_weights(shape)
    changes: dict[str, object] = {"rms_norm_eps": small.rms_norm_eps * stream_share(small, shape)}
    if isinstance(shape, Llada2Config):
        changes["rope_theta"] = small.rope_theta
        # A power of two divides the experts' weights exactly.
        changes["routed_scaling_factor"] = 2.0 ** math.floor(math.log2(shape.routed_scaling_factor))
    return shape.model_copy(update=changes)


def _units(shape: DecoderConfig) -> dict[str, int]:
    """Units that a token goes through in each kind of layer, of different weights."""
    units: dict[str, int | None] = {}
    if isinstance(shape, SdarConfig):
        units = {"intermediate_size": shape.intermediate_size}
    elif isinstance(shape, SdarMoeConfig):
        units = {"moe_intermediate_size": shape.moe_intermediate_size}
        if not all(map(shape.is_sparse, range(shape.num_hidden_layers))):
            units["intermediate_size"] = shape.intermediate_size
    elif isinstance(shape, Llada2Config):
        num_networks = shape.num_shared_experts + 1
        name = f"moe_intermediate_size of {num_networks} networks"
        units = {name: num_networks * shape.moe_intermediate_size}
        if shape.first_k_dense_replace:
            units["intermediate_size"] = shape.intermediate_size
    return {name: size for name, size in units.items() if size is not None}


def _require_whole_weights(shape: DecoderConfig) -> None:
    """The weights of a token's experts must add up to the scaling, exactly.

    Raises:
        ValueError: they do not; names the field.
    """
    if isinstance(shape, SdarMoeConfig):
        if not shape.norm_topk_prob:
            raise ValueError("norm_topk_prob must be set, or weights do not add up to 1")
        if shape.num_experts_per_tok & (shape.num_experts_per_tok - 1):
            raise ValueError(
                f"num_experts_per_tok {shape.num_experts_per_tok} must be a power of two: equal "
                "weights are rounded to bfloat16, and others do not add up to 1"
            )
    if isinstance(shape, Llada2Config) and shape.num_experts_per_tok == 1:
        raise ValueError("num_experts_per_tok must be above 1: a lone weight is not divided")


def mask_token_id_of(small: ModelSpec, shape: DecoderConfig) -> int:
    """The mask id of the larger model: given, or its family's, or for small vocabularies unchanged.

    Raises:
        ValueError: the given one is outside the vocabulary, or another token of the small model.
    """
    usual = type(shape).default_mask_token_id
    given = shape.mask_token_id
    if given is None:
        return usual if usual < shape.vocab_size else small.mask_token_id
    if given >= shape.vocab_size:
        raise ValueError(f"mask_token_id {given} is outside the vocabulary of {shape.vocab_size}")
    if given < small.vocab_size and given != small.mask_token_id:
        raise ValueError(
            f"mask_token_id {given} is another token of the small model; take its own, "
            f"{small.mask_token_id}, or one from {small.vocab_size} on"
        )
    return given


def complete(
    shape: DecoderConfig, small: ModelSpec, mask_token_id: int, dtype: torch.dtype
) -> DecoderConfig:
    """The configuration of a model of ``shape`` with the small one's blocks."""
    return shape.model_copy(
        update={
            "mask_token_id": mask_token_id,
            "block_size": small.block_length,
            "dtype": str(dtype).removeprefix("torch."),
            "tie_word_embeddings": False,
        }
    )


def spec_of(small: ModelSpec, config: DecoderConfig) -> ModelSpec:
    """Facts about a model of ``config`` with the small one's tokens."""
    assert config.mask_token_id is not None
    return replace(
        small,
        architecture=family_of(config)[0],
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        mask_token_id=config.mask_token_id,
        dtype=getattr(torch, config.dtype),
    )
