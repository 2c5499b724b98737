"""Files of ``focus-ray serve --config``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from focus_ray.serve.app import build
from focus_ray.serve.args import ServeArgs
from focus_ray.serve.config_file import load_args
from focus_ray.serve.model_args import AutoscalingArgs

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "cluster" / "configs").glob("*.yaml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "models.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid_here_and_as_args_of_ray_serve(path):
    args = load_args(path)
    assert len(args.served) == 2
    application = {
        "name": "focus-ray",
        "import_path": "focus_ray.serve.app:build",
        "args": yaml.safe_load(path.read_text()),
    }
    schema = ServeDeploySchema.model_validate({"applications": [application]})
    assert ServeArgs.model_validate(schema.applications[0].args) == args


def test_there_is_an_example():
    assert EXAMPLES


def test_what_the_documentation_shows_is_valid(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    whole, deployed, part = blocks
    assert len(load_args(written(tmp_path, whole)).served) == 2
    [application] = ServeDeploySchema.model_validate(yaml.safe_load(deployed)).applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    assert ServeArgs.model_validate(application.args).served[0].num_replicas == 2
    autoscaling = load_args(written(tmp_path, part)).autoscaling
    defaults = AutoscalingArgs(max_replicas=8)
    assert autoscaling == defaults  # what it shows beside max_replicas is said to be default


def test_serve_finds_the_class_of_args():
    """It looks for a class in the signature, and hands over a bare dict where it finds a string."""
    [parameter] = inspect.signature(build).parameters.values()
    assert parameter.annotation is ServeArgs


def test_a_file_of_one_model(tmp_path):
    args = load_args(written(tmp_path, "engine: {max_num_seqs: 4}\nnum_replicas: 2\n"))
    assert args.served[0].engine.max_num_seqs == 4
    assert args.num_replicas == 2


def test_a_part_may_be_shared_by_models(tmp_path):
    text = (
        "models:\n"
        "- {served_model_name: [a], engine: &small {max_num_seqs: 4}}\n"
        "- {served_model_name: [b], engine: {<<: *small, seed: 1}}\n"
    )
    first, second = load_args(written(tmp_path, text)).served
    assert first.engine.max_num_seqs == second.engine.max_num_seqs == 4
    assert second.engine.seed == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("a: [", "models.yaml is not YAML: (?s:.)*line 1", id="not YAML"),
        pytest.param("", "models.yaml holds no fields; write", id="empty"),
        pytest.param("- engine: {}", "models.yaml holds no fields", id="a list"),
        pytest.param(
            "engine: {seed: 1, seed: 2}", "the field 'seed' stands twice", id="a field twice"
        ),
        pytest.param("applications: []", "give the args of its application", id="Serve's own"),
        pytest.param(
            "engine: {max_num_seqs: 0}",
            "models.yaml: engine.max_num_seqs: input should be greater than 0, got 0",
            id="a bad value",
        ),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_args(written(tmp_path, text))


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*gone.yaml: No such file"):
        load_args(tmp_path / "gone.yaml")
