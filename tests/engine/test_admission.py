"""Requests at the engine's edge, without an engine."""

import pytest

from focus_ray.engine.admission import RequestLimits, resolve
from focus_ray.engine.outputs import GenerationRequest
from focus_ray.sampling import SamplingParams

LIMITS = RequestLimits(
    vocab_size=512,
    mask_token_id=509,
    max_model_len=100,
    block_length=16,
    max_completions=8,
    defaults=SamplingParams(temperature=0.0, top_p=1.0, top_k=0, denoising_steps=16),
)


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        pytest.param(None, 0, id="the checkpoint's"),
        pytest.param(-1, -1, id="all"),
        pytest.param(50, 50, id="within the vocabulary"),
        pytest.param(513, 512, id="one more than there are"),
        pytest.param(2**63, 512, id="more than the device can count"),
    ],
)
def test_top_k_ends_at_the_vocabulary(asked, got):
    params = SamplingParams(top_k=asked, max_tokens=8)
    assert resolve(GenerationRequest("a", (5,), params), LIMITS).top_k == got
