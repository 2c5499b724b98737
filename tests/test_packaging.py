"""What gets installed: every package folder, the public names, nothing heavy on import."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import focus_ray

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def package_sources() -> dict[str, Path]:
    """Every package folder on disk, by the name it is installed under."""
    return {
        ".".join([name, *init.parent.relative_to(ROOT / folder).parts]): init.parent
        for name, folder in SETUPTOOLS["package-dir"].items()
        for init in (ROOT / folder).rglob("__init__.py")
    }


def test_every_package_folder_is_listed() -> None:
    assert set(package_sources()) == set(SETUPTOOLS["packages"])


def test_every_code_folder_is_a_package() -> None:
    """A folder of modules without ``__init__.py`` works in the checkout, but no wheel has it."""
    code_folders = {
        path.parent
        for folder in SETUPTOOLS["package-dir"].values()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert code_folders == set(package_sources().values())


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """File names in a wheel that is built, by way of a source distribution, from a clean copy."""
    work = tmp_path_factory.mktemp("wheel")
    tree, sdist_dir, wheel_dir = work / "tree", work / "sdist", work / "wheel"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in sorted({Path(f).parts[0] for f in SETUPTOOLS["package-dir"].values()}):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    _build("build_sdist", tree, sdist_dir)
    (sdist,) = sdist_dir.iterdir()
    shutil.unpack_archive(sdist, work / "unpacked", filter="data")
    (unpacked,) = (work / "unpacked").iterdir()
    _build("build_wheel", unpacked, wheel_dir)
    (wheel,) = wheel_dir.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _build(hook: str, tree: Path, out: Path) -> None:
    out.mkdir()
    code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_holds_every_module(wheel_names: set[str]) -> None:
    modules = {
        f"{name.replace('.', '/')}/{path.name}"
        for name, folder in package_sources().items()
        for path in folder.glob("*.py")
    }
    assert modules <= wheel_names


def test_wheel_holds_the_data_files(wheel_names: set[str]) -> None:
    folders = ("models/bundled", "cluster/configs")
    bundled = {
        f"focus_ray/{path.relative_to(ROOT).as_posix()}"
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    dashboard = "focus_ray/cluster/grafana/focus-ray.json"
    assert {"focus_ray/py.typed", dashboard} | bundled <= wheel_names


def test_wheel_leaves_recorded_results_in_the_repository(wheel_names: set[str]) -> None:
    assert not [name for name in wheel_names if name.startswith("focus_ray/benchmarks/results")]


def test_wheel_leaves_the_bare_names_alone(wheel_names: set[str]) -> None:
    """A top-level ``kernels`` would stand in for the Hugging Face package of that name."""
    assert {name.split("/")[0] for name in wheel_names if ".dist-info/" not in name} == {
        "focus_ray"
    }


def test_installed_version_is_the_packages_own() -> None:
    """Fails when the environment holds another version: run ``make install``."""
    assert version("focus-ray") == focus_ray.__version__


def test_console_command_points_at_the_cli() -> None:
    (command,) = entry_points(group="console_scripts", name="focus-ray")
    assert command.value == PYPROJECT["project"]["scripts"]["focus-ray"]
    assert callable(command.load())


@pytest.mark.parametrize("name", sorted(focus_ray._HOME_OF))
def test_public_name_is_found(name: str) -> None:
    value = getattr(focus_ray, name)
    assert value.__module__ == focus_ray._HOME_OF[name]
    assert name in dir(focus_ray)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        _ = focus_ray.Llm


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, focus_ray; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "pydantic", "numpy", "ray"}


def test_constraints_name_every_requirement() -> None:
    """A requirement without a tested version would float with the package index."""
    project = PYPROJECT["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    pinned = {
        _canonical(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    assert {_canonical(_requirement_name(line)) for line in wanted} <= pinned


def _requirement_name(requirement: str) -> str:
    for stop in "[<>=;! ":
        requirement = requirement.split(stop)[0]
    return requirement


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-")
