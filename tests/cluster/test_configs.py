"""The files that come with the package: each valid, but for what its user must set."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from focus_ray.cli.cluster_check import examine
from focus_ray.cli.cluster_files import read_files
from focus_ray.cluster.accelerators import GPUS
from focus_ray.cluster.local_ray import private
from focus_ray.cluster.strict_yaml import unset_values
from focus_ray.serve.haproxy import BINARY, COMMAND
from focus_ray.serve.http_proxy import SWITCH

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "cluster" / "configs"
FILES = {path.relative_to(CONFIGS).as_posix(): path for path in sorted(CONFIGS.glob("*/*.yaml"))}
SET = {
    "<AMI>": "ami-0",
    "<GPU>": "NVIDIA-H100-80GB-HBM3",
    "<HEAD>": "10.0.0.1",
    "<HOST>": "10.0.0.1",
    "<IMAGE>": "registry/focus-ray:0.1.0",
    "<INPUT>": "in.jsonl",
    "<OUTPUT>": "out",
    "<PASSWORD>": "secret",
    "<PROJECT>": "project",
    "<SECURITY_GROUP>": "sg-0",
    "<SUBNET>": "projects/p/regions/r/subnetworks/s",
    "<USER>": "me",
    "<VENV>": "/opt/focus-ray",
    "<WORKER>": "10.0.0.2",
}
"""What a user might write."""


@pytest.fixture(autouse=True)
def _no_downloads(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def with_everything_set(folder: Path, name: str) -> Path:
    text = FILES[name].read_text()
    for placeholder, value in SET.items():
        text = text.replace(placeholder, value)
    path = folder / Path(name).name
    path.write_text(text)
    return path


def test_there_is_a_file_for_each_way():
    assert {name.split("/")[0] for name in FILES} == {"kubernetes", "launcher", "serve"}
    assert len(FILES) >= 12


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_wrong_but_what_is_not_set(name):
    report = examine(read_files([FILES[name]]), GPUS["H100"])
    assert all("is not set" in error for error in report.findings.errors)


@pytest.mark.parametrize("name", FILES)
def test_with_everything_set_all_is_well(name, tmp_path):
    report = examine(read_files([with_everything_set(tmp_path, name)]), GPUS["H100"])
    assert not report.findings.errors


@pytest.mark.parametrize(
    ("launcher", "serve"),
    [
        ("one-machine", "one-gpu"),
        ("on-premise", "eight-gpus"),
        ("on-premise", "tensor-parallel-2"),
        ("on-premise", "many-models"),
        ("aws", "one-gpu"),
        ("gcp", "one-gpu"),
    ],
)
def test_what_heads_put_together_fits(launcher, serve, tmp_path):
    paths = [
        with_everything_set(tmp_path, f"launcher/{launcher}.yaml"),
        FILES[f"serve/{serve}.yaml"],
    ]
    report = examine(read_files(paths), None)
    assert not report.findings.errors
    assert "?" not in {cell for row in report.machines + report.engines for cell in row}


@pytest.mark.parametrize("path", [*FILES.values(), CONFIGS / "Dockerfile"], ids=lambda p: p.name)
def test_the_head_says_what_it_gives_and_how_to_start_it(path):
    head = path.read_text().splitlines()[:4]
    assert [line[:2] for line in head] == ["# ", "# ", "# ", ""]


@pytest.mark.parametrize("name", FILES)
def test_each_value_to_set_says_how(name):
    text = FILES[name].read_text()
    found = list(unset_values(text))
    assert not [unset for unset in found if "the head" in unset.remark]
    assert len(found) <= 5
    assert bool(found) == ("SET:" in text)


def test_the_lines_of_redis_are_right_when_the_comment_signs_are_gone(tmp_path):
    path = with_everything_set(tmp_path, "kubernetes/rayservice.yaml")
    text, changes = re.subn(
        r"^( +)# (gcsFaultToleranceOptions:|  redis\w+: .*)$", r"\1\2", path.read_text(), flags=re.M
    )
    assert changes == 3
    path.write_text(text)
    assert not examine(read_files([path]), None).findings.errors
    spec = next(yaml.safe_load_all(text))["spec"]["rayClusterConfig"]
    redis = list(yaml.safe_load_all(FILES["kubernetes/redis.yaml"].read_text()))
    name, port = spec["gcsFaultToleranceOptions"]["redisAddress"].split(":")
    services = {each["metadata"]["name"]: each for each in redis if each["kind"] == "Service"}
    assert services[name]["spec"]["ports"] == [{"port": int(port)}]


def test_budgets_are_of_pods_that_there_are():
    service, *budgets = yaml.safe_load_all(FILES["kubernetes/rayservice.yaml"].read_text())
    cluster = service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    labels = [group["template"]["metadata"]["labels"] for group in groups]
    assert [each["spec"]["selector"]["matchLabels"] for each in budgets] == labels[::-1]


@pytest.mark.parametrize("name", [name for name in FILES if "kubernetes" not in name])
def test_nobody_reaches_a_cluster_without_a_token(name):
    """Ray's ports run code. Where the launcher starts Ray, the token is copied and asked for."""
    config = yaml.safe_load(FILES[name].read_text())
    if "provider" not in config:
        return
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    in_image = "RAY_AUTH_MODE=token" in (CONFIGS / "Dockerfile").read_text()
    asked = any("RAY_AUTH_MODE=token" in each for each in config.get("setup_commands", []))
    assert asked or ("docker" in config and in_image)


@pytest.mark.parametrize(
    "name", ["Dockerfile", "launcher/one-machine.yaml", "launcher/on-premise.yaml"]
)
def test_ray_is_told_what_makes_streams_cheap(name):
    """Wherever Ray is started by what is in these files; the other files start it in the image."""
    wanted = {SWITCH: "1", "RAY_worker_niceness": private()["RAY_worker_niceness"]}
    text = (CONFIGS / name).read_text()
    assert all(f"{variable}={value}" in text for variable, value in wanted.items())
    assert f"{BINARY}=" in text and COMMAND in text


def test_the_image_holds_what_is_installed():
    copied = set(re.findall(r"^COPY (.+) \S+$", (CONFIGS / "Dockerfile").read_text(), re.M))
    names = {name for line in copied for name in line.split()}
    assert all((ROOT / name).exists() for name in names)
    packages = re.findall(
        r'^"focus_ray(?:\.\w+)?" = "(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert set(packages) <= names
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    assert kept == names


def test_versions_are_the_tested_ones():
    constraints = (ROOT / "constraints.txt").read_text()
    for name in ("kubernetes/rayservice.yaml", "kubernetes/rayjob.yaml"):
        [version] = re.findall(r"rayVersion: (\S+)", FILES[name].read_text())
        assert f"ray=={version}\n" in constraints
