"""Which tokens of a block are computed past layer 1 (FOCUS, arXiv 2601.23278, section 4).

N rows, each of which holds the processed tokens of one block of B positions; a row may be empty, or
have nothing masked. Only masked tokens are chosen from; decoded ones that the step processes always
go on. The paper speaks of the compressed list of masked tokens, which is the same in order
of position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.launch import can_launch

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(frozen=True)
class Retained:
    """The choice, and what the compaction needs to know of it.

    Args:
        kept_NB: bool, retained tokens, the processed decoded ones included.
        delta_NB: float32, rounded importance in layer 1 minus that in layer 0; 0 if not masked.
        row_offsets_N1: int32, retained tokens before each row, and of all rows.
        masked_offsets_N1: int32, the same of retained masked tokens.
        limit_N: int32, positions of its own block that the tokens of a row see.
        counts_2: int32, retained tokens and retained masked tokens of all rows: what the host has
            to know, in one small copy.
        finished_1: int32, 0 but while a kernel counts its programs in it.
    """

    kept_NB: Tensor
    delta_NB: Tensor
    row_offsets_N1: Tensor
    masked_offsets_N1: Tensor
    limit_N: Tensor
    counts_2: Tensor
    finished_1: Tensor

    @classmethod
    def allocate(cls, num_rows: int, block_length: int, device: torch.device | str) -> Retained:
        """Room for a choice among so many rows: nothing retained."""
        integers = torch.zeros(3 * num_rows + 5, dtype=torch.int32, device=device)
        sizes = [num_rows + 1, num_rows + 1, num_rows, 2, 1]
        row_offsets_N1, masked_offsets_N1, limit_N, counts_2, finished_1 = integers.split(sizes)
        return cls(
            kept_NB=torch.zeros(num_rows, block_length, dtype=torch.bool, device=device),
            delta_NB=torch.zeros(num_rows, block_length, device=device),
            row_offsets_N1=row_offsets_N1,
            masked_offsets_N1=masked_offsets_N1,
            limit_N=limit_N,
            counts_2=counts_2,
            finished_1=finished_1,
        )

    def first_rows(self, num_rows: int) -> Retained:
        """Views of so many rows; the counts stay those of all."""
        return replace(
            self,
            kept_NB=self.kept_NB[:num_rows],
            delta_NB=self.delta_NB[:num_rows],
            row_offsets_N1=self.row_offsets_N1[: num_rows + 1],
            masked_offsets_N1=self.masked_offsets_N1[: num_rows + 1],
            limit_N=self.limit_N[:num_rows],
        )


def eviction_target(num_masked_N: Tensor, mean_decoded_N: Tensor, alpha_N: Tensor) -> Tensor:
    """Masked tokens a block may keep at least: ``ceil(mean * alpha)``, 1 to the number of masks.

    The product is taken in float32 before it is rounded up; means below 1 count as 1. A block
    with more masks than its target evicts.

    Args:
        num_masked_N: int64.
        mean_decoded_N: float32, tokens decoded per productive step of the block so far.
        alpha_N: float32, at least 1.

    Returns:
        ``[N]`` int64; 0 where nothing is masked.
    """
    wanted_N = (mean_decoded_N.float().clamp_min(1.0) * alpha_N.float()).ceil().long()
    return torch.minimum(num_masked_N, wanted_N.clamp_min(1))


def retain(
    first_NB: Tensor,
    second_NB: Tensor,
    processed_NB: Tensor,
    masked_NB: Tensor,
    target_N: Tensor,
    progress_N: Tensor,
    *,
    importance_dtype: torch.dtype,
    attend_cached: bool,
    out: Retained | None = None,
) -> Retained:
    """Choose the retained tokens by the change of importance from layer 0 to layer 1.

    Blocks with no more masks than their target retain all. Otherwise: the tokens whose delta is at
    least mean plus one (population) deviation, if these are as many as the target, else the
    target's largest deltas, ties to the left; then the left neighbour of every chosen token; then,
    so that later layers read no position that was never computed, every masked token left of the
    rightmost chosen one and right of the block's progress. A block with a NaN delta retains all.

    Args:
        first_NB: float32, importance in layer 0; any value where not masked.
        second_NB: float32, importance in layer 1.
        processed_NB: bool, the tokens that the step processes.
        masked_NB: bool, a subset of ``processed_NB``.
        target_N: int64, of ``eviction_target``.
        progress_N: int64, rightmost block position ever computed past layer 1; -1 for a new block.
        importance_dtype: each importance is rounded to it before they are subtracted. The published
            rule has the model's dtype here: under bfloat16 equal deltas are common, and which
            tokens are retained depends on it.
        attend_cached: a row sees its block up to its rightmost retained or decoded token; otherwise
            up to its rightmost retained one, the published rule, even if decoded ones stand behind.
        out: where the choice goes, of at least N rows; None: into fresh memory.

    Returns:
        The N rows of ``out``; ``kept_NB`` is a subset of ``processed_NB``, and has a masked token
        wherever one is masked.

    Raises:
        ValueError: a shape or dtype differs from the above.
    """
    if masked_NB.ndim != 2 or not masked_NB.dtype == processed_NB.dtype == torch.bool:
        raise ValueError(
            f"processed and masked must be bool [N, B], got {processed_NB.dtype} "
            f"{tuple(processed_NB.shape)}, {masked_NB.dtype} {tuple(masked_NB.shape)}"
        )
    for name, tensor_NB in (
        ("first", first_NB),
        ("second", second_NB),
        ("processed", processed_NB),
    ):
        if tensor_NB.shape != masked_NB.shape:
            raise ValueError(
                f"{name}_NB must be {tuple(masked_NB.shape)} as masked_NB, got "
                f"{tuple(tensor_NB.shape)}"
            )
    if not first_NB.dtype == second_NB.dtype == torch.float32:
        raise ValueError(f"importances must be float32, got {first_NB.dtype}, {second_NB.dtype}")
    for name, tensor_N in (("target_N", target_N), ("progress_N", progress_N)):
        if tensor_N.shape != masked_NB.shape[:1] or tensor_N.dtype != torch.int64:
            raise ValueError(
                f"{name} must be int64 [{masked_NB.shape[0]}], got {tensor_N.dtype} "
                f"{tuple(tensor_N.shape)}"
            )
    if importance_dtype not in TRITON_DTYPES:
        raise ValueError(
            f"importance_dtype must be one of {list(TRITON_DTYPES)}, not {importance_dtype}"
        )
    num_rows, block_length = masked_NB.shape
    if out is None:
        out = Retained.allocate(num_rows, block_length, masked_NB.device)
    if len(out.kept_NB) < num_rows or out.kept_NB.shape[1] != block_length:
        raise ValueError(
            f"out must have room for {num_rows} rows of {block_length} positions, got "
            f"{tuple(out.kept_NB.shape)}; allocate it for the largest step"
        )
    retained = out.first_rows(num_rows)
    given = (first_NB, second_NB, processed_NB, masked_NB, target_N, progress_N)
    if not can_launch(*given):
        chosen = retain_reference(
            *given, importance_dtype=importance_dtype, attend_cached=attend_cached
        )
        for name, tensor in vars(chosen).items():
            getattr(retained, name).copy_(tensor)
    elif num_rows == 0:
        retained.counts_2.zero_()
    else:
        _retain_kernel[(num_rows,)](
            *(tensor.contiguous() for tensor in given),
            retained.kept_NB,
            retained.delta_NB,
            retained.limit_N,
            retained.row_offsets_N1,
            retained.masked_offsets_N1,
            retained.counts_2,
            retained.finished_1,
            num_rows,
            block_length,
            IMPORTANCE_DTYPE=TRITON_DTYPES[importance_dtype],
            ATTEND_CACHED=attend_cached,
            BLOCK=max(16, triton.next_power_of_2(block_length)),
            SCAN=256,
            num_warps=1,
            enable_fp_fusion=False,  # a product rounded with its sum would move the bound
        )
    return retained


def retain_reference(
    first_NB: Tensor,
    second_NB: Tensor,
    processed_NB: Tensor,
    masked_NB: Tensor,
    target_N: Tensor,
    progress_N: Tensor,
    *,
    importance_dtype: torch.dtype,
    attend_cached: bool,
) -> Retained:
    """The definition."""
    grown_NB = second_NB.to(importance_dtype).float() - first_NB.to(importance_dtype).float()
    delta_NB = torch.where(masked_NB, grown_NB, 0.0)
    position_B = torch.arange(masked_NB.shape[1], device=masked_NB.device)
    num_masked_N1 = masked_NB.sum(1, keepdim=True)
    chosen_NB = _choose(delta_NB, masked_NB, num_masked_N1, target_N[:, None])

    # the left neighbour in the block, judged by the choice itself and not by other neighbours
    right_chosen_NB = F.pad(chosen_NB[:, 1:], (0, 1))
    # a delta that is no number says nothing about the others either
    unknown_N1 = delta_NB.isnan().any(1, keepdim=True)
    chosen_NB = masked_NB & (chosen_NB | right_chosen_NB | unknown_N1)
    rightmost_N1 = torch.where(chosen_NB, position_B, -1).amax(1, keepdim=True)
    hole_NB = (position_B < rightmost_N1) & (position_B > progress_N[:, None])
    evicts_N1 = num_masked_N1 > target_N[:, None]
    kept_NB = processed_NB & (~masked_NB | chosen_NB | hole_NB | ~evicts_N1)

    seen_NB = kept_NB | ~masked_NB if attend_cached else kept_NB
    row_offsets_N1 = F.pad(kept_NB.sum(1).cumsum(0), (1, 0)).int()
    masked_offsets_N1 = F.pad((kept_NB & masked_NB).sum(1).cumsum(0), (1, 0)).int()
    return Retained(
        kept_NB=kept_NB,
        delta_NB=delta_NB,
        row_offsets_N1=row_offsets_N1,
        masked_offsets_N1=masked_offsets_N1,
        limit_N=torch.where(seen_NB, position_B + 1, 0).amax(1).int(),
        counts_2=torch.stack([row_offsets_N1[-1], masked_offsets_N1[-1]]),
        finished_1=row_offsets_N1.new_zeros(1),
    )


def _choose(
    delta_NB: Tensor, masked_NB: Tensor, num_masked_N1: Tensor, target_N1: Tensor
) -> Tensor:
    """Mean plus deviation, or the target's best."""
    ranked_NB = torch.where(masked_NB, delta_NB, -torch.inf)
    order_NB = ranked_NB.argsort(dim=1, descending=True, stable=True)
    rank_NB = torch.empty_like(order_NB).scatter_(
        1, order_NB, torch.arange(order_NB.shape[1], device=order_NB.device).expand_as(order_NB)
    )
    best_NB = masked_NB & (rank_NB < target_N1)

    count_N1 = num_masked_N1.clamp_min(1)
    mean_N1 = _sum_by_halves(delta_NB) / count_N1
    apart_NB = torch.where(masked_NB, delta_NB - mean_N1, 0.0)
    deviation_N1 = (_sum_by_halves(apart_NB.square()) / count_N1).sqrt()
    # equal deltas deviate by nothing, which rounding of the mean must not hide
    lowest_N1 = torch.where(masked_NB, delta_NB, torch.inf).amin(1, keepdim=True)
    highest_N1 = ranked_NB.amax(1, keepdim=True)
    bound_N1 = torch.where(highest_N1 == lowest_N1, lowest_N1, mean_N1 + deviation_N1)
    above_NB = masked_NB & (delta_NB >= bound_N1)
    return torch.where(above_NB.sum(1, keepdim=True) >= target_N1, above_NB, best_NB)


