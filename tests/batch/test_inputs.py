"""Files of input: found, cut into pieces, and every line of them read once."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from focus_ray.batch.inputs import find_inputs, pieces_of, read_piece
from focus_ray.batch.line_ranges import LineRanges


def read(file, lines_per_piece, done=None):
    """All lines that are left to do, through pieces."""
    found = []
    for piece in pieces_of(0, file, lines_per_piece):
        left = piece.without(done or LineRanges())
        found += read_piece(file, left) if left else []
    return found


@pytest.mark.parametrize("lines_per_piece", [1, 2, 3, 100])
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_lines_keep_their_numbers_however_a_file_is_cut(tmp_path, lines_per_piece, end):
    text = '{"a": 1}\n\n  \n{"b": "\\u2028 \u2028 é"}\n\n{"c": 3}' + end
    (tmp_path / "x.jsonl").write_bytes(text.encode())
    [file] = find_inputs([str(tmp_path / "x.jsonl")])
    lines = read(file, lines_per_piece)
    assert [number for number, _ in lines] == [1, 4, 6]
    assert [list(json.loads(raw)) for _, raw in lines] == [["a"], ["b"], ["c"]]


def test_what_is_done_is_not_read_again(tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(f"{n}\n" for n in range(1, 11)))
    [file] = find_inputs([str(tmp_path)])
    left = read(file, 4, LineRanges([(2, 5), (9, 12)]))
    assert left == [(number, b"%d" % number) for number in (1, 6, 7, 8)]


def test_rows_of_a_table_are_lines(tmp_path):
    rows = [{"prompt": f"p{n}", "max_tokens": n if n % 2 else None} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=2)
    [file] = find_inputs([str(tmp_path / "*.parquet")])
    lines = read(file, 1, LineRanges([(2, 2)]))
    assert [(number, json.loads(raw)["prompt"]) for number, raw in lines] == [
        (1, "p0"),
        (3, "p2"),
        (4, "p3"),
        (5, "p4"),
    ]
    assert json.loads(lines[0][1])["max_tokens"] is None


def test_folders_patterns_and_repetitions(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.parquet.crc", "notes.txt"):
        (tmp_path / name).write_text("{}\n")
    folder = str(tmp_path)
    names = [file.name for file in find_inputs([f"{folder}/b.jsonl", folder, f"{folder}/*.jsonl"])]
    assert names == [f"{folder}/b.jsonl", f"{folder}/a.jsonl"]
    first, second = find_inputs([folder])
    assert first.identity() != second.identity()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("no.jsonl", "there is no such file", id="missing"),
        pytest.param("*.jsonl", "there is no such file", id="a pattern that fits nothing"),
        pytest.param("notes.txt", "must end in one of", id="another kind"),
        pytest.param(".", "nothing in the folder", id="a folder without input"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"--input") as caught:
        find_inputs([str(tmp_path / name)])
    assert message in str(caught.value)
