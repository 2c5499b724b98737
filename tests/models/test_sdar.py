from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from focus_ray.models.loading import load_model
from focus_ray.models.sdar import SdarConfig

RunPrompts = Callable[..., list[Tensor]]

PUBLISHED: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "rope_theta": 1000000,
}


@pytest.fixture(scope="module")
def golden_arrays() -> Any:
    return np.load(Path(__file__).parents[1] / "golden" / "models" / "sdar" / "expected.npz")


@pytest.mark.parametrize("page_size", [64, 4], ids=["one page", "many pages"])
@pytest.mark.parametrize("block_length", [4, 16, 32])
def test_prefill_logits_are_the_authors(
    block_length: int,
    page_size: int,
    golden_sdar: Path,
    golden_arrays: Any,
    run_prompts: RunPrompts,
    device: torch.device,
) -> None:
    loaded = load_model(str(golden_sdar), device=device, dtype=torch.float32)
    prompt_T = torch.from_numpy(golden_arrays["prefill_prompt"])
    (found_TV,) = run_prompts(loaded, [prompt_T], block_length, page_size)
    expected_TV = torch.from_numpy(golden_arrays[f"prefill_logits_b{block_length}"])
    scale = expected_TV.abs().max().item()
    torch.testing.assert_close(found_TV, expected_TV, rtol=0, atol=1e-4 * scale)


def test_a_sequence_does_not_feel_the_others_in_its_step(
    golden_sdar: Path, golden_arrays: Any, run_prompts: RunPrompts
) -> None:
    loaded = load_model(str(golden_sdar), device="cpu", dtype=torch.float32)
    prompt_T = torch.from_numpy(golden_arrays["prefill_prompt"])
    prompts = [prompt_T[:37], prompt_T[20:21], prompt_T[5:64]]
    together = run_prompts(loaded, prompts, 16)
    for prompt_T, found_TV in zip(prompts, together, strict=True):
        (alone_TV,) = run_prompts(loaded, [prompt_T], 16)
        torch.testing.assert_close(found_TV, alone_TV, rtol=0, atol=1e-4)


def test_bfloat16_errs_no_more_than_the_authors_bfloat16(
    golden_sdar: Path, golden_arrays: Any, run_prompts: RunPrompts, device: torch.device
) -> None:
    loaded = load_model(str(golden_sdar), device=device)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    prompt_T = torch.from_numpy(golden_arrays["prefill_prompt"])
    (found_TV,) = run_prompts(loaded, [prompt_T], 4)
    assert found_TV.dtype == torch.bfloat16
    error_TV = (found_TV.float() - torch.from_numpy(golden_arrays["prefill_logits_b4"])).abs()
    # expected.json, bf16_reference_error: 0.37 on average, 3.6 at most, of logits up to 50
    assert error_TV.mean().item() < 1.5 * 0.3705
    assert error_TV.max().item() < 1.5 * 3.641


def test_rope_theta_is_read_in_either_spelling() -> None:
    older = SdarConfig.from_published(PUBLISHED)
    fields = {name: value for name, value in PUBLISHED.items() if name != "rope_theta"}
    parameters = {"rope_type": "default", "rope_theta": 1000000.0}
    assert SdarConfig.from_published({**fields, "rope_parameters": parameters}) == older
    assert SdarConfig.from_published({**PUBLISHED, "rope_scaling": {"type": "default"}}) == older


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"torch_dtype": "bfloat16"}, "bfloat16", id="older spelling"),
        pytest.param({"dtype": "float16"}, "float16", id="newer spelling"),
        pytest.param({"dtype": "torch.bfloat16"}, "bfloat16", id="with the module's name"),
        pytest.param({}, "float32", id="absent"),
    ],
)
def test_dtype_is_read_in_either_spelling(fields: dict[str, object], expected: str) -> None:
    assert SdarConfig.from_published({**PUBLISHED, **fields}).dtype == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"hidden_act": "gelu"}, "hidden_act 'gelu'", id="another activation"),
        pytest.param({"attention_bias": True}, "attention_bias True", id="biases"),
        pytest.param({"use_sliding_window": True}, "use_sliding_window True", id="window"),
        pytest.param({"rope_scaling": {"type": "yarn"}}, "rope_scaling.*yarn", id="yarn"),
        pytest.param(
            {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.*linear", id="linear"
        ),
        pytest.param(
            {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary", id="half rotary"
        ),
        pytest.param({"rope_parameters": {"rope_theta": 1e4}}, "disagree", id="two bases"),
        pytest.param({"rope_theta": None}, "rope_theta is missing", id="no base"),
        pytest.param({"rope_theta": "big"}, "must be a number", id="a word for a base"),
        pytest.param({"rope_scaling": "yarn"}, "must be an object", id="scaling as a word"),
        pytest.param({"layer_types": ["sliding_attention"]}, "layer_types", id="layer types"),
        pytest.param({"quantization_config": {}}, "quantization_config", id="quantised"),
        pytest.param({"num_attention_heads": 5}, "not a multiple", id="5 heads over 2"),
        pytest.param({"head_dim": 7}, "head_dim 7 is odd", id="odd head"),
        pytest.param({"hidden_size": 0}, "hidden_size", id="no width"),
        pytest.param({"dtype": "float8"}, "float8|dtype", id="unknown dtype"),
    ],
)
def test_what_is_not_computed_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SdarConfig.from_published({**PUBLISHED, **fields})


def test_a_missing_size_is_refused() -> None:
    fields = {name: value for name, value in PUBLISHED.items() if name != "head_dim"}
    with pytest.raises(ValueError, match="head_dim"):
        SdarConfig.from_published(fields)


def test_leftovers_of_training_pass_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    leftovers = {"debug": False, "ep_size": 1, "fuse_cross_entropy": True, "use_cache": False}
    SdarConfig.from_published({**PUBLISHED, **leftovers, "max_window_layers": 4})
    assert caplog.records == []


def test_an_unknown_field_is_logged_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        SdarConfig.from_published({**PUBLISHED, "logit_softcap": 30.0})
    assert "logit_softcap" in caplog.text
