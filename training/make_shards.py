"""One worker: shards of packed rows, written to a folder until it is stopped.

A process of its own with light imports: a dozen of them start while the GPU compiles.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import paths  # noqa: F401  (puts the repository on sys.path)
from chat import END_OF_TEXT, special_id
from packing import chat_documents, pack, text_documents
from tokenizers import Tokenizer

MAX_FILES = 100
"""Workers pause while this many shards wait on disk."""


def shard_is_text(index: int, text_percent: int) -> bool:
    """Spread the text shards evenly: 37 has no common divisor with 100."""
    return index * 37 % 100 < text_percent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="output folder of text.py")
    parser.add_argument("--text-percent", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True, help="rows per shard")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--worker", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    args = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    fill = special_id(tokenizer, END_OF_TEXT)
    index = args.worker
    while True:
        seed = args.seed * 1_000_003 + index
        # a text shard is a chat shard while the text is not ready yet: the GPU need not wait
        if shard_is_text(index, args.text_percent) and (args.text / "done").exists():
            documents = text_documents(seed, index * args.rows * 4, args.text)
        else:
            documents = chat_documents(seed, tokenizer)
        arrays = pack(documents, args.rows, fill)
        unfinished = args.out / f"unfinished-{index}.npz"
        np.savez(unfinished, allow_pickle=False, **arrays)
        unfinished.rename(args.out / f"shard-{index}.npz")
        index += args.workers
        while sum(1 for _ in args.out.glob("shard-*.npz")) > MAX_FILES:
            time.sleep(0.2)


if __name__ == "__main__":
    main()
