"""How the records of a shard are written: JSON lines, or a Parquet table of the same."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ShardFormat:
    """A kind of file.

    Args:
        suffix: of its name.
        encode: records, each a line of JSON, as the bytes of a file.
    """

    suffix: str
    encode: Callable[[Sequence[str]], bytes]


def _json_lines(records: Sequence[str]) -> bytes:
    return "".join(f"{record}\n" for record in records).encode()


def _parquet(records: Sequence[str]) -> bytes:
    """One row a record; ``body`` stays JSON, for its shape depends on the request."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    schema = pa.schema(
        [
            ("id", pa.string()),
            ("custom_id", pa.string()),
            ("file", pa.string()),
            ("line", pa.int64()),
            ("status_code", pa.int32()),
            ("body", pa.string()),
        ]
    )
    rows = []
    for record in map(json.loads, records):
        source, response = record.get("source", {}), record["response"]
        rows.append(
            {
                "id": record["id"],
                "custom_id": record["custom_id"],
                "file": source.get("file"),
                "line": source.get("line"),
                "status_code": response["status_code"],
                "body": json.dumps(response["body"], ensure_ascii=False),
            }
        )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer)
    return buffer.getvalue()


FORMATS = {
    "jsonl": ShardFormat(".jsonl", _json_lines),
    "parquet": ShardFormat(".parquet", _parquet),
}
