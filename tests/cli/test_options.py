"""Flags made from configurations, and a command line that starts fast."""

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from focus_ray import __version__
from focus_ray.cli import app
from focus_ray.cli.engine_flags import NOT_FLAGS, SAMPLING_FLAGS
from focus_ray.cli.options import flag_of, flags_of
from focus_ray.config import EngineConfig
from focus_ray.sampling import SamplingParams

runner = CliRunner()
HEAVY = {"torch", "ray", "transformers", "fastapi", "uvicorn", "triton", "huggingface_hub"}


def parse(model, names, arguments):
    """What a command with the flags of ``model`` gets for ``arguments``."""
    seen = []

    @flags_of(model, "config", names)
    def command(config: model, word: str = "") -> None:
        seen.append((config, word))

    application = typer.Typer()
    application.command()(command)
    result = runner.invoke(application, arguments)
    return (seen[0][0] if seen else None), result


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param([], {}, id="nothing given, nothing set"),
        pytest.param(["--max-model-len", "512"], {"max_model_len": 512}, id="optional number"),
        pytest.param(["--gpu-memory-utilization=0.5"], {"gpu_memory_utilization": 0.5}, id="share"),
        pytest.param(["--dtype", "bfloat16"], {"dtype": "bfloat16"}, id="choice"),
        pytest.param(
            ["--no-enable-prefix-caching"], {"enable_prefix_caching": False}, id="switched off"
        ),
        pytest.param(["--seed", "0"], {"seed": 0}, id="zero is given"),
    ],
)
def test_engine_flags_reach_the_configuration(arguments, expected):
    config, result = parse(EngineConfig, EngineConfig.model_fields, arguments)
    assert result.exit_code == 0, result.output
    assert config == EngineConfig(**expected)
    assert config.model_fields_set == set(expected)


def test_a_repeated_flag_makes_a_list():
    params, _ = parse(SamplingParams, SAMPLING_FLAGS, ["--stop", "a", "--stop", "b"])
    assert params.stop == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--page-size", "0"], "--page-size", id="out of range"),
        pytest.param(["--page-size", "many"], "--page-size", id="no number"),
        pytest.param(["--dtype", "float8"], "--dtype", id="no choice"),
        pytest.param(
            ["--page-size", "48", "--block-length", "32"], "48 is not a multiple", id="two flags"
        ),
        pytest.param(["--max-model-length", "5"], "--max-model-length", id="unknown flag"),
    ],
)
def test_bad_values_name_their_flag(arguments, words):
    config, result = parse(EngineConfig, EngineConfig.model_fields, arguments)
    assert config is None
    assert result.exit_code == 2
    assert words in result.output


def test_serve_has_a_flag_for_every_field():
    text = runner.invoke(app, ["serve", "--help"]).output
    missing = [
        n for n in EngineConfig.model_fields if n not in NOT_FLAGS and flag_of(n) not in text
    ]
    assert not missing


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_one_request_has_its_flags_once(command):
    text = runner.invoke(app, [command, "--help"]).output
    for name in SAMPLING_FLAGS:
        assert text.count(f"  {flag_of(name)} ") == 1, name
    assert flag_of("max_num_seqs") in text


def test_version():
    assert runner.invoke(app, ["--version"]).output.strip() == __version__


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["serve", "--port", "0"]])
def test_help_and_refusals_load_nothing_heavy(arguments):
    code = (
        "import sys\n"
        "from focus_ray.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"loaded = {HEAVY!r} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
