"""How much memory of a GPU a rank takes, before there is a GPU.

Weights and KV pages are counted, not estimated: the model is built without memory. What a step
takes was measured on one H200, at max_num_seqs 64 and 256 and block lengths 4 and 32, for
SDAR-1.7B, 8B, 30B-A3B and LLaDA2.0-mini; ``tests/cluster/test_estimate.py`` holds the numbers. The
engine measures it anew at start, and gives the rest to KV pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from focus_ray.cluster.accelerators import GIB
from focus_ray.cluster.outlines import Outline, outline
from focus_ray.config import EngineConfig
from focus_ray.engine.buckets import token_buckets
from focus_ray.engine.choosing import LOGITS_BYTES
from focus_ray.engine.memory import GRAPHS_BYTES
from focus_ray.engine.sizes import EngineSizes, resolve_sizes
from focus_ray.models.base import BlockDiffusionModel
from focus_ray.models.decoder import DecoderForCausalLM
from focus_ray.models.kv_cache import bytes_per_page
from focus_ray.models.layers import SwiGLU
from focus_ray.models.moe import SparseMLP

CONTEXT_BYTES = int(1.25 * GIB)
"""CUDA, libraries and loaded kernels, 0.7 to 0.93 GiB; what the allocator rounds up, to 0.25."""

LOGIT_BYTES = 48
"""Of each logit that is held at once while tokens are drawn with every wish there is: copies in
float32, sorted ones, their order in int64."""


@dataclass(frozen=True)
class Estimate:
    """What one rank takes of its GPU, in bytes.

    Args:
        weights_bytes: of its shard of the model.
        step_bytes: activations and buffers of the largest step.
        graphs_bytes: recorded steps, at most.
        page_bytes: one KV page.
        page_size: its tokens.
        longest: tokens of the longest sequence that is asked for.
    """

    weights_bytes: int
    step_bytes: int
    graphs_bytes: int
    page_bytes: int
    page_size: int
    longest: int

    @property
    def fixed_bytes(self) -> int:
        """Everything that comes before KV pages."""
        return self.weights_bytes + CONTEXT_BYTES + self.step_bytes

    def kv_bytes(self, num_seqs: int) -> int:
        """KV of so many sequences of the greatest length."""
        return num_seqs * -(-self.longest // self.page_size) * self.page_bytes

    def room_bytes(self, config: EngineConfig, memory_bytes: int) -> int:
        """What is left for KV on a GPU of this size, or what the configuration says; may be less
        than nothing.
        """
        if config.num_pages is not None:
            return config.num_pages * self.page_bytes
        if config.kv_cache_memory_bytes is not None:
            return config.kv_cache_memory_bytes
        return int(memory_bytes * config.gpu_memory_utilization) - self.fixed_bytes


def estimate(config: EngineConfig) -> Estimate:
    """What a rank of this engine takes of a GPU.

    Raises:
        UnknownModel: nothing is known of the model here.
        CheckpointError: what is here of it is broken.
        ValueError: the configuration does not fit the model.
    """
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    found = outline(config, dtype)
    spec, model = found.spec, found.model
    sizes = resolve_sizes(config, spec, "cuda")
    num_kv_heads, head_dim = model.kv_shape
    passes_bytes = _passes_bytes(model, sizes)
    return Estimate(
        weights_bytes=_weights_bytes(model),
        step_bytes=passes_bytes + _buffer_bytes(model, sizes) + _choice_bytes(config, found),
        graphs_bytes=0 if config.enforce_eager else passes_bytes + GRAPHS_BYTES,
        page_bytes=bytes_per_page(
            num_layers=spec.num_layers,
            page_size=sizes.page_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=model.dtype,
        ),
        page_size=sizes.page_size,
        longest=sizes.longest,
    )


def _weights_bytes(model: BlockDiffusionModel) -> int:
    held = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() * tensor.itemsize for tensor in held)


def _buffer_bytes(model: BlockDiffusionModel, sizes: EngineSizes) -> int:
    """What stands between the parts of a step: streams, queries, hidden states (``Passes``)."""
    heads, head_dim = model.query_shape
    elements = 3 * model.hidden_size + 2 * heads * head_dim
    return _num_tokens(sizes) * elements * model.dtype.itemsize


def _passes_bytes(model: BlockDiffusionModel, sizes: EngineSizes) -> int:
    """Activations of the layer that takes the most; measured: this, or up to a tenth less."""
    assert isinstance(model, DecoderForCausalLM)
    width = max(_layer_elements(layer.mlp, model.hidden_size) for layer in model.model.layers)
    return _num_tokens(sizes) * width * model.dtype.itemsize


def _layer_elements(mlp: object, hidden_size: int) -> int:
    """Per token."""
    if isinstance(mlp, SparseMLP):
        per_expert = hidden_size + 3 * len(mlp.experts.part)
        shared = mlp.shared_experts
        units = 0 if shared is None else shared.down_proj.weight.shape[1]
        return mlp.gate.num_chosen * per_expert + 4 * hidden_size + 3 * units
    assert isinstance(mlp, SwiGLU)
    return 3 * mlp.down_proj.weight.shape[1] + 6 * hidden_size


def _choice_bytes(config: EngineConfig, found: Outline) -> int:
    vocab_size, itemsize = found.spec.vocab_size, found.model.dtype.itemsize
    at_once = max(1, LOGITS_BYTES // (itemsize * vocab_size))
    rows = min(config.max_num_seqs * found.spec.block_length, at_once)
    return rows * vocab_size * LOGIT_BYTES


def _num_tokens(sizes: EngineSizes) -> int:
    """Of the largest step, padding included."""
    return token_buckets(sizes.max_step_tokens)[-1]
