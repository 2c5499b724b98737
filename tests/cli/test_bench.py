from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from focus_ray.cli import app
from focus_ray.cli.bench import COMMANDS

runner = CliRunner()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_benchmarks_help(name: str) -> None:
    shown = runner.invoke(app, ["bench", name, "--help"])
    assert shown.exit_code == 0, shown.output
    assert f"usage: focus-ray bench {name}" in shown.stdout
    assert "--json" in shown.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_are_handed_on_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"focus_ray.benchmarks.{COMMANDS[name][0]}")
    seen: list[list[str]] = []
    monkeypatch.setattr(module, "main", seen.append)
    flags = ["--concurrency", "1", "8", "--json=a b.json", "-x"]
    assert runner.invoke(app, ["bench", name, *flags]).exit_code == 0
    assert seen == [flags]


def test_a_mistake_is_said_in_words() -> None:
    done = runner.invoke(app, ["bench", "throughput", "--mode", "fast"])
    assert done.exit_code == 2
    assert "focus-ray bench throughput: error: --mode fast" in done.stderr


def test_the_list_of_commands_loads_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from focus_ray.cli import app\n"
        "shown = CliRunner().invoke(app, ['bench', '--help'])\n"
        "print('throughput' in shown.stdout, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"
