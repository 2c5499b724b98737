"""Requests at the engine's edge, without an engine."""

from dataclasses import replace

import pytest

from focus_ray.engine.admission import RequestLimits, resolve
from focus_ray.engine.outputs import GenerationRequest
from focus_ray.errors import RequestRejected
from focus_ray.sampling import SamplingParams

LIMITS = RequestLimits(
    vocab_size=512,
    mask_token_id=509,
    max_model_len=100,
    block_length=16,
    whole_blocks=True,
    max_completions=8,
    defaults=SamplingParams(
        temperature=0.6,
        top_p=1.0,
        top_k=0,
        unmasking="low_confidence_dynamic",
        denoising_steps=16,
        editing_threshold=0.5,
        max_post_steps=16,
    ),
)
JOINT = {"unmasking": "joint_threshold", "max_tokens": 8}


def resolved(params, limits=LIMITS):
    return resolve(GenerationRequest("a", (5,), SamplingParams(**params)), limits)


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
    assert resolved({"top_k": asked, "max_tokens": 8}).top_k == got


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param(LIMITS, id="asked for"),
        pytest.param(
            replace(LIMITS, defaults=LIMITS.defaults.model_copy(update=JOINT)), id="the default"
        ),
    ],
)
def test_joint_threshold_takes_over_no_temperature_and_no_number_of_steps(limits):
    asked = JOINT if limits is LIMITS else {"max_tokens": 8}
    found = resolved({**asked, "max_post_steps": 3}, limits)
    assert found.unmasking == "joint_threshold"
    assert (found.temperature, found.denoising_steps) == (0.0, None)
    assert (found.editing_threshold, found.max_post_steps) == (0.5, 3)
    other = resolved({"unmasking": "sequential", "max_tokens": 8}, limits)
    assert (other.temperature, other.denoising_steps) == (0.6, 16)


@pytest.mark.parametrize(
    ("params", "whole_blocks", "param", "words"),
    [
        pytest.param({}, False, "unmasking", "decoding block", id="another decoding"),
        pytest.param({"temperature": 0.7}, True, "temperature", "greedy", id="drawn tokens"),
        pytest.param({"denoising_steps": 4}, True, "denoising_steps", "leave", id="a schedule"),
    ],
)
def test_what_makes_no_sense_under_joint_threshold_is_refused(params, whole_blocks, param, words):
    with pytest.raises(RequestRejected, match=words) as error:
        resolved({**JOINT, **params}, replace(LIMITS, whole_blocks=whole_blocks))
    assert error.value.param == param
