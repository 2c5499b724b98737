"""What every model offers to the engine and to the loader.

T tokens of a step, R rows that need logits, D hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from focus_ray.models.eviction import Eviction
from focus_ray.models.kv_cache import KVCache
from focus_ray.models.step import StepTensors


class ModelConfig(BaseModel):
    """The part of ``config.json`` that every family has; frozen, under its published names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    default_block_length: ClassVar[int]
    default_mask_token_id: ClassVar[int]

    vocab_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    max_position_embeddings: PositiveInt
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    mask_token_id: int | None = None
    block_size: PositiveInt | None = None

    @classmethod
    @abstractmethod
    def from_published(cls, fields: dict[str, object]) -> Self:
        """Read the fields of a ``config.json``.

        Raises:
            ValueError: a field is missing, malformed, or has a value this model does not compute.
        """


class BlockDiffusionModel(nn.Module, ABC):
    """A decoder whose prediction for a position is read at that position (no shift).

    Built with uninitialised weights on the current default device; ``loading`` fills them.
    """

    config_class: ClassVar[type[ModelConfig]]

    @classmethod
    @abstractmethod
    def build(cls, config: ModelConfig, stored_names: Collection[str], dtype: torch.dtype) -> Self:
        """Make the model for a checkpoint that stores weights of these names."""

    @abstractmethod
    def forward(
        self, step: StepTensors, cache: KVCache, eviction: Eviction | None = None
    ) -> Tensor:
        """Run all layers: hidden states after the final norm, ``[T, D]``; fills the KV pages.

        Under ``eviction`` only the retained tokens go past layer 1: hidden states of these, in
        the order of the step. Layers 0 and 1 must exist.
        """

    @abstractmethod
    def compute_logits(self, hidden_RD: Tensor) -> Tensor:
        """Logits ``[R, V]`` in the model's dtype; who adds them up does so in float32."""

    @abstractmethod
    def weight_map(self) -> dict[str, Tensor]:
        """Where each weight of the checkpoint goes: its name there, the tensor here."""
