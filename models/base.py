"""What every model offers to the engine and to the loader.

T tokens of a step, R retained ones, or those of them that need logits; D hidden size, H query
heads, K KV heads, d head size, V vocabulary: of heads and vocabulary, what the rank holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from focus_ray.models.eviction import Eviction
from focus_ray.models.kv_cache import KVCache
from focus_ray.models.parallel import WHOLE, Shard, Shards
from focus_ray.models.step import StepTensors

OnLayer = Callable[[int], None]
"""Called with the number of each layer but the first before it begins."""


def ignore_layer(layer_index: int) -> None:
    """For who does not care."""


class ModelConfig(BaseModel):
    """The part of ``config.json`` that every family has; frozen, under its published names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    default_block_length: ClassVar[int]
    default_mask_token_id: ClassVar[int]
    default_stop_token_ids: ClassVar[tuple[int, ...]] = ()
    """What ends a text where no file of the checkpoint says so."""
    turn_ends: ClassVar[tuple[str, ...]] = ()
    """Tokens that end a turn of a conversation, beside what the checkpoint lists as its end."""

    vocab_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    max_position_embeddings: PositiveInt
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    mask_token_id: int | None = None
    block_size: PositiveInt | None = None

    @property
    def divided(self) -> dict[str, int]:
        """Sizes that ranks divide evenly among them, by the names of their fields.

        KV heads are not among them: of fewer than ranks, each is held by several.
        """
        return {"vocab_size": self.vocab_size}

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
    def build(
        cls,
        config: ModelConfig,
        stored_names: Collection[str],
        dtype: torch.dtype,
        shards: Shards = WHOLE,
    ) -> Self:
        """Make the model, or a rank's shard of it, for a checkpoint that stores these weights.

        Args:
            stored_names: of the weights.
            shards: of a size that ``shard_sizes`` finds possible.
        """

    @property
    @abstractmethod
    def shards(self) -> Shards:
        """This rank among those that share the model; all run the same steps."""

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """D."""

    @property
    @abstractmethod
    def query_shape(self) -> tuple[int, int]:
        """``(H, d)``, of the queries of one token."""

    @property
    @abstractmethod
    def kv_shape(self) -> tuple[int, int]:
        """``(K, d)``, of the keys of one token, and of its values."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of weights, activations, keys and values."""

    @abstractmethod
    def begin(
        self,
        step: StepTensors,
        cache: KVCache,
        eviction: Eviction | None = None,
        on_layer: OnLayer = ignore_layer,
    ) -> tuple[Tensor, Tensor]:
        """Everything before tokens can be left out: layer 0, and layer 1 up to its queries.

        Keys and values of both layers are in their slots then, and ``eviction`` has chosen. A model
        of one layer stops at the queries of that one, and cannot evict.

        Returns:
            The residual stream ``[T, D]``, and the queries ``[T, H, d]``.
        """

    @abstractmethod
    def finish(
        self,
        x_RD: Tensor,
        q_RHd: Tensor,
        step: StepTensors,
        cache: KVCache,
        on_layer: OnLayer = ignore_layer,
    ) -> Tensor:
        """Everything after it, for the tokens that are retained: ``step`` is of these.

        Returns:
            Hidden states after the final norm, ``[R, D]``.
        """

    @abstractmethod
    def compute_logits(self, hidden_RD: Tensor) -> Tensor:
        """Logits ``[R, V]`` in the model's dtype; who adds them up does so in float32."""

    @abstractmethod
    def shard_map(self) -> dict[str, Shard]:
        """What is held here of each weight of the checkpoint, under its name there."""

    def weight_map(self) -> dict[str, Tensor]:
        """Where each weight of the checkpoint goes: its name there, the tensor here."""
        return {name: shard.tensor for name, shard in self.shard_map().items()}
