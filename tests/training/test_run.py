"""The one command, at toy size on a CPU: from nothing to a checkpoint and its evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "training" / "run.py"


@pytest.mark.timeout(240)
def test_a_toy_run_writes_a_checkpoint_and_can_be_resumed(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    command = [sys.executable, str(SCRIPT), "--toy", "--out", str(out), "--work", str(work)]
    command += ["--workers", "1", "--max-text-chars", "200000"]
    parts = (["--minutes", "0.03", "--later-minutes", "0.03"], ["--minutes", "0.06", "--resume"])
    steps = []
    for part in parts:
        done = subprocess.run(
            [*command, *part],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        steps.append(json.loads((out / "progress.json").read_text())["num_steps"])
    assert 0 < steps[0] < steps[1]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert all((out / part).is_file() for part in index["weight_map"].values())
    (evaluation,) = json.loads((out / "evaluation.json").read_text())
    assert set(evaluation["exact_match"]) == set(evaluation["num_problems"])
