"""The token a masked position would take, and how sure the model is of it.

R rows of logits, V vocabulary, K suppressed ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from focus_ray.kernels.confidence_kernels import launch_confidence
from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.noise import exponential_noise


@dataclass(frozen=True)
class Draw:
    """Which rows draw their token instead of taking the best, and what their noise depends on.

    Args:
        temperature_R: float32; 0 takes the best.
        seed_R, position_R, step_R: int64, see ``exponential_noise``.
    """

    temperature_R: Tensor
    seed_R: Tensor
    position_R: Tensor
    step_R: Tensor

    def take(self, rows_S: Tensor) -> Draw:
        """That of some of the rows."""
        return Draw(**{name: t[rows_S] for name, t in vars(self).items()})


@dataclass(frozen=True)
class Choice:
    """Token of each row, its probability, and its natural log probability at temperature 1.

    Args:
        token_R: int64.
        confidence_R: float32, at the row's temperature, or at 1 where it is 0.
        logprob_R: float32.
    """

    token_R: Tensor
    confidence_R: Tensor
    logprob_R: Tensor

    def replace(self, rows_S: Tensor, other: Choice) -> Choice:
        """With the choice of some of the rows taken from ``other``."""
        return Choice(
            **{
                name: t.index_copy(0, rows_S, getattr(other, name))
                for name, t in vars(self).items()
            }
        )


def confidence(
    logits_RV: Tensor,
    mask_token_id: int,
    *,
    suppressed_RK: Tensor | None = None,
    draw: Draw | None = None,
) -> Choice:
    """Choose a token for each row, never the mask, and say how probable it is.

    Probabilities are of the softmax over the whole vocabulary, the mask token and suppressed ids
    included: a model that would rather keep the mask is unsure. Writing the mask token itself
    would only lose the step, hence it is never chosen.

    A row that holds a NaN, or nothing above -inf, has no probabilities: they are NaN; one with
    +inf has none of meaning. The token is still one that may be chosen, and never a NaN's while
    there is another.

    Args:
        logits_RV: ``[R, V]``, any float dtype, unit stride along V; computed in float32.
        mask_token_id: in ``[0, V)``, V at least 2.
        suppressed_RK: int64 ``[R, K]`` ids in ``[0, V)`` that a row may not choose, each once;
            padded with the mask id. None: there are none.
        draw: None: every row takes its best token, the lowest id where several are best.

    Raises:
        ValueError: a shape, dtype or stride differs from the above, or the mask id is no id.
    """
    if logits_RV.ndim != 2 or logits_RV.shape[1] < 2 or logits_RV.stride(1) != 1:
        raise ValueError(
            f"logits_RV must be [R, V] with V >= 2 and unit stride along V, got "
            f"{tuple(logits_RV.shape)} with strides {logits_RV.stride()}"
        )
    num_rows, vocab = logits_RV.shape
    if not 0 <= mask_token_id < vocab:
        raise ValueError(f"mask_token_id {mask_token_id} is not in [0, {vocab})")
    check_row_params(num_rows, suppressed_RK, draw)
    if not can_launch(logits_RV):
        return confidence_reference(
            logits_RV, mask_token_id, suppressed_RK=suppressed_RK, draw=draw
        )
    choice = Choice(
        logits_RV.new_empty(num_rows, dtype=torch.int64),
        logits_RV.new_empty(num_rows, dtype=torch.float32),
        logits_RV.new_empty(num_rows, dtype=torch.float32),
    )
    launch_confidence(
        logits_RV,
        mask_token_id,
        suppressed_RK,
        None if draw is None else [*vars(draw).values()],
        (choice.token_R, choice.confidence_R, choice.logprob_R),
    )
    return choice


def check_row_params(num_rows: int, suppressed_RK: Tensor | None, draw: Draw | None) -> None:
    """Refuse what is not of these rows.

    Raises:
        ValueError: a shape or dtype differs from what ``confidence`` asks for.
    """
    if suppressed_RK is not None and (
        suppressed_RK.ndim != 2
        or len(suppressed_RK) != num_rows
        or suppressed_RK.dtype != torch.int64
    ):
        raise ValueError(
            f"suppressed_RK must be int64 [{num_rows}, K], got {suppressed_RK.dtype} "
            f"{tuple(suppressed_RK.shape)}"
        )
    for name, part_R in vars(draw).items() if draw is not None else ():
        dtype = torch.float32 if name == "temperature_R" else torch.int64
        if part_R.shape != (num_rows,) or part_R.dtype != dtype:
            raise ValueError(
                f"{name} must be {str(dtype).removeprefix('torch.')} [{num_rows}], got "
                f"{part_R.dtype} {tuple(part_R.shape)}"
            )


def confidence_reference(
    logits_RV: Tensor,
    mask_token_id: int,
    *,
    suppressed_RK: Tensor | None = None,
    draw: Draw | None = None,
) -> Choice:
    """The definition."""
    logits_RV = logits_RV.to(torch.float32)
    candidates_RV = candidates(logits_RV, mask_token_id, suppressed_RK)
    token_R = candidates_RV.argmax(1)  # the first of equal values
    logprob_R = log_probability(logits_RV, token_R)
    best = Choice(token_R, logprob_R.exp(), logprob_R)
    if draw is None:
        return best
    rows_S = draw.temperature_R.nonzero()[:, 0]  # the others are spared the noise
    draw = draw.take(rows_S)
    weights_SV = cool(candidates_RV[rows_S], draw.temperature_R).exp()
    drawn = draw_token(logits_RV[rows_S], weights_SV, draw)
    return best.replace(rows_S, drawn)


def candidates(
    logits_RV: Tensor, mask_token_id: int, suppressed_RK: Tensor | None = None
) -> Tensor:
    """A copy of float32 logits: finite where a token may be chosen, -inf where it may not."""
    candidates_RV = logits_RV.nan_to_num(nan=torch.finfo(torch.float32).min)
    candidates_RV[:, mask_token_id] = -torch.inf
    if suppressed_RK is not None:
        candidates_RV.scatter_(1, suppressed_RK, -torch.inf)
    return candidates_RV


def cool(logits_RV: Tensor, temperature_R: Tensor) -> Tensor:
    """Divide by the temperature, down from the best: the coldest leaves ``0`` and ``-inf``."""
    temperature_R1 = temperature_R[:, None].clamp_min(torch.finfo(torch.float32).tiny)
    return (logits_RV - logits_RV.amax(1, keepdim=True)) / temperature_R1


def log_probability(logits_RV: Tensor, token_R: Tensor) -> Tensor:
    """``[R]`` of one token of each row, at temperature 1."""
    chosen_R = logits_RV.gather(1, token_R[:, None])[:, 0]
    return chosen_R - logits_RV.logsumexp(1)


def draw_token(logits_RV: Tensor, weights_RV: Tensor, draw: Draw) -> Choice:
    """Draw in proportion to ``weights_RV``; probabilities are those of all ``logits_RV``."""
    noise_RV = exponential_noise(draw.seed_R, draw.position_R, draw.step_R, logits_RV.shape[1])
    token_R = (weights_RV / noise_RV).argmax(1)
    cooled_RV = cool(logits_RV, draw.temperature_R)
    return Choice(
        token_R, log_probability(cooled_RV, token_R).exp(), log_probability(logits_RV, token_R)
    )
