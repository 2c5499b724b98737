"""Folders: of this machine, and of a store that only fsspec knows."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from focus_ray.batch.storage import PARTIAL, Folder


@pytest.fixture(params=["local", "object store"])
def folder(request, tmp_path):
    if request.param == "local":
        return Folder(str(tmp_path / "out"))
    return Folder(f"memory://{uuid.uuid4().hex}/out")


def test_what_is_written_is_there(folder):
    assert folder.names() == []
    folder.write("manifest.json", b"one")
    folder.write("results/2.jsonl", b"two\n")
    folder.write("manifest.json", b"three")
    assert folder.names() == ["manifest.json", "results/2.jsonl"]
    assert folder.names("results") == ["results/2.jsonl"]
    assert folder.read("manifest.json") == b"three"
    assert folder.size("results/2.jsonl") == 4
    with folder.reading("results/2.jsonl") as file:
        assert list(file) == [b"two\n"]
    folder.delete("manifest.json")
    folder.delete("manifest.json")
    assert not folder.exists("manifest.json")


def test_a_write_that_fails_leaves_the_old_file(folder):
    folder.write("a", b"old")
    with pytest.raises(RuntimeError), folder.writing("a") as file:
        file.write(b"ne")
        raise RuntimeError
    assert folder.read("a") == b"old"
    assert folder.names() == ["a"]


def test_nothing_is_left_of_a_failed_local_write(tmp_path):
    with pytest.raises(RuntimeError), Folder(str(tmp_path)).writing("a"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_not_listed(tmp_path):
    (tmp_path / f"{PARTIAL}123-results").write_bytes(b"half")
    assert Folder(str(tmp_path)).names() == []


def test_missing_files_are_missing(folder):
    with pytest.raises(FileNotFoundError):
        folder.read("no")
    with pytest.raises(FileNotFoundError):
        folder.size("no")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_names_stay_below_the_folder(name, folder):
    with pytest.raises(ValueError, match="not a name below"):
        folder.read(name)


def test_an_unknown_kind_of_url_is_refused():
    with pytest.raises(ValueError, match="use a path, s3://"):
        Folder("nosuch://bucket/x")


def test_writers_at_once_do_not_disturb_each_other(folder):
    def write(number):
        with folder.writing(f"{number}/a") as file:
            folder.write(f"{number}/b", b"inner")
            file.write(b"%d" % number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(100)))
    assert all(folder.read(f"{number}/a") == b"%d" % number for number in range(100))
    assert len(folder.names()) == 200
