from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from focus_ray.config import DEFAULT_CONFIDENCE_THRESHOLD, EngineConfig
from focus_ray.kernels.slot_words import STRATEGIES
from focus_ray.sampling import Unmasking

PAGE = Path(__file__).parents[1] / "docs" / "focus.md"


def test_defaults_of_focus_are_those_of_its_page() -> None:
    told = dict(re.findall(r"^\| `--([a-z-]+)[^`]*` \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE))
    assert told.pop("decoding") == "what a step takes up"  # the head of another table
    assert told.pop("confidence-threshold") == "0.8 under `focus`, else 0.9"
    assert DEFAULT_CONFIDENCE_THRESHOLD == {"block": 0.9, "delayed": 0.9, "focus": 0.8}
    assert EngineConfig().decoding == "focus"
    assert EngineConfig().focus_adaptive is None
    assert told == {
        "focus-alpha": str(EngineConfig().focus_alpha),
        "eviction-policy": f"`{EngineConfig().eviction_policy}`",
        "attend-cached": "on" if EngineConfig().attend_cached else "off",
        "focus-adaptive": "on on a GPU, off on a CPU",
        "round-importance": "on" if EngineConfig().round_importance else "off",
        "diagnose-recall-every": str(EngineConfig().diagnose_recall_every),
    }


def test_defaults_of_unmasking_are_those_of_its_page() -> None:
    page = PAGE.with_name("unmasking.md").read_text()
    assert get_args(Unmasking) == STRATEGIES
    told = dict(re.findall(r"^\| `([a-z_]+)` \| ([^|]+) \|", page, re.MULTILINE))
    assert set(STRATEGIES) <= set(re.findall(r"^\| `([a-z_]+)`", page, re.MULTILINE))
    assert {name: told[name] for name in ("editing_threshold", "max_post_steps")} == {
        "editing_threshold": str(EngineConfig().editing_threshold),
        "max_post_steps": str(EngineConfig().max_post_steps),
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({}, "decoding focus .* use decoding block", id="evicting"),
        pytest.param({"decoding": "delayed"}, "decoding delayed", id="tokens leave when decoded"),
        pytest.param(
            {"decoding": "block", "denoising_steps": 4}, "denoising_steps 4", id="a schedule"
        ),
    ],
)
def test_joint_threshold_is_refused_where_it_makes_no_sense(
    fields: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        EngineConfig(unmasking="joint_threshold", **fields)
    assert EngineConfig(unmasking="joint_threshold", decoding="block").max_post_steps == 16
