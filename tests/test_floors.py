"""Imports point downwards: docs/architecture.md's table of floors, checked in every file.

Imports inside functions and under ``TYPE_CHECKING`` count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import focus_ray

ROOT = Path(__file__).parents[1]
PACKAGE_DIR = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
    "package-dir"
]
HTTP = ("fastapi", "starlette", "uvicorn")
TENSORS = ("torch", "triton")


@dataclass(frozen=True)
class Room:
    """A room may import itself and rooms on lower floors, less what it must not know.

    Rooms on one floor do not know each other.
    """

    floor: int
    must_not_know: tuple[str, ...] = ()


ROOMS = {
    "focus_ray": Room(7),  # __init__.py alone, which forwards names
    "focus_ray.cli": Room(7),
    "focus_ray.serve": Room(6, (*TENSORS, "focus_ray.kernels", "focus_ray.models")),
    "focus_ray.batch": Room(5, (*HTTP, *TENSORS, "focus_ray.kernels", "focus_ray.models")),
    "focus_ray.openai": Room(4, ("ray", *HTTP, *TENSORS, "focus_ray.kernels", "focus_ray.models")),
    "focus_ray.cluster": Room(4, HTTP),
    "focus_ray.llm": Room(4, ("ray", *HTTP)),
    "focus_ray.engine": Room(3, ("ray", *HTTP)),
    "focus_ray.models": Room(2, ("ray", *HTTP)),
    "focus_ray.kernels": Room(1, ("ray", *HTTP, "transformers")),
    "focus_ray.config": Room(0, ("ray", *HTTP, *TENSORS, "transformers")),
    "focus_ray.tasks": Room(0, ("ray", *HTTP, *TENSORS, "transformers", "pydantic")),
}
# Rooms of several files or folders, under the name of the first.
ONE_ROOM = (
    ("focus_ray.config", "focus_ray.errors", "focus_ray.sampling"),
    ("focus_ray.cli", "focus_ray.benchmarks"),  # ``focus-ray bench`` is the face of the second
)


@dataclass(frozen=True)
class Import:
    """One imported module, and the line that asks for it."""

    target: str
    line: int


def package_files() -> dict[str, Path]:
    """Every file of the installed package, by module name."""
    files: dict[str, Path] = {}
    for name, folder in PACKAGE_DIR.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join([name, *(part for part in parts if part != "__init__")])] = path
    return files


def imports_of(source: str) -> Iterator[Import]:
    """All imports of a file; ``from a import b`` as ``a.b``, so that submodules are seen."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                yield Import(resolve(module, alias.name), node.lineno)


def resolve(module: str, name: str) -> str:
    """The module a name is taken from, through the package's lazy exports."""
    if module == "focus_ray":
        return focus_ray._HOME_OF.get(name, f"focus_ray.{name}")
    return f"{module}.{name}"


def is_within(target: str, prefix: str) -> bool:
    return target == prefix or target.startswith(f"{prefix}.")


def room_of(module: str) -> str | None:
    """The room a module of ours lives in; None where the table has no place for it."""
    for parts in ONE_ROOM:
        if any(is_within(module, part) for part in parts):
            return parts[0]
    inner = (room for room in ROOMS if room != "focus_ray" and is_within(module, room))
    return next(inner, "focus_ray" if module == "focus_ray" else None)


def violation(module: str, target: str) -> str | None:
    """Why ``module`` may not import ``target``; None if it may."""
    here = room_of(module)
    if here is None:
        return f"{module} is in no room of the table: add it there and to docs/architecture.md"
    for banned in ROOMS[here].must_not_know:
        if is_within(target, banned):
            return f"{here} must not know {banned}"
    if target.startswith("."):
        return "relative imports are not used"
    if not is_within(target, "focus_ray") or target == "focus_ray.__version__":
        return None
    there = room_of(target)
    if there is None:
        return f"{target} is in no room of the table"
    if there != here and ROOMS[there].floor >= ROOMS[here].floor:
        return f"floor {ROOMS[here].floor} must not import floor {ROOMS[there].floor}"
    return None


FILES = package_files()


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_downwards(module: str) -> None:
    path = FILES[module]
    found = [
        f"{path.relative_to(ROOT)}:{item.line}: {item.target}: {reason}"
        for item in imports_of(path.read_text())
        if (reason := violation(module, item.target))
    ]
    assert not found, "\n".join(found)


def test_every_module_has_a_room() -> None:
    assert not [name for name in FILES if room_of(name) is None]


@pytest.mark.parametrize(
    ("module", "line", "allowed"),
    [
        pytest.param("focus_ray.engine.engine", "import torch", True, id="library"),
        pytest.param("focus_ray.engine.engine", "from focus_ray import models", True, id="down"),
        pytest.param("focus_ray.models.sdar", "import focus_ray.engine.pages", False, id="up"),
        pytest.param("focus_ray.kernels.rope", "from focus_ray import LLM", False, id="lazy name"),
        pytest.param(
            "focus_ray.openai.tasks", "from focus_ray.cluster import job", False, id="beside"
        ),
        pytest.param("focus_ray.serve.app", "from ray import serve", True, id="ray above engine"),
        pytest.param(
            "focus_ray.engine.engine", "def f():\n    import ray.util", False, id="in a function"
        ),
        pytest.param(
            "focus_ray.models.sdar", "if TYPE_CHECKING:\n    import ray", False, id="type only"
        ),
        pytest.param("focus_ray.models.sdar", "import rayon", True, id="a longer name"),
        pytest.param("focus_ray.serve.app", "import torch.nn", False, id="tensors in serve"),
        pytest.param("focus_ray.tasks.sorting", "import torch", False, id="tensors in tasks"),
        pytest.param(
            "focus_ray.config", "from focus_ray.sampling import Unmasking", True, id="one room"
        ),
        pytest.param(
            "focus_ray.cli.bench", "import focus_ray.benchmarks.timing", True, id="two folders"
        ),
        pytest.param("focus_ray.models.sdar", "from . import layers", False, id="relative"),
        pytest.param(
            "focus_ray.models.sdar", "from focus_ray import util", False, id="no such room"
        ),
    ],
)
def test_rules_mean_what_they_say(module: str, line: str, allowed: bool) -> None:
    reasons = [violation(module, item.target) for item in imports_of(line)]
    assert (reasons == [None]) is allowed


def test_engine_runs_without_ray() -> None:
    """Everything below the Ray floors imports where Ray, FastAPI and uvicorn are not installed."""
    below = ["focus_ray.llm"] + [
        name
        for name in FILES
        if (room := room_of(name)) and ROOMS[room].floor <= ROOMS["focus_ray.engine"].floor
    ]
    code = (
        "import sys, importlib\n"
        "for absent in ('ray', 'fastapi', 'starlette', 'uvicorn'): sys.modules[absent] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *below], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
