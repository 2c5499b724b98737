"""Make ``focus_ray.tasks`` importable from a checkout that is not installed.

A training machine needs torch, numpy, tokenizers and safetensors; the package itself, with Ray and
pydantic, need not be installed there. Only ``focus_ray.tasks``, which is pure Python, is imported.
The repository root goes last, so that nothing it holds can shadow an installed package.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL_DIR = ROOT / "models" / "bundled" / "sdar-tiny"

if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
