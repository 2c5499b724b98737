"""What a rank is said to take of a GPU, against what was measured on one H200.

Measured at max_model_len 4096 with random weights: allocated for the weights; buffers, passes and
choice of a step as the engine rehearses them at start; what recording its graphs took beyond.
"""

from __future__ import annotations

import pytest
import torch

from focus_ray.cluster.accelerators import GIB, GPUS
from focus_ray.cluster.estimate import CONTEXT_BYTES, estimate
from focus_ray.cluster.outlines import UnknownModel, outline
from focus_ray.config import EngineConfig
from focus_ray.errors import CheckpointError

# model, block length, max_num_seqs: GiB in use before the step (weights, CUDA), step, graphs
MEASURED = {
    ("JetLM/SDAR-1.7B-Chat", 4, 256): (4.561, 7.594, 1.086),
    ("JetLM/SDAR-1.7B-Chat", 32, 64): (4.788, 12.635, 1.105),
    ("JetLM/SDAR-1.7B-Chat", 32, 256): (4.821, 12.872, 1.838),
    ("JetLM/SDAR-8B-Chat", 4, 256): (16.296, 8.220, 1.174),
    ("JetLM/SDAR-8B-Chat", 32, 256): (16.335, 13.732, 1.600),
    ("inclusionAI/LLaDA2.0-mini", 32, 64): (31.395, 12.732, 1.303),
    ("inclusionAI/LLaDA2.0-mini", 32, 256): (31.429, 13.007, 2.066),
    ("JetLM/SDAR-30B-A3B-Chat", 4, 256): (58.057, 7.786, 1.119),
}


@pytest.fixture(autouse=True)
def _no_downloads(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def config(model, **fields):
    return EngineConfig(model=model, max_model_len=4096, **fields)


@pytest.mark.parametrize(
    "case", MEASURED, ids=lambda case: f"{case[0].split('/')[1]}, {case[1]}, {case[2]}"
)
def test_as_measured(case):
    model, block_length, max_num_seqs = case
    in_use, step, graphs = MEASURED[case]
    found = estimate(config(model, block_length=block_length, max_num_seqs=max_num_seqs))
    before_step = (found.weights_bytes + CONTEXT_BYTES) / GIB
    assert in_use <= before_step <= in_use + 0.6
    assert found.step_bytes / GIB == pytest.approx(step, rel=0.01)
    assert graphs <= found.graphs_bytes / GIB <= graphs + 1.2


@pytest.mark.parametrize(
    ("model", "block_length"),
    [
        pytest.param("JetLM/SDAR-8B-Chat", 4, id="the family's"),
        pytest.param("JetLM/SDAR-8B-Chat-b32", 32, id="in the name"),
        pytest.param("inclusionAI/LLaDA2.1-flash", 32, id="LLaDA2"),
    ],
)
def test_a_published_shape(model, block_length):
    assert outline(config(model), None).spec.block_length == block_length


def test_kv_of_a_token_is_as_documented():
    found = estimate(config("JetLM/SDAR-8B-Chat"))
    assert found.page_bytes / found.page_size == 144 * 1024  # docs/models.md
    assert found.kv_bytes(2) == 2 * 4096 * 144 * 1024


def test_ranks_divide_what_can_be_divided():
    whole = estimate(config("JetLM/SDAR-30B-A3B-Chat"))
    half = estimate(config("JetLM/SDAR-30B-A3B-Chat", tensor_parallel_size=2))
    assert half.weights_bytes == pytest.approx(whole.weights_bytes / 2, rel=0.01)
    assert half.page_bytes == whole.page_bytes // 2


def test_the_bundled_model_is_read_from_its_files():
    found = estimate(EngineConfig(max_num_seqs=4))
    assert found.weights_bytes / 2**20 == pytest.approx(2 * 16.4e6 / 2**20, rel=0.1)


def test_dtype_counts():
    small, large = (
        outline(config("JetLM/SDAR-1.7B-Chat"), dtype) for dtype in (None, torch.float32)
    )
    assert (small.model.dtype, large.model.dtype) == (torch.bfloat16, torch.float32)


def test_what_the_configuration_says_of_kv_comes_first():
    fixed = config("JetLM/SDAR-8B-Chat", kv_cache_memory_bytes=GIB)
    assert estimate(fixed).room_bytes(fixed, GPUS["L4"].memory_bytes) == GIB
    pages = config("JetLM/SDAR-8B-Chat", num_pages=3)
    found = estimate(pages)
    assert found.room_bytes(pages, GPUS["L4"].memory_bytes) == 3 * found.page_bytes


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        pytest.param(
            {"model": "someone/else"}, UnknownModel, "nothing is known here of", id="unknown"
        ),
        pytest.param({"model": "a//b"}, CheckpointError, "no hub id; correct it", id="no hub id"),
        pytest.param(
            {"model": "JetLM/SDAR-8B-Chat", "tensor_parallel_size": 3},
            ValueError,
            "tensor_parallel_size 3 does not fit",
            id="ranks that do not divide it",
        ),
        pytest.param(
            {"model": "JetLM/SDAR-8B-Chat", "max_model_len": 40000},
            ValueError,
            "max_model_len 40000 is above the 32768 positions",
            id="too long",
        ),
    ],
)
def test_what_cannot_be_estimated(fields, error, message):
    with pytest.raises(error, match=message):
        estimate(EngineConfig(**fields))
