"""Whether models fit on machines: arithmetic on made-up sizes."""

from __future__ import annotations

import pytest

from focus_ray.cluster.accelerators import GIB, GPUS
from focus_ray.cluster.estimate import Estimate
from focus_ray.cluster.fit import Demand, NodeGroup, memory_findings, room_findings, smallest_gpu
from focus_ray.config import EngineConfig

H100, L4 = GPUS["H100"], GPUS["L4"]


def demand(num_gpus=1.0, engines=(1, 1), **engine):
    return Demand("models[0]", "m", EngineConfig(**engine), num_gpus, *engines)


def sizes(weights=15.0, step=5.0, graphs=2.0):
    """With 1 GiB for each sequence of 8192 tokens."""
    page_bytes = GIB // 256
    return Estimate(*(int(gib * GIB) for gib in (weights, step, graphs)), page_bytes, 32, 8192)


def group(num_gpus, most, gpu=H100):
    return NodeGroup("gpu", num_gpus, gpu, 0, most)


def test_enough_for_all():
    found = memory_findings(demand(max_num_seqs=40, max_model_len=8192), sizes(), H100)
    assert (found.errors, found.notes) == ([], [])


def test_not_enough_for_one_names_what_takes_it():
    [error] = memory_findings(demand(max_model_len=8192), sizes(), L4).errors
    assert error.startswith("models[0].engine: m takes 21.2 GiB of L4's 21.9 GiB before any KV")
    assert "weights 15.0 GiB, step 5.0 GiB" in error
    assert "raise tensor_parallel_size" in error


def test_fewer_than_run_at_once_is_worth_knowing():
    [note] = memory_findings(demand(max_num_seqs=64, max_model_len=8192), sizes(), H100).notes
    assert "KV holds 49 sequences of 8192 tokens, and max_num_seqs is 64" in note


def test_an_open_length_is_lowered():
    # 0.9 of 79.1 GiB less 70.5: 0.69 GiB for KV, and one sequence takes 1
    tight = sizes(weights=64.25)
    [note] = memory_findings(demand(), tight, H100).notes
    assert note.startswith("models[0].engine.max_model_len: is lowered from 8192")
    assert memory_findings(demand(max_model_len=8192), tight, H100).errors


def test_kv_of_a_given_size_must_fit_in_the_share_of_the_gpu():
    half = demand(0.5, kv_cache_memory_bytes=20 * GIB)
    [error] = memory_findings(half, sizes(), H100).errors
    assert "m takes 41.2 GiB" in error and "0.5 of H100 has 39.5 GiB" in error
    assert not memory_findings(demand(1.0, kv_cache_memory_bytes=20 * GIB), sizes(), H100).errors


def test_recorded_steps_go_where_nothing_else_is():
    full = demand(gpu_memory_utilization=0.99, max_num_seqs=1)
    [note] = memory_findings(full, sizes(), H100).notes
    assert "0.99 leaves 0.8 GiB of H100 for recorded steps, which may take 2.0 GiB" in note


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        pytest.param(10, "A10G", id="the first of equal size"),
        pytest.param(15, "A100-40G", id="larger"),
        pytest.param(60, "A100-80G", id="larger still"),
        pytest.param(300, None, id="none"),
    ],
)
def test_the_smallest_gpu(weights, name):
    found = smallest_gpu(demand(max_model_len=8192), sizes(weights))
    assert (found.name if found else None) == name


@pytest.mark.parametrize(
    ("demands", "groups", "errors", "notes"),
    [
        pytest.param([demand(engines=(8, 8))], [group(8, 1)], [], [], id="exactly"),
        pytest.param(
            [demand(engines=(9, 9))],
            [group(8, 1)],
            ["9 GPUs are asked for (9 x 1 for m), and the cluster has at most 8"],
            [],
            id="one too many",
        ),
        pytest.param(
            [demand(0.5, engines=(3, 3))], [group(1, 1)], ["1.5 GPUs"], [], id="halves add up"
        ),
        pytest.param(
            [demand(tensor_parallel_size=4)],
            [group(2, 8)],
            ["needs 4 GPUs of one machine, and the largest has 2"],
            [],
            id="ranks share a machine",
        ),
        pytest.param(
            [demand(engines=(1, 4))],
            [group(1, 2)],
            [],
            ["may ask for 4 GPUs, and the cluster has at most 2"],
            id="autoscaling beyond the cluster",
        ),
        pytest.param(
            [demand()], [NodeGroup("head", 0, None, 1, 1)], ["largest has 0"], [], id="no GPU"
        ),
        pytest.param([demand(0.0)], [NodeGroup("head", 0, None, 1, 1)], [], [], id="on CPUs"),
        pytest.param(
            [demand(engines=(9, 9))], [group(None, 1, None)], [], [], id="machines unknown"
        ),
        pytest.param([demand(engines=(9, 9))], [], [], [], id="no machines named"),
    ],
)
def test_room(demands, groups, errors, notes):
    found = room_findings(demands, groups)
    for sentences, wanted in ((found.errors, errors), (found.notes, notes)):
        assert len(sentences) == len(wanted)
        assert all(part in sentence for part, sentence in zip(wanted, sentences, strict=True))
