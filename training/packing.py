"""Pack documents into rows: a clean half and a noisy half.

A row holds ``CLEAN`` positions of whole documents, one after the other, and ``NOISY`` positions
that point into them: every block with answer tokens stands there twice, so that two complementary
masks of it are learnt at once. Everything else (positions, attention ranges, masks) follows from
these few arrays and is computed on the GPU, see ``objectives.py``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paths  # noqa: F401  (puts the repository on sys.path)
from chat import END_OF_TEXT, END_OF_TURN, chat_text, special_id
from numpy.typing import NDArray
from tokenizers import Tokenizer

from focus_ray.tasks import training_conversations

CLEAN, NOISY = 2048, 3072
BLOCK_LENGTHS, BLOCK_SHARES = (8, 16, 32, 64), (0.08, 0.18, 0.54, 0.20)
MAX_DOCUMENT = CLEAN
MAX_NOISY_TOKENS = 1024
"""Most tokens of one document that are noised; they take twice as many noisy positions."""
TEXT_NOISY_TOKENS = 384
OPEN_ROWS = 8

Int16 = NDArray[np.int16]


class Document(NamedTuple):
    """Token ids, a whole number of blocks; ``[answer, noisy_end)`` is learnt by diffusion."""

    ids: Int16
    answer: int
    noisy_end: int
    block: int

    @property
    def noisy_start(self) -> int:
        return self.answer // self.block * self.block

    @property
    def num_noisy(self) -> int:
        return 2 * (self.noisy_end - self.noisy_start)


class Row:
    """One row while it is filled.

    Attributes:
        clean: ``[CLEAN]`` token ids, end-of-text where empty.
        start: ``[CLEAN]`` where the document of a position starts in the row; itself where empty.
        block: ``[CLEAN]`` block length of that document; 1 where empty.
        answer: ``[CLEAN]`` 1 where the token belongs to what diffusion learns.
        source: ``[NOISY]`` the clean position a noisy one is a copy of.
        copy: ``[NOISY]`` 1 or 2 for the two copies of a block; 0 where empty.
    """

    def __init__(self, fill_id: int) -> None:
        self.clean = np.full(CLEAN, fill_id, np.int16)
        self.start = np.arange(CLEAN, dtype=np.int16)
        self.block = np.ones(CLEAN, np.int8)
        self.answer = np.zeros(CLEAN, np.int8)
        self.source = np.zeros(NOISY, np.int16)
        self.copy = np.zeros(NOISY, np.int8)
        self.num_clean = 0
        self.num_noisy = 0

    def fits(self, document: Document) -> bool:
        return (
            self.num_clean + len(document.ids) <= CLEAN
            and self.num_noisy + document.num_noisy <= NOISY
        )

    @property
    def space(self) -> int:
        return CLEAN - self.num_clean + NOISY - self.num_noisy

    def add(self, document: Document) -> None:
        first, last = self.num_clean, self.num_clean + len(document.ids)
        self.clean[first:last] = document.ids
        self.start[first:last] = first
        self.block[first:last] = document.block
        self.answer[first + document.answer : first + document.noisy_end] = 1
        noisy = np.arange(first + document.noisy_start, first + document.noisy_end, dtype=np.int16)
        for copy in (1, 2):
            stop = self.num_noisy + len(noisy)
            self.source[self.num_noisy : stop] = noisy
            self.copy[self.num_noisy : stop] = copy
            self.num_noisy = stop
        self.num_clean = last


ROW_ARRAYS = ("clean", "start", "block", "answer", "source", "copy")


def draw_block(rng: random.Random) -> int:
    """A block length, 32 more often than not."""
    return rng.choices(BLOCK_LENGTHS, BLOCK_SHARES)[0]


def chat_documents(seed: int, tokenizer: Tokenizer) -> Iterator[Document]:
    """Conversations, padded with end-of-text to whole blocks; the last answer is learnt."""
    rng = random.Random(seed)
    fill, end = special_id(tokenizer, END_OF_TEXT), special_id(tokenizer, END_OF_TURN)
    tasks = training_conversations(seed)
    while True:
        batch = [next(tasks) for _ in range(256)]
        prompts = tokenizer.encode_batch_fast([chat_text(task) for task in batch])
        answers = tokenizer.encode_batch_fast([task.answer for task in batch])
        for prompt, answer in zip(prompts, answers, strict=True):
            document = chat_document(prompt.ids, [*answer.ids, end], draw_block(rng), fill)
            if len(document.ids) <= MAX_DOCUMENT and document.num_noisy <= 2 * MAX_NOISY_TOKENS:
                yield document


def chat_document(prompt: list[int], answer: list[int], block: int, fill: int) -> Document:
    """One conversation as a document."""
    length = len(prompt) + len(answer)
    padding = -length % block
    ids = np.array(prompt + answer + [fill] * padding, np.int16)
    return Document(ids, len(prompt), length + padding, block)


def text_documents(seed: int, first: int, folder: Path) -> Iterator[Document]:
    """Pieces of natural text from ``text.py``, from number ``first`` on, over and over.

    At most ``TEXT_NOISY_TOKENS`` in a row are noised, anywhere in the piece.
    """
    rng = random.Random(seed)
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    pieces = np.load(folder / "pieces.npy")
    index = first
    while True:
        offset, length = pieces[index % len(pieces)]
        index += 1
        block = draw_block(rng)
        blocks = int(length) // block
        if not blocks:
            continue
        noisy = min(blocks, TEXT_NOISY_TOKENS // block)
        start = rng.randint(0, blocks - noisy) if rng.random() < 0.8 else 0
        ids = np.array(tokens[offset : offset + blocks * block], np.int16)
        yield Document(ids, start * block, (start + noisy) * block, block)


def pack(
    documents: Iterator[Document], num_rows: int, fill_id: int
) -> dict[str, NDArray[np.generic]]:
    """Rows ``[num_rows, ...]`` of each array in ``ROW_ARRAYS``.

    A document goes to the first of a few open rows it fits in; the fullest row is closed when too
    many are open.
    """
    closed: list[Row] = []
    open_rows: list[Row] = []
    for document in documents:
        row = next((row for row in open_rows if row.fits(document)), None)
        if row is None:
            row = Row(fill_id)
            open_rows.append(row)
        row.add(document)
        if len(open_rows) > OPEN_ROWS:
            fullest = min(open_rows, key=lambda row: row.space)
            open_rows.remove(fullest)
            closed.append(fullest)
            if len(closed) == num_rows:
                break
    return {name: np.stack([getattr(row, name) for row in closed]) for name in ROW_ARRAYS}
