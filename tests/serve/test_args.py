"""Arguments of the application: what is accepted, and what a refusal says."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from focus_ray.config import EngineConfig
from focus_ray.serve.api_keys import hash_of
from focus_ray.serve.args import ServeArgs
from focus_ray.serve.serve_settings import replica_settings

TWO = {"models": [{"served_model_name": ["a"]}, {"served_model_name": ["b"]}]}
SECRET = "sesame-open"


def test_one_model_needs_no_list():
    args = ServeArgs(engine=EngineConfig(model="owner/name"), num_replicas=2)
    [model] = args.served
    assert model.names == ("owner/name",)
    assert (model.min_engines, model.max_engines) == (2, 2)
    assert list(args.deployments) == ["engine"]
    assert ServeArgs(served_model_name=("a", "b")).served[0].names == ("a", "b")


@pytest.mark.parametrize(
    ("args", "number"),
    [
        pytest.param({}, 1, id="one engine"),
        pytest.param({"num_replicas": 8}, 8, id="one for each engine"),
        pytest.param({"num_replicas": 8, "num_ingress_replicas": 2}, 2, id="as asked for"),
        pytest.param(
            {"autoscaling": {"min_replicas": 2, "max_replicas": 9}}, 2, id="engines at the start"
        ),
        pytest.param(
            {"models": [{}, {"served_model_name": ["b"], "num_replicas": 3}]}, 4, id="all"
        ),
    ],
)
def test_there_are_ingresses_enough(args, number):
    assert ServeArgs.model_validate(args).num_ingresses == number


def test_what_serve_is_told_comes_along_unless_it_is_there():
    found = replica_settings({"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1"})
    assert found == {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}


def test_deployments_are_named_after_their_models():
    models = [{"served_model_name": ["owner/name", "alias"]}, {"engine": {"model": "other"}}]
    args = ServeArgs.model_validate({"models": models})
    assert list(args.deployments) == ["engine-owner-name", "engine-other"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        pytest.param(
            {"engine": {"max_seqs": 4}},
            "engine.max_seqs: no such field; correct its name or leave it out",
            id="unknown field",
        ),
        pytest.param(
            {"models": [{}, {"engine": {"max_num_seqs": 0}, "served_model_name": ["b"]}]},
            "models[1].engine.max_num_seqs: input should be greater than 0, got 0",
            id="a value, deep inside",
        ),
        pytest.param(
            {"num_replicas": 0, "max_body_bytes": "many"},
            "num_replicas: input should be greater than 0, got 0; max_body_bytes: input should be "
            "a valid integer, unable to parse string as an integer, got 'many'",
            id="all that is wrong",
        ),
        pytest.param(
            {**TWO, "num_gpus": 1},
            "num_gpus: belongs to one model, and models lists 2; move it into one of them",
            id="fields of one model beside several",
        ),
        pytest.param(
            {"models": [{"served_model_name": ["a", "c"]}, {"served_model_name": ["b", "a"]}]},
            "models[1].served_model_name: 'a' is a name of models[0] too; give each model names "
            "of its own",
            id="a name of two models",
        ),
        pytest.param(
            {"models": [{"served_model_name": ["a/b"]}, {"served_model_name": ["a:b"]}]},
            "served_model_name: 'a:b' and 'a/b' would both be the deployment 'engine-a-b'; let the "
            "first names differ in letters or digits",
            id="names that are one in a path",
        ),
        pytest.param(
            {"num_replicas": 2, "autoscaling": {"max_replicas": 3}},
            "num_replicas 2 does not go with autoscaling, which decides it; leave it out, or set "
            "autoscaling.min_replicas",
            id="two rules for replicas",
        ),
        pytest.param(
            {"autoscaling": {}}, "autoscaling.max_replicas: field required", id="missing field"
        ),
        pytest.param(
            {"autoscaling": {"min_replicas": 4, "max_replicas": 3}},
            "autoscaling: max_replicas 3 is less than min_replicas 4; raise the first or lower the "
            "second",
            id="bounds out of order",
        ),
        pytest.param(
            {"autoscaling": {"min_replicas": 0, "max_replicas": 3}},
            "autoscaling.min_replicas: min_replicas 0 is not supported: a model without engines "
            "fails its health check, and its next request waits for the weights to load; use 1 or "
            "more",
            id="scale to zero",
        ),
        pytest.param(
            {"engine": {"device": "cpu"}, "num_gpus": 1},
            "num_gpus 1 does not go with engine.device cpu; leave one of them out",
            id="a GPU for nothing",
        ),
        pytest.param(
            {"engine": {"device": "cuda"}, "num_gpus": 0},
            "num_gpus 0 does not go with engine.device cuda; leave one of them out",
            id="no GPU for cuda",
        ),
        pytest.param(
            {"engine": {"tensor_parallel_size": 2}, "num_gpus": 0.5},
            "num_gpus 0.5 does not go with engine.tensor_parallel_size 2: ranks need a GPU each; "
            "use num_gpus 1",
            id="two ranks on one GPU",
        ),
        pytest.param(
            {"num_gpus": 0.5},
            "engine.gpu_memory_utilization 0.9 is more than num_gpus 0.5, and other engines share "
            "the GPU; lower the first, or set engine.kv_cache_memory_bytes",
            id="more memory than its part of a GPU",
        ),
        pytest.param(
            {"num_gpus": 2},
            "num_gpus: input should be less than or equal to 1, got 2",
            id="two GPUs for one rank",
        ),
    ],
)
def test_refusals(args, sentence):
    with pytest.raises(ValidationError) as refused:
        ServeArgs.model_validate(args)
    assert refused.value.errors()[0]["msg"].removeprefix("Value error, ") == sentence
    assert "input_value" not in str(refused.value)


@pytest.mark.parametrize(
    "args",
    [
        pytest.param({"api_keys": [f"{SECRET} {SECRET}"]}, id="the key itself is wrong"),
        pytest.param({"api_keys": SECRET}, id="not a list"),
        pytest.param({"api_key_hashes": [SECRET]}, id="a key where a hash belongs"),
        pytest.param({"api_keys": [SECRET], "num_gpus": -1}, id="something else is wrong"),
        pytest.param({"api_keys": [SECRET], **TWO, "num_gpus": 1}, id="a rule over fields"),
    ],
)
def test_keys_are_never_shown_in_errors(args):
    with pytest.raises(ValidationError) as refused:
        ServeArgs.model_validate(args)
    assert SECRET not in str(refused.value)


def test_keys_are_not_shown_and_the_ingress_knows_only_hashes():
    args = ServeArgs(api_keys=(SECRET,), api_key_hashes=(hash_of("other").upper(),))
    settings = args.settings({"FOCUS_RAY_API_KEY": "third fourth"})
    assert SECRET not in f"{args!r} {settings!r}"
    expected = [hash_of(key) for key in (SECRET, "third", "fourth")]
    assert set(settings.api_key_hashes) == {*expected, hash_of("other")}
