from __future__ import annotations

from pathlib import Path

import pytest

from focus_ray.errors import CheckpointError
from focus_ray.models import checkpoint
from focus_ray.models.checkpoint import resolve_checkpoint


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with one bundled model and one folder that is none."""
    for name in ("tiny", "unfinished"):
        (tmp_path / "bundled" / name).mkdir(parents=True)
    (tmp_path / "bundled" / "tiny" / "config.json").touch()
    monkeypatch.setattr(checkpoint, "_bundled_folder", lambda: tmp_path / "bundled")
    return tmp_path / "bundled"


def test_a_local_directory_is_taken_as_it_is(golden_sdar: Path) -> None:
    assert resolve_checkpoint(str(golden_sdar)) == golden_sdar


def test_a_bundled_name_comes_first(
    bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("tiny") == bundled / "tiny"


def test_an_unknown_name_says_what_was_tried(bundled: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint("unfinished")
    message = str(caught.value)
    assert "no checkpoint 'unfinished'" in message
    assert "bundled models (tiny), directory unfinished" in message
    assert "owner/name" in message


def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> str:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(checkpoint, "snapshot_download", no_network)
    with pytest.raises(CheckpointError, match="tried"):
        resolve_checkpoint(str(tmp_path / "gone"))


def test_a_hub_id_is_downloaded_at_its_revision(
    golden_sdar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend((repo, revision, allow_patterns))
        return str(golden_sdar)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert resolve_checkpoint("JetLM/SDAR-8B-Chat", "v2") == golden_sdar
    patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
    assert asked == ["JetLM/SDAR-8B-Chat", "v2", patterns]


def test_offline_and_not_cached_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"hub \(HF_HUB_OFFLINE is set\), which said: "):
        resolve_checkpoint("focus-ray-tests/not-there")


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        resolve_checkpoint(str(tmp_path))
