"""Gates for experts that no gate was trained for: they spread tokens as a trained one does.

A random gate over the stream of a trained model sends most tokens to a few experts, because the
stream has a few strong directions that all tokens share; training evens that out. Here the inputs
of the small model's feed-forward layers are recorded while it answers a few questions, and each
row of a gate is random after these inputs are made white: every direction counts the same. What
is left is what trained models have too. Load over experts is uneven, none is idle, and tokens that
are alike, as the masked ones of a block, meet at the same experts.

T tokens, D hidden size of the small model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from focus_ray.benchmarks.workload import Lengths, Prompt, bundled_prompts, random_prompts
from focus_ray.config import EngineConfig
from focus_ray.engine.assembly import assemble
from focus_ray.engine.engine import Engine
from focus_ray.models.decoder import DecoderForCausalLM
from focus_ray.models.loading import LoadedModel, load_model
from focus_ray.models.spec import ModelSpec
from focus_ray.sampling import SamplingParams

NUM_PROMPTS = 6
PROMPT_LEN, OUTPUT_LEN = Lengths(80, 0.5), Lengths(32)
KV_BYTES = 1 << 26
# Of the mean square of a direction: one that is hardly used must not decide by its noise.
LEAST_SQUARE = 1e-3


def whitening_of(small: LoadedModel, seed: int) -> list[Tensor]:
    """What makes inputs of the small model white, from its own decoding.

    The checkpoint is run once more, on the CPU in float32, so that gates are the same wherever the
    model is expanded.

    Returns:
        ``[D, D]`` float32 for the input of each layer's feed-forward part, and one more for the
        output of the last norm. ``x @ it`` has directions of the same mean square, 1 / D each.
    """
    own = load_model(str(small.path), device="cpu", dtype=torch.float32)
    assert isinstance(own.model, DecoderForCausalLM)
    config = EngineConfig(
        device="cpu",
        decoding="block",
        max_num_seqs=NUM_PROMPTS,
        kv_cache_memory_bytes=KV_BYTES,
        enable_prefix_caching=False,
    )
    engine = Engine(config, assemble(config, own))
    moments = [_Moment() for _ in range(own.spec.num_layers + 1)]
    for layer, moment in zip(own.model.model.layers, moments, strict=False):
        layer.get_submodule("mlp").register_forward_pre_hook(moment.take_input)
    own.model.model.norm.register_forward_hook(moments[-1].take_output)
    for number, prompt in enumerate(islice(_prompts(engine, own.spec, seed), NUM_PROMPTS)):
        engine.add(prompt.request(str(number), SamplingParams(temperature=0.0, ignore_eos=True)))
    while engine.has_unfinished():
        engine.step()
    return [moment.whitening() for moment in moments]


def _prompts(engine: Engine, spec: ModelSpec, seed: int) -> Iterator[Prompt]:
    if engine.tokenizer is not None:
        return bundled_prompts(engine.tokenizer, PROMPT_LEN, OUTPUT_LEN, seed)
    forbidden = {spec.mask_token_id, *spec.stop_token_ids}
    return random_prompts(spec.vocab_size, forbidden, PROMPT_LEN, OUTPUT_LEN, seed)


class _Moment:
    """Second moment of the tokens that pass a module; on a CPU all of them are somebody's."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.sum_DD: Tensor | None = None

    def take_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._add(inputs[0])

    def take_output(self, module: nn.Module, inputs: object, outputs: tuple[Any, ...]) -> None:
        self._add(outputs[0])

    def _add(self, x_TD: Tensor) -> None:
        self.num_tokens += len(x_TD)
        square_DD = x_TD.double().T @ x_TD.double()
        self.sum_DD = square_DD if self.sum_DD is None else self.sum_DD + square_DD

    def whitening(self) -> Tensor:
        assert self.sum_DD is not None
        square_D, direction_DD = torch.linalg.eigh(self.sum_DD / self.num_tokens)
        square_D = square_D.clamp_min(LEAST_SQUARE * float(square_D.mean()))
        whitening_DD: Tensor = (direction_DD * square_D.rsqrt()) @ direction_DD.T
        return (whitening_DD / math.sqrt(len(square_D))).float()
