import pytest
import torch

from focus_ray.kernels.slot_words import STRATEGIES
from focus_ray.kernels.unmasking import choose_edited, choose_unmasked, may_be_edited, quota

JOINT = STRATEGIES.index("joint_threshold")


def choose(strategy, confidence, masked, *, threshold=0.9, quota_=1):
    chosen = choose_unmasked(
        torch.tensor([confidence]),
        torch.tensor([masked], dtype=torch.bool),
        strategy_N=torch.tensor([STRATEGIES.index(strategy)]),
        threshold_N=torch.tensor([threshold]),
        quota_N=torch.tensor([quota_]),
    )
    return chosen[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("strategy", "confidence", "masked", "options", "expected"),
    [
        pytest.param(
            "low_confidence_dynamic", [0.95, 0.2, 0.99], [1, 1, 1], {}, [0, 2], id="all above"
        ),
        pytest.param(
            "low_confidence_dynamic", [0.5, 0.2, 0.6], [1, 1, 1], {}, [2], id="at least one"
        ),
        pytest.param(
            "low_confidence_dynamic", [0.5, 0.5], [1, 1], {"threshold": 0.5}, [0], id="strict"
        ),
        pytest.param(
            "low_confidence_dynamic",
            [0.95, 0.2, 0.6],
            [1, 1, 1],
            {"quota_": 2},
            [0, 2],
            id="fewer above than the quota: the quota's best",
        ),
        pytest.param(
            "low_confidence_dynamic",
            [0.95, 0.94, 0.93],
            [1, 1, 1],
            {"quota_": 2},
            [0, 1, 2],
            id="more above than the quota",
        ),
        pytest.param(
            "low_confidence_dynamic", [0.99, 0.2], [0, 1], {}, [1], id="decoded ones do not count"
        ),
        pytest.param(
            "low_confidence_static", [0.3, 0.99, 0.5], [1, 1, 1], {"quota_": 2}, [1, 2], id="best"
        ),
        pytest.param(
            "low_confidence_static", [0.5, 0.5, 0.5], [1, 1, 1], {"quota_": 2}, [0, 1], id="ties"
        ),
        pytest.param(
            "low_confidence_static", [0.5, 0.1], [0, 1], {"quota_": 2}, [1], id="quota above masks"
        ),
        pytest.param(
            "sequential", [0.9, 0.1, 0.2, 0.99], [0, 1, 0, 1], {"quota_": 1}, [1], id="leftmost"
        ),
        pytest.param(
            "sequential",
            [0.0, 0.0, 0.0],
            [1, 0, 1],
            {"quota_": 2},
            [0],
            id="a hole takes its part of the quota; confidence does not matter",
        ),
        pytest.param(
            "low_confidence_dynamic", [0.99, 0.99], [0, 0], {}, [], id="nothing is masked"
        ),
        pytest.param("joint_threshold", [0.5, 0.6], [1, 1], {}, [1], id="joint: the best"),
        pytest.param("joint_threshold", [0.91, 0.95], [1, 1], {}, [0, 1], id="joint: all above"),
    ],
)
def test_choice(strategy, confidence, masked, options, expected):
    assert choose(strategy, confidence, masked, **options) == expected


def test_strategies_mix_in_one_batch():
    chosen = choose_unmasked(
        torch.tensor([[0.1, 0.95, 0.96]] * 4),
        torch.ones(4, 3, dtype=torch.bool),
        strategy_N=torch.tensor([0, 1, 2, 3]),
        threshold_N=torch.full((4,), 0.9),
        quota_N=torch.ones(4, dtype=torch.int64),
    )
    assert chosen.int().tolist() == [[0, 1, 1], [0, 0, 1], [1, 0, 0], [0, 1, 1]]


def test_only_answers_under_joint_threshold_may_be_edited():
    editable = may_be_edited(
        torch.tensor([JOINT, JOINT, JOINT, 0]),
        torch.tensor([-5, 2, 4, -5]),
        torch.tensor([[1, 1, 0, 1]] * 4, dtype=torch.bool),
    )
    assert editable.int().tolist() == [[1, 1, 0, 1], [0, 0, 0, 1], [0] * 4, [0] * 4]


def test_an_edit_is_surer_than_the_threshold_and_another_token():
    edited = choose_edited(
        torch.tensor([[0.9, 0.5, 0.9, 0.9]]),
        torch.tensor([[7, 7, 3, 7]]),
        torch.tensor([[3, 3, 3, 3]]),
        torch.tensor([[True, True, True, False]]),
        torch.tensor([0.5]),
    )
    assert edited.int().tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("block_length", "steps", "expected"),
    [
        pytest.param(4, 4, [1, 1, 1, 1], id="default: one a step"),
        pytest.param(16, 6, [3, 3, 3, 3, 2, 2], id="the first steps take the rest"),
        pytest.param(8, 1, [8], id="all at once"),
    ],
)
def test_quota_spreads_the_block(block_length, steps, expected):
    step_N = torch.arange(steps)
    assert quota(block_length, torch.full((steps,), steps), step_N).tolist() == expected
    assert sum(expected) == block_length


def test_quota_past_the_schedule_still_progresses():
    assert quota(4, torch.tensor([4]), torch.tensor([9])).tolist() == [1]