def _sum_by_halves(x_NB: Tensor) -> Tensor:
    """``[N, 1]``: the left half of the row plus the right half, until one column is left.

    A fixed order of additions, so that every device finds the same tokens above the mean.
    """
    length = x_NB.shape[1]
    x_NB = F.pad(x_NB, (0, (1 << (length - 1).bit_length()) - length))
    while x_NB.shape[1] > 1:
        left_NB, right_NB = x_NB.chunk(2, dim=1)
        x_NB = left_NB + right_NB
    return x_NB


# A number and alignments that change from step to step must not make it compile anew.
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=[
        "limit_ptr",
        "masked_offsets_ptr",
        "counts_ptr",
        "finished_ptr",
    ],
)
def _retain_kernel(
    first_ptr,
    second_ptr,
    processed_ptr,
    masked_ptr,
    target_ptr,
    progress_ptr,
    kept_ptr,
    delta_ptr,
    limit_ptr,
    row_offsets_ptr,
    masked_offsets_ptr,
    counts_ptr,
    finished_ptr,
    num_rows,
    block_length,
    IMPORTANCE_DTYPE: tl.constexpr,
    ATTEND_CACHED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    # One program owns one block. The last one to finish turns the counts of all blocks to offsets.
    n = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK)
    inside = position < block_length
    place = n * block_length + position
    masked = tl.load(masked_ptr + place, mask=inside, other=0) != 0
    processed = tl.load(processed_ptr + place, mask=inside, other=0) != 0
    target = tl.load(target_ptr + n)
    progress = tl.load(progress_ptr + n)
    first = _round(tl.load(first_ptr + place, mask=inside, other=0.0), IMPORTANCE_DTYPE)
    second = _round(tl.load(second_ptr + place, mask=inside, other=0.0), IMPORTANCE_DTYPE)
    delta = tl.where(masked, second - first, 0.0)
    num_masked = tl.sum(masked.to(tl.int32), 0)

    # the target's best: a token's rank is the number of masked ones that are better, or as good
    # and further left
    better = delta[:, None] > delta[None, :]
    as_good = (delta[:, None] == delta[None, :]) & (position[:, None] < position[None, :])
    rank = tl.sum((masked[:, None] & (better | as_good)).to(tl.int32), 0)
    best = masked & (rank < target)

    # mean plus deviation, by the operations of the definition in their order
    count = tl.maximum(num_masked, 1).to(tl.float32)
    mean = tl.div_rn(_sum_by_halves_of(delta), count)
    apart = tl.where(masked, delta - mean, 0.0)
    deviation = tl.sqrt_rn(tl.div_rn(_sum_by_halves_of(apart * apart), count))
    highest = tl.max(tl.where(masked, delta, float("-inf")), 0)
    lowest = tl.min(tl.where(masked, delta, float("inf")), 0)
    bound = tl.where(highest == lowest, lowest, mean + deviation)
    above = masked & (delta >= bound)
    chosen = tl.where(tl.sum(above.to(tl.int32), 0) >= target, above, best)

    right = tl.gather(chosen.to(tl.int32), tl.minimum(position + 1, BLOCK - 1), 0)
    right_chosen = (right != 0) & (position + 1 < BLOCK)
    unknown = tl.max((delta != delta).to(tl.int32), 0) != 0
    chosen = masked & (chosen | right_chosen | unknown)
    rightmost = tl.max(tl.where(chosen, position, -1), 0)
    hole = (position < rightmost) & (position > progress)
    kept = processed & ((masked == 0) | chosen | hole | (num_masked <= target))
    tl.store(kept_ptr + place, kept, mask=inside)
    tl.store(delta_ptr + place, delta, mask=inside)

    seen = kept
    if ATTEND_CACHED:
        seen = kept | (inside & (masked == 0))
    tl.store(limit_ptr + n, tl.max(tl.where(seen, position + 1, 0), 0))
    tl.store(row_offsets_ptr + 1 + n, tl.sum(kept.to(tl.int32), 0))
    tl.store(masked_offsets_ptr + 1 + n, tl.sum((kept & masked).to(tl.int32), 0))

    tl.debug_barrier()  # all threads have stored before one of them counts the program as finished
    if tl.atomic_add(finished_ptr, 1, sem="acq_rel") == num_rows - 1:
        tl.store(counts_ptr, _add_up(row_offsets_ptr + 1, num_rows, SCAN))
        tl.store(counts_ptr + 1, _add_up(masked_offsets_ptr + 1, num_rows, SCAN))
        tl.store(finished_ptr, 0)  # as the next launch has to find it


@triton.jit
def _round(x, DTYPE: tl.constexpr):
    """To the nearest of ``DTYPE``, ties to even, as float32."""
    if DTYPE.is_bf16():
        # in integers, because Triton's interpreter cuts the lower bits off
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        rounded = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        rounded = x.to(DTYPE).to(tl.float32)
    return rounded


@triton.jit
def _sum_by_halves_of(x):
    for _ in tl.static_range(10):  # lengths to 1024
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2)), 0)
    return tl.sum(x, 0)


@triton.jit
def _add_up(count_ptr, num_rows, SCAN: tl.constexpr):
    """Each count becomes the sum up to and with it; returns the sum of all."""
    before = 0
    for start in range(0, num_rows, SCAN):
        row = start + tl.arange(0, SCAN)
        count = tl.load(count_ptr + row, mask=row < num_rows, other=0)
        tl.store(count_ptr + row, before + tl.cumsum(count, 0), mask=row < num_rows)
        before += tl.sum(count, 0)
    return before
