"""What FOCUS's golden decisions are put to: the torch definitions, or the Triton kernels.

Both take ragged batches, so the golden blocks go in by the hundred: launches are what takes time,
above all in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.kernels.importance import importance, importance_reference
from focus_ray.kernels.launch import INTERPRETED
from focus_ray.kernels.retain import Retained, eviction_target, retain, retain_reference

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Backend:
    """Functions of one signature, and the device and dtype that they are given tensors in."""

    kind: str
    importance: Callable[..., Tensor]
    retain: Callable[..., Retained]
    device: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        place = "interpreter" if self.kind == "kernels" and self.device == "cpu" else self.device
        return f"{self.kind}, {str(self.dtype).removeprefix('torch.')}, {place}"


def definitions(device: str) -> list[Backend]:
    """In the dtype of the golden data."""
    return [Backend("definitions", importance_reference, retain_reference, device, torch.bfloat16)]


def kernels() -> list[Backend]:
    """On a GPU in both dtypes that models are run in; else in Triton's interpreter.

    The interpreter does not compute bfloat16 rightly; in float32 the golden values are the same.

    Raises:
        RuntimeError: there is neither a GPU nor the interpreter, so no kernel would run.
    """
    device, dtypes = "cpu", [torch.float32]
    if torch.cuda.is_available():
        device, dtypes = "cuda", [torch.bfloat16, torch.float32]
    elif not INTERPRETED:
        raise RuntimeError("no CUDA here: set TRITON_INTERPRET=1 to run the kernels on the CPU")
    functions = _kernel_alone(importance), _kernel_alone(retain)
    return [Backend("kernels", *functions, device, dtype) for dtype in dtypes]


def _kernel_alone(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation; an error where it would fall back on its definition."""
    definition = f"{operation.__module__}.{operation.__name__}_reference"

    def run(*args: object, **options: object) -> Any:
        refusal = AssertionError(f"{definition} ran in place of the kernel")
        with mock.patch(definition, side_effect=refusal):
            return operation(*args, **options)

    return run


@dataclass(frozen=True)
class Block:
    """One block as eviction finds it; positions count from the block's first token.

    ``importances`` are those of layers 0 and 1, float32, one per masked position.
    """

    block_length: int
    processed: NDArray[Any]
    masked: NDArray[Any]
    importances: tuple[Tensor, Tensor]
    mean_decoded: float
    alpha: float
    progress: int


@dataclass(frozen=True)
class Selected:
    """What was decided: kept positions, how many of the block they see, progress after."""

    target: int
    kept: list[int]
    limit: int
    progress: int


def select(backend: Backend, blocks: Sequence[Block]) -> list[Selected]:
    """Decide all blocks, those of one length in one launch."""
    selected: dict[int, Selected] = {}
    for block_length in sorted({block.block_length for block in blocks}):
        indices = [i for i, block in enumerate(blocks) if block.block_length == block_length]
        found = _select(backend, [blocks[i] for i in indices], block_length)
        selected.update(zip(indices, found, strict=True))
    return [selected[i] for i in range(len(blocks))]


def _select(backend: Backend, blocks: Sequence[Block], block_length: int) -> list[Selected]:
    shape = (len(blocks), block_length)
    processed_NB, masked_NB = torch.zeros(2, *shape, dtype=torch.bool)
    first_NB, second_NB = torch.zeros(2, *shape)
    for n, block in enumerate(blocks):
        masked = torch.from_numpy(block.masked.astype(np.int64))
        processed_NB[n, torch.from_numpy(block.processed.astype(np.int64))] = True
        masked_NB[n, masked] = True
        first_NB[n, masked], second_NB[n, masked] = block.importances
    target_N = eviction_target(
        masked_NB.sum(1),
        torch.tensor([block.mean_decoded for block in blocks], dtype=torch.float32),
        torch.tensor([block.alpha for block in blocks], dtype=torch.float32),
    )
    progress_N = torch.tensor([block.progress for block in blocks])
    inputs = (first_NB, second_NB, processed_NB, masked_NB, target_N, progress_N)
    retained = backend.retain(
        *(tensor.to(backend.device) for tensor in inputs),
        importance_dtype=torch.bfloat16,
        attend_cached=False,
    )
    kept = [row.nonzero()[:, 0].tolist() for row in retained.kept_NB.cpu()]
    numbers = zip(
        target_N.tolist(), kept, retained.limit_N.tolist(), progress_N.tolist(), strict=True
    )
    return [Selected(target, own, end, max(own[-1], old)) for target, own, end, old in numbers]


def importance_of_rows(
    backend: Backend,
    q: Tensor,
    k: Tensor,
    row_lens: NDArray[Any],
    processed: NDArray[Any],
    is_masked: NDArray[np.bool_],
    block_length: int,
) -> Tensor:
    """Importance of the masked tokens of a ragged batch, in order, float32.

    Args:
        processed: block position of each of the T tokens.
        is_masked: ``[T]``.
    """
    row_of_token = np.repeat(np.arange(len(row_lens)), row_lens)
    place = torch.from_numpy(row_of_token * block_length + processed.astype(np.int64))
    masked_place = place[torch.from_numpy(is_masked)]
    shape = (len(row_lens), block_length)
    processed_NB, masked_NB = torch.zeros(2, *shape, dtype=torch.bool)
    processed_NB.view(-1)[place] = True
    masked_NB.view(-1)[masked_place] = True
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(row_lens)]).astype(np.int32))
    found_NB = backend.importance(
        q.to(backend.device, backend.dtype),
        k.to(backend.device, backend.dtype),
        *(tensor.to(backend.device) for tensor in (offsets, processed_NB, masked_NB)),
    ).cpu()
    return found_NB.view(-1)[masked_place]


def from_bits(bits: NDArray[np.uint16]) -> Tensor:
    """bfloat16 stored as uint16 bit patterns."""
    return torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32)).bfloat16()
