"""How many engines occupancies ask for. No Ray runs here."""

from __future__ import annotations

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from focus_ray.serve.autoscaling import OccupancyPolicy, replicas_for


@pytest.mark.parametrize(
    ("occupancies", "num_silent", "current", "wanted"),
    [
        pytest.param([], 3, 3, 3, id="nobody has reported: as it is"),
        pytest.param([0.0, 0.0], 0, 2, 1, id="no work: the least"),
        pytest.param([0.8, 0.8, 0.8], 0, 3, 3, id="at the target, whose sum is 2.4000000000000004"),
        pytest.param([0.9, 0.9], 0, 2, 3, id="above it"),
        pytest.param([4.0], 0, 1, 5, id="a queue counts as work"),
        pytest.param([40.0], 0, 1, 6, id="the greatest"),
        pytest.param([2.9], 0, 4, 4, id="three only start, and are not asked for again"),
        pytest.param([0.75, 0.75], 0, 3, 3, id="two would do, with nothing to spare"),
        pytest.param([0.7, 0.7], 0, 3, 2, id="two will do"),
        pytest.param([0.3, 0.3, 0.3, 0.3, 0.3, 0.3], 0, 6, 3, id="several go at once"),
        pytest.param([0.1], 0, 8, 1, id="more than the greatest, as after a change of bounds"),
        pytest.param([0.1, 0.1], 1, 3, 3, id="the third may be busy"),
        pytest.param([0.9, 0.9], 1, 3, 3, id="and may be idle"),
        pytest.param([2.5], 1, 2, 4, id="what is known asks for more already"),
    ],
)
def test_replicas_for(occupancies, num_silent, current, wanted):
    assert replicas_for(occupancies, num_silent, 0.8, (1, 6), current) == wanted


def test_a_steady_load_settles_and_stays():
    """From any number of engines, and wherever the load lies between two of them."""
    for hundredths in range(1, 700):
        load = hundredths / 100
        for start in range(1, 11):
            count = start
            for _ in range(3):
                count = replicas_for([load / count] * count, 0, 0.8, (1, 10), count)
            assert replicas_for([load / count] * count, 0, 0.8, (1, 10), count) == count
            assert load / count <= 0.8 + 1e-9 or count == 10


def context(occupancies, current, policy_state, silent=()):
    """``silent`` have an average, as Serve makes one, and no sample."""
    samples = {name: [] if name in silent else [object()] for name in occupancies or ()}
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="engine",
        app_name="focus-ray",
        current_num_replicas=current,
        target_num_replicas=current,
        running_replicas=[],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics={} if occupancies is None else {"occupancy": occupancies},
        raw_metrics={"occupancy": samples},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=4,
        policy_state=policy_state,
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=AutoscalingConfig(),
    )


def test_the_policy_reads_what_serve_gives_it():
    policy = OccupancyPolicy(0.5)
    assert policy(context({"r1": 0.6, "r2": 0.9}, 2, {})) == (3, {})
    assert policy(context({"r1": 9.0}, 1, {})) == (4, {})
    assert policy(context(None, 2, {})) == (2, {})


def test_an_engine_that_says_nothing_is_not_idle():
    policy = OccupancyPolicy(0.5)
    assert policy(context({"r1": 0.1, "r2": 0.0}, 2, {})) == (1, {})
    assert policy(context({"r1": 0.1, "r2": 0.0}, 2, {}, silent={"r2"})) == (2, {})
    assert policy(context({"r1": 0.1}, 2, {})) == (2, {})


def test_serve_makes_the_policy_from_its_path():
    policy = AutoscalingPolicy(
        policy_function="focus_ray.serve.autoscaling:OccupancyPolicy",
        policy_kwargs={"target_occupancy": 0.5},
    )
    made = policy.get_policy()(**policy.policy_kwargs)
    assert made(context({"r1": 1.0}, 1, {})) == (2, {})
