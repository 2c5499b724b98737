"""All kernels in one engine: in float32 it gives the tokens that the torch definitions give."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

import focus_ray.kernels
from focus_ray.config import EngineConfig
from focus_ray.engine.engine import Engine
from focus_ray.engine.outputs import GenerationRequest
from focus_ray.kernels.launch import INTERPRETED, can_launch
from focus_ray.sampling import SamplingParams

# Prompts that end inside a block and at its end, one of them prefilled while the others decode.
PROMPT_LENS = (5, 16, 21)
SAMPLED = {"temperature": 0.8, "top_k": 50, "seed": 1}
# A model with dense and with sparse layers.
LLADA2 = Path(__file__).parents[1] / "golden" / "models" / "llada2"
# What models launch as one kernel, norm_rotary_fill; apart they are its definition.
FUSED = {"focus_ray.kernels.norm_rotary", "focus_ray.kernels.fill_kv"}
# What several ranks need.
SHARED = {"focus_ray.kernels.confidence_parts"}


def modules_with_kernels() -> list[ModuleType]:
    names = (info.name for info in pkgutil.iter_modules(focus_ray.kernels.__path__))
    modules = [importlib.import_module(f"focus_ray.kernels.{name}") for name in names]
    return [
        m for m in modules if hasattr(m, "can_launch") and m.can_launch.__module__ != m.__name__
    ]


def generate(path: str, device: str) -> dict[str, list[int]]:
    engine = Engine(
        EngineConfig(
            model=path,
            device=device,
            dtype="float32",
            decoding="focus",
            focus_adaptive=False,  # evict in every step, on a GPU too
            enforce_eager=True,  # definitions that wait for the device cannot be recorded
            block_length=8,
            page_size=16,
            num_pages=12,
            max_model_len=48,
            max_num_seqs=4,
            max_num_batched_tokens=64,
            saturation_tokens=64,  # the interpreter is not measured
            confidence_threshold=0.5,
        )
    )
    tokens: dict[str, list[int]] = {}
    for number, prompt_len in enumerate(PROMPT_LENS):
        params = {"max_tokens": 8, "ignore_eos": True, "temperature": 0.0}
        if number == 1:
            params |= SAMPLED
        prompt = tuple(range(3, 3 + prompt_len))
        engine.add(GenerationRequest(str(number), prompt, SamplingParams(**params)))
        tokens[str(number)] = []
        for delta in engine.step():
            tokens[delta.request_id].extend(delta.token_ids)
    while engine.has_unfinished():
        for delta in engine.step():
            tokens[delta.request_id].extend(delta.token_ids)
    assert engine.load().evicted_tokens > 0
    return tokens


@pytest.mark.kernels
@pytest.mark.timeout(300)  # a minute in the interpreter
# NumPy, which computes for the interpreter, warns of infinities that a GPU makes in silence
@pytest.mark.filterwarnings(
    r"ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"
)
def test_kernels_give_the_tokens_of_the_definitions(monkeypatch, device) -> None:
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("a CPU runs kernels in the interpreter only")
    modules = modules_with_kernels()
    launched = set()

    for module in modules:

        def watched(*tensors: torch.Tensor, name: str = module.__name__) -> bool:
            answer = can_launch(*tensors)
            if answer:
                launched.add(name)
            return answer

        monkeypatch.setattr(module, "can_launch", watched)
    found = generate(str(LLADA2), device.type)
    assert launched == {module.__name__ for module in modules} - FUSED - SHARED

    for module in modules:
        monkeypatch.setattr(module, "can_launch", lambda *_: False)
    assert found == generate(str(LLADA2), device.type)
