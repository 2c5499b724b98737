"""Commits count as a whole, once, for one job at a time."""

from __future__ import annotations

import io
import json
import random
from itertools import pairwise

import pyarrow.parquet as pq
import pytest

from focus_ray.batch.ledger import MANIFEST, Ledger, LostOwnership
from focus_ray.batch.line_ranges import LineRanges
from focus_ray.batch.records import Record, Source, error_record, request_key, result_record
from focus_ray.batch.storage import Folder
from focus_ray.errors import RequestRejected
from focus_ray.openai.replies import DetokenizeReply

ARGUMENTS = {"model": "m", "inputs": [{"file": "a", "size": 3}]}


def record(text="{}", is_error=False):
    return Record(text, is_error, {"completion_tokens": 2})


def committed(folder):
    names = [*folder.names("results"), *folder.names("errors")]
    return sorted(line for name in names for line in folder.read(name).decode().splitlines())


@pytest.fixture
def folder(tmp_path):
    return Folder(str(tmp_path / "out"))


def test_a_later_start_knows_what_is_done(folder):
    ledger = Ledger(folder, ARGUMENTS)
    ledger.commit({(0, 1): record("a"), (0, 3): record("b", True), (1, 1): record("c")})
    ledger.commit({(0, 2): record("d")})
    again = Ledger(folder, ARGUMENTS)
    assert again.done(0).ranges == [(1, 3)] and again.done(1).ranges == [(1, 1)]
    assert (again.num_results, again.num_errors) == (3, 1)
    assert again.counts == {"completion_tokens": 8}
    assert committed(folder) == ["a", "b", "c", "d"]


def test_a_line_keeps_its_first_record(folder):
    ledger = Ledger(folder, ARGUMENTS)
    ledger.commit({(0, 1): record("first")})
    ledger.commit({(0, 1): record("second"), (0, 2): record("other")})
    ledger.commit({(0, 2): record("third")})
    assert committed(folder) == ["first", "other"]


@pytest.mark.parametrize("lost", ["the shard", "the manifest"])
def test_a_commit_that_is_cut_short_never_was(folder, monkeypatch, lost):
    Ledger(folder, ARGUMENTS).commit({(0, 1): record("a")})
    ledger = Ledger(folder, ARGUMENTS)
    write = folder.write

    def killed(name, data):
        if (name == MANIFEST) == (lost == "the manifest"):
            raise KeyboardInterrupt
        write(name, data)

    monkeypatch.setattr(folder, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        ledger.commit({(0, 2): record("b")})
    monkeypatch.undo()
    again = Ledger(folder, ARGUMENTS)
    assert 2 not in again.done(0)
    again.commit({(0, 2): record("b again")})
    again.finish()
    assert committed(folder) == ["a", "b again"]


def test_a_manifest_that_could_not_be_written_is_made_up_for_by_the_next(folder, monkeypatch):
    """The same lines may be committed again; they count once."""
    ledger = Ledger(folder, ARGUMENTS)
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_save", lambda: (_ for _ in ()).throw(OSError("no network")))
        with pytest.raises(OSError, match="no network"):
            ledger.commit({(0, 1): record("a")})
    ledger.commit({(0, 1): record("a"), (0, 2): record("b")})
    ledger.finish()
    again = Ledger(folder, ARGUMENTS)
    assert again.num_results == 2 and again.done(0).ranges == [(1, 2)]
    assert committed(folder) == ["a", "b"]


def test_a_job_that_was_replaced_commits_nothing_more(folder):
    old = Ledger(folder, ARGUMENTS)
    new = Ledger(folder, ARGUMENTS)
    with pytest.raises(LostOwnership):
        old.commit({(0, 1): record("old")})
    assert committed(folder) == []
    new.commit({(0, 1): record("new")})
    assert [shard.num_results for shard in Ledger(folder, ARGUMENTS).shards] == [1]
    assert committed(folder) == ["new"]


def test_what_an_old_job_names_in_the_last_moment_is_kept(folder, monkeypatch):
    """Between the old job's look at the owner and its manifest, another job begins."""
    old = Ledger(folder, ARGUMENTS)
    save = old._save

    def late():
        Ledger(folder, ARGUMENTS)
        save()

    monkeypatch.setattr(old, "_save", late)
    old.commit({(0, 1): record("old")})
    last = Ledger(folder, ARGUMENTS)
    last.commit({(0, 1): record("again"), (0, 2): record("new")})
    last.finish()
    assert committed(folder) == ["new", "old"]


def test_a_file_that_counts_and_is_gone_is_missed(folder):
    ledger = Ledger(folder, ARGUMENTS)
    ledger.commit({(0, 1): record("a")})
    folder.delete(folder.names("results")[0])
    with pytest.raises(ValueError, match=r"which manifest\.json names"):
        ledger.finish()


def test_other_arguments_are_refused_with_the_difference(folder):
    Ledger(folder, ARGUMENTS)
    other = {"model": "n", "inputs": [{"file": "a", "size": 4}]}
    with pytest.raises(ValueError, match=r"other arguments") as caught:
        Ledger(folder, other)
    assert "model: was 'm', is 'n'" in str(caught.value)
    assert "inputs[0].size: was 3, is 4" in str(caught.value)


@pytest.mark.parametrize("text", [b'{"version": 1, "owner": "a", "arguments": {}}', b"[]", b"{"])
def test_a_manifest_of_another_version_is_refused(folder, text):
    folder.write(MANIFEST, text)
    with pytest.raises(ValueError, match=r"manifest\.json is of no job, or of one that another"):
        Ledger(folder, ARGUMENTS)
    assert folder.read(MANIFEST) == text


def test_a_folder_of_somebody_else_is_left_alone(folder):
    folder.write("results/mine.txt", b"x")
    with pytest.raises(ValueError, match="not the output of a batch"):
        Ledger(folder, ARGUMENTS)
    assert folder.read("results/mine.txt") == b"x"


def test_records_as_a_table(folder):
    source = Source("a.jsonl", 7)
    reply = DetokenizeReply(prompt="é")
    ledger = Ledger(folder, ARGUMENTS, "parquet")
    ledger.commit(
        {
            (0, 7): result_record(request_key("j", source), "id", reply, {}, source),
            (0, 8): error_record("k", "id2", RequestRejected("no", "seed"), Source("a.jsonl", 8)),
        }
    )
    [name] = folder.names("results")
    [row] = pq.read_table(io.BytesIO(folder.read(name))).to_pylist()
    assert (row["custom_id"], row["file"], row["line"]) == ("id", "a.jsonl", 7)
    assert row["body"] == '{"prompt": "é"}'
    [error] = map(json.loads, folder.read(folder.names("errors")[0]).splitlines())
    assert error["response"]["status_code"] == 400 and error["source"]["line"] == 8
    assert error["response"]["body"]["error"]["param"] == "seed"


def test_ranges_are_the_set_of_their_lines():
    rng = random.Random(0)
    for _ in range(50):
        lines = {rng.randint(1, 40) for _ in range(rng.randint(0, 30))}
        more = {rng.randint(1, 40) for _ in range(rng.randint(0, 30))}
        ranges = LineRanges.of(lines) | LineRanges.of(more)
        assert {line for line in range(45) if line in ranges} == lines | more
        assert len(ranges) == len(lines | more)
        ends = ranges.ranges
        assert all(b[0] > a[1] + 1 for a, b in pairwise(ends))
