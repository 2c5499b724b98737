"""The shapes of published checkpoints, for whoever must know them without a download."""

from __future__ import annotations

import re

from focus_ray.models.decoder import DecoderConfig, DecoderForCausalLM
from focus_ray.models.llada2 import Llada2Config
from focus_ray.models.registry import MODEL_CLASSES
from focus_ray.models.sdar import SdarConfig
from focus_ray.models.sdar_moe import SdarMoeConfig

SDAR_8B = SdarConfig(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=32768,
    dtype="bfloat16",
)
SDAR_4B = SDAR_8B.model_copy(update={"hidden_size": 2560, "intermediate_size": 9728})
SDAR_1_7B = SDAR_8B.model_copy(
    update={
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    }
)
SDAR_30B_A3B = SdarMoeConfig(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=32768,
    dtype="bfloat16",
)
LLADA2_MINI = Llada2Config(
    vocab_size=157184,
    hidden_size=2048,
    intermediate_size=5120,
    moe_intermediate_size=512,
    num_experts=256,
    num_experts_per_tok=8,
    num_shared_experts=1,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    moe_router_enable_expert_bias=True,
    first_k_dense_replace=1,
    num_hidden_layers=20,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    partial_rotary_factor=0.5,
    rms_norm_eps=1e-6,
    rope_theta=6e5,
    tie_word_embeddings=False,
    max_position_embeddings=32768,
    dtype="bfloat16",
)
LLADA2_FLASH = LLADA2_MINI.model_copy(
    update={
        "hidden_size": 4096,
        "intermediate_size": 9216,
        "moe_intermediate_size": 1024,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
)
SHAPES: dict[str, DecoderConfig] = {
    "sdar-1.7b": SDAR_1_7B,
    "sdar-4b": SDAR_4B,
    "sdar-8b": SDAR_8B,
    "sdar-30b-a3b": SDAR_30B_A3B,
    "llada2.0-mini": LLADA2_MINI,
}
"""What ``--shape`` of benchmarks names; all fit on one GPU."""

# Block lengths, and chat or base, change no shape; nor do the later stages of LLaDA2's training.
_HUB_IDS = {
    r"JetLM/SDAR-1\.7B-.+": SDAR_1_7B,
    r"JetLM/SDAR-4B-.+": SDAR_4B,
    r"JetLM/SDAR-8B-.+": SDAR_8B,
    r"JetLM/SDAR-30B-A3B-.+": SDAR_30B_A3B,
    r"inclusionAI/LLaDA2\.[01]-mini(-.+)?": LLADA2_MINI,
    r"inclusionAI/LLaDA2\.[01]-flash(-.+)?": LLADA2_FLASH,
}


def shape_of(hub_id: str) -> DecoderConfig | None:
    """The shape of a published checkpoint; None of one that is not known here."""
    return next(
        (shape for pattern, shape in _HUB_IDS.items() if re.fullmatch(pattern, hub_id)), None
    )


def family_of(config: DecoderConfig) -> tuple[str, type[DecoderForCausalLM]]:
    """The architecture, as ``config.json`` names it, that a configuration belongs to."""
    return next(
        (name, model_cls)
        for name, model_cls in MODEL_CLASSES.items()
        if model_cls.config_class is type(config) and issubclass(model_cls, DecoderForCausalLM)
    )
