"""One denoising step under FOCUS, without a checkpoint: real shapes, random tensors.

N sequences of B-token blocks in the middle of their decoding, T processed tokens, R retained, Q of
these masked; D hidden size, H query heads, K KV heads, d head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from focus_ray.kernels.compact import Compacted, compact
from focus_ray.kernels.retain import Retained, retain
from focus_ray.kernels.rotary import rotary_table
from focus_ray.models.decoder import DecoderLayer
from focus_ray.models.kv_cache import LayerKV
from focus_ray.models.layers import SwiGLU
from focus_ray.models.sdar import SdarConfig
from focus_ray.models.shapes import SDAR_8B
from focus_ray.models.step import StepTensors

# Of a size at which the script itself can be looked at on a CPU.
QUICK_CONFIG = SDAR_8B.model_copy(
    update={
        "vocab_size": 199,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
)
LEAST_PAGE_SIZE = 32


@dataclass(frozen=True)
class Shape:
    """How many sequences of what block length, each behind ``context`` committed tokens."""

    num_seqs: int
    block_length: int
    context: int

    @property
    def name(self) -> str:
        return f"{self.num_seqs} x {self.block_length}"


SHAPES = [Shape(256, 32, 2048), Shape(64, 32, 2048), Shape(512, 32, 2048), Shape(256, 64, 2048)]
QUICK_SHAPES = [Shape(3, 8, 32), Shape(2, 64, 64)]


class Step:
    """The tensors of one step.

    What stands for a block in mid-decoding: half of its tokens are masked (a quarter to three
    quarters, at random places), an eighth is decoded but not final, the rest has left the
    processing set. The target is such that about 7 of 32 tokens are retained masked ones. At block
    length 32 that is about 20 processed tokens per sequence, of which 11 retained, of which 7
    masked.
    """

    def __init__(
        self, config: SdarConfig, shape: Shape, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.shape, self.device, self.dtype = config, shape, device, dtype
        self._generator = torch.Generator(device).manual_seed(0)
        num_rows, length = shape.num_seqs, shape.block_length
        processed_NB, self.masked_NB = self._blocks()
        self.processed_NB = processed_NB
        self.target_N = torch.full((num_rows,), max(1, 5 * length // 32), device=device)
        self.progress_N = torch.full((num_rows,), length - 1, device=device)
        self.block_start_N = torch.full((num_rows,), shape.context, device=device)

        page_size = -(-LEAST_PAGE_SIZE // length) * length
        pages_per_row = -(-(shape.context + length) // page_size)
        num_pages = num_rows * pages_per_row
        page_table = torch.randperm(num_pages, generator=self._generator, device=device)
        page_table_NP = page_table.view(num_rows, pages_per_row).int()
        row_T, position_T = processed_NB.nonzero().unbind(1)
        positions_T = self.block_start_N[row_T] + position_T
        page_T = page_table_NP[row_T, positions_T // page_size].long()
        rightmost_N = torch.where(processed_NB, torch.arange(length, device=device), 0).amax(1)
        offsets_N1 = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        offsets_N1[1:] = processed_NB.sum(1).cumsum(0)
        vocab = config.vocab_size
        self.processed = StepTensors(
            token_ids_T=torch.randint(vocab, row_T.shape, generator=self._generator, device=device),
            positions_T=positions_T,
            kv_limit_T=(self.block_start_N + rightmost_N + 1)[row_T].int(),
            slot_T=page_T * page_size + positions_T % page_size,
            page_table_MP=page_table_NP,
            row_table_S=torch.arange(num_rows, dtype=torch.int32, device=device),
            row_offsets_S1=offsets_N1,
            max_row_len=length,
            max_kv_len=shape.context + length,
            busy_rows=num_rows,
        )
        page_shape = (num_pages, page_size, config.num_key_value_heads, config.head_dim)
        self.layer_kv = LayerKV(self.random(*page_shape), self.random(*page_shape))
        self.table_P2r2 = rotary_table(
            config.max_position_embeddings,
            config.head_dim,
            config.rope_theta,
            dtype=dtype,
            device=device,
        )
        self.first_NB, self.second_NB = (
            self.random(num_rows, length).float().abs() * 32 for _ in range(2)
        )
        self.retained: Retained = self.retain(retain)
        self.num_retained, self.num_masked = self.retained.counts_2.tolist()
        self.kept = self._kept_step()

    @property
    def num_processed(self) -> int:
        return len(self.processed.positions_T)

    def random(self, *shape: int) -> Tensor:
        """Normal values, of the step's device and dtype."""
        values = torch.randn(shape, generator=self._generator, device=self.device, dtype=self.dtype)
        return values

    def heads(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Queries and keys, or values, of so many tokens."""
        config = self.config
        q_THd = self.random(num_tokens, config.num_attention_heads, config.head_dim)
        return q_THd, self.random(num_tokens, config.num_key_value_heads, config.head_dim)

    def layer(self) -> DecoderLayer:
        """A layer of the model with random weights."""
        with torch.device(self.device):
            mlp = SwiGLU(self.config.hidden_size, self.config.intermediate_size, self.dtype)
            layer = DecoderLayer(self.config, mlp, self.dtype)
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.02, generator=self._generator)
        return layer

    def retain(self, operation: object) -> Retained:
        """``retain`` or its definition on the step's blocks."""
        assert callable(operation)
        chosen = operation(
            self.first_NB,
            self.second_NB,
            self.processed_NB,
            self.masked_NB,
            self.target_N,
            self.progress_N,
            importance_dtype=torch.bfloat16,
            attend_cached=False,
        )
        assert isinstance(chosen, Retained)
        return chosen

    def _blocks(self) -> tuple[Tensor, Tensor]:
        """What is processed and what is masked of each block."""
        shape = (self.shape.num_seqs, self.shape.block_length)
        length = self.shape.block_length
        rank_NB = torch.rand(shape, generator=self._generator, device=self.device).argsort(1)
        spread_N1 = torch.rand(shape[0], 1, generator=self._generator, device=self.device)
        num_masked_N1 = (length / 4 + spread_N1 * length / 2).long().clamp_min(1)
        masked_NB = rank_NB < num_masked_N1
        return rank_NB < num_masked_N1 + length // 8, masked_NB

    def compacted(self) -> Compacted:
        """Room for the result of ``compact``, padding included."""
        config = self.config
        return Compacted.allocate(
            self.num_processed,
            self.shape.num_seqs,
            config.hidden_size,
            (config.num_attention_heads, config.head_dim),
            self.dtype,
            self.device,
        )

    def compact(self, operation: object, x_TD: Tensor, q_THd: Tensor, out: Compacted) -> None:
        """``compact`` or its definition on the step's blocks."""
        assert callable(operation)
        operation(
            x_TD,
            q_THd,
            self.processed.positions_T,
            self.processed.slot_T,
            self.processed.row_offsets_S1,
            self.processed.row_table_S,
            self.block_start_N,
            self.processed_NB,
            self.masked_NB,
            self.retained,
            trash_slot=0,
            trash_place=self.masked_NB.numel(),
            out=out,
        )

    def _kept_step(self) -> StepTensors:
        """What the layers after the eviction know."""
        q_THd, _ = self.heads(self.num_processed)
        out = self.compacted()
        self.compact(compact, self.random(self.num_processed, self.config.hidden_size), q_THd, out)
        out = out.first(self.num_retained, self.shape.num_seqs)
        return replace(
            self.processed,
            token_ids_T=self.processed.token_ids_T[:0],
            positions_T=out.positions_R,
            slot_T=out.slot_R,
            kv_limit_T=out.kv_limit_R,
            row_offsets_S1=out.row_offsets_S1,
        )
