"""What a request must be like to be taken in; fills in what it leaves to others.

Checked once, at the engine's edge, in words a user can act on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from focus_ray.engine.outputs import GenerationRequest
from focus_ray.errors import RequestRejected
from focus_ray.sampling import SamplingParams, fill_in


@dataclass(frozen=True)
class RequestLimits:
    """What one engine can take; tokens.

    Args:
        defaults: every field that a request may leave as None, except ``seed`` and ``max_tokens``.
        whole_blocks: every step computes whole blocks, so that a decoded token may still change.
        max_completions: most ``n`` that could ever be queued.
    """

    vocab_size: int
    mask_token_id: int
    max_model_len: int
    block_length: int
    whole_blocks: bool
    max_completions: int
    defaults: SamplingParams


def resolve(request: GenerationRequest, limits: RequestLimits) -> SamplingParams:
    """Check a request and return its parameters with every default filled in but the seed.

    Raises:
        RequestRejected: names the field, the value and the remedy.
    """
    prompt_len = len(request.prompt_token_ids)
    _check_tokens(request.prompt_token_ids, "prompt", limits)
    if not prompt_len:
        raise RequestRejected("prompt is empty; give at least one token", "prompt")
    room = limits.max_model_len - prompt_len
    if room < 1:
        raise RequestRejected(
            f"prompt has {prompt_len} tokens, this model takes {limits.max_model_len} with at "
            "least one of them for the answer; shorten the prompt or raise max_model_len",
            "prompt",
        )
    params = request.params
    if params.max_tokens is not None and params.max_tokens > room:
        raise RequestRejected(
            f"max_tokens is {params.max_tokens}, but the prompt has {prompt_len} tokens and this "
            f"model takes {limits.max_model_len} in all; ask for at most {room} or raise "
            "max_model_len",
            "max_tokens",
        )
    if params.min_tokens > room:
        raise RequestRejected(
            f"min_tokens is {params.min_tokens}, but only {room} fit after the prompt",
            "min_tokens",
        )
    if params.n > limits.max_completions:
        raise RequestRejected(
            f"n is {params.n}, this engine can queue {limits.max_completions} at most; ask for "
            "fewer or raise max_num_waiting",
            "n",
        )
    if params.denoising_steps is not None and params.denoising_steps > limits.block_length:
        raise RequestRejected(
            f"denoising_steps is {params.denoising_steps}, a block has {limits.block_length} "
            "tokens and each step decodes at least one; ask for at most that many",
            "denoising_steps",
        )
    if (params.unmasking or limits.defaults.unmasking) == "joint_threshold":
        _check_joint_threshold(params, limits)
    if request.continued is not None:
        _check_continued(request.continued, params, limits)
    for token_id in params.stop_token_ids:
        if token_id >= limits.vocab_size:
            raise RequestRejected(
                f"stop_token_ids holds {token_id}, the vocabulary ends at {limits.vocab_size - 1}",
                "stop_token_ids",
            )
    return _fill(params, limits, room)


def _check_joint_threshold(params: SamplingParams, limits: RequestLimits) -> None:
    if not limits.whole_blocks:
        raise RequestRejected(
            "unmasking is joint_threshold, which changes decoded tokens, but the decoding of this "
            "engine leaves these out; ask for another unmasking, or start it with decoding block",
            "unmasking",
        )
    if params.temperature:
        raise RequestRejected(
            f"temperature is {params.temperature:g}, but unmasking joint_threshold is greedy: a "
            "token that is drawn would be changed back; ask for temperature 0 or another unmasking",
            "temperature",
        )
    if params.denoising_steps is not None:
        raise RequestRejected(
            f"denoising_steps is {params.denoising_steps}, but a block of unmasking "
            "joint_threshold takes as many steps as it needs; leave denoising_steps out, or ask "
            "for another unmasking",
            "denoising_steps",
        )


def _check_continued(
    continued: Mapping[int, tuple[int, ...]], params: SamplingParams, limits: RequestLimits
) -> None:
    if not continued or not continued.keys() <= set(range(params.n)):
        raise RequestRejected(
            f"continued holds completions {sorted(continued)}, n is {params.n}; name those that "
            "have not ended, by their index",
            "continued",
        )
    for index, token_ids in continued.items():
        _check_tokens(token_ids, f"continued[{index}]", limits)


def _check_tokens(token_ids: Iterable[int], param: str, limits: RequestLimits) -> None:
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < limits.vocab_size:
            raise RequestRejected(
                f"{param} token {index} is {token_id}, the vocabulary is "
                f"[0, {limits.vocab_size - 1}]",
                param,
            )
        if token_id == limits.mask_token_id:
            raise RequestRejected(
                f"{param} token {index} is {token_id}, the mask token, which stands for text that "
                "is still to be decoded; remove it",
                param,
            )


def _fill(params: SamplingParams, limits: RequestLimits, room: int) -> SamplingParams:
    bounds: dict[str, int] = {}
    if params.max_tokens is None:
        bounds["max_tokens"] = room
    if params.top_k is not None:  # more than the vocabulary keeps all; the device counts in int64
        bounds["top_k"] = min(params.top_k, limits.vocab_size)
    return fill_in(params, limits.defaults).model_copy(update=bounds)
