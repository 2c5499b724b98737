"""Compare this implementation with golden data (tests/golden/README.md has the formats).

    python tests/conformance.py --models tests/golden/models/sdar [DIR ...]
    python tests/conformance.py --focus tests/golden/focus [DIR ...]

Checkpoints: logits, then generations through the engine. FOCUS: importance, targets, selection,
and the traces of whole requests, against the torch definitions and against the Triton kernels, on
a GPU where there is one and else in Triton's interpreter. Prints a table and exits with 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent / "support"))

from conformance_report import Report, print_reports, reports_from_json, reports_to_json

BACKENDS = ("definitions", "kernels")


def check_focus_directories(
    directories: Sequence[Path], backends: Sequence[str], device: str
) -> list[Report]:
    """The definitions here, the kernels where they can run; both at once."""
    interpreter = None
    if "kernels" in backends and not _kernels_run_here():
        interpreter = _start_interpreter(directories)
    reports = [
        report
        for kind in backends
        if interpreter is None or kind == "definitions"
        for report in _check_here(directories, kind, device)
    ]
    if interpreter is not None:
        output, _ = interpreter.communicate()
        if not output:
            raise SystemExit(f"the kernels could not be checked, status {interpreter.returncode}")
        reports += reports_from_json(output)
    return reports


def _check_here(directories: Sequence[Path], kind: str, device: str) -> list[Report]:
    from focus_backend import definitions, kernels
    from focus_golden import check_focus_directory

    backends = definitions(device) if kind == "definitions" else kernels()
    return [
        check_focus_directory(directory, backend)
        for directory in directories
        for backend in backends
    ]


def _kernels_run_here() -> bool:
    import torch

    from focus_ray.kernels.launch import INTERPRETED

    return INTERPRETED or torch.cuda.is_available()


def _start_interpreter(directories: Sequence[Path]) -> subprocess.Popen[str]:
    """This script for the kernels alone; Triton must know before it is imported."""
    command = [sys.executable, __file__, "--backend", "kernels", "--json", "--focus"]
    return subprocess.Popen(
        [*command, *map(str, directories)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", type=Path, default=[], metavar="DIR")
    parser.add_argument("--focus", nargs="+", type=Path, default=[], metavar="DIR")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of models and definitions"
    )
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, help="of generations; compares ranks, too"
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, help="what FOCUS is checked with; default: both"
    )
    parser.add_argument("--json", action="store_true", help="print the reports as JSON, no table")
    options = parser.parse_args(arguments)
    if not options.models and not options.focus:
        parser.error("name at least one directory with --models or --focus")
    reports = []
    if options.models:
        from model_golden import check_model_directory

        size = options.tensor_parallel_size
        reports += [check_model_directory(path, options.device, size) for path in options.models]
    if options.focus:
        backends = [options.backend] if options.backend else BACKENDS
        reports += check_focus_directories(options.focus, backends, options.device)
    if options.json:
        print(reports_to_json(reports))
    else:
        print_reports(Console(), reports)
    return int(any(report.failed for report in reports))


if __name__ == "__main__":
    # This folder comes first on the path, and its kernels/ would pass for the Hugging Face package.
    sys.path[:] = [entry for entry in sys.path if Path(entry) != Path(__file__).parent]
    raise SystemExit(main())
