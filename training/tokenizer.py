"""Train the tokenizer of sdar-tiny: a byte-level BPE of 4096 tokens, digits one by one.

    python training/tokenizer.py --out models/bundled/sdar-tiny

Learnt from chat tasks and from the Python sources of the machine it runs on. The result is
committed, so that a new training run keeps the ids; run this only to make another model.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import paths  # noqa: F401  (puts the repository on sys.path)
from chat import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    END_OF_TURN,
    MASK,
    SPECIAL_TOKENS,
    START_OF_TURN,
    chat_text,
)
from text import source_files, source_text
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from focus_ray.tasks import training_conversations
from focus_ray.tasks.vocabulary import WORDS

VOCAB_SIZE = 4096
CONTEXT = 2048
SEED = 123
NUM_CONVERSATIONS = 40_000
MAX_SOURCE_CHARS = 12_000_000

# Words with the blank before them, digits alone (with their blank), runs of other signs, line ends.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def corpus() -> Iterator[str]:
    """Chat first, then code, then every word of the tasks often enough to become a token."""
    for task in islice(training_conversations(SEED), NUM_CONVERSATIONS):
        text = chat_text(task) + task.answer
        for token in SPECIAL_TOKENS:
            text = text.replace(token, "")
        yield text
    files = [path for path, _ in source_files()]
    random.Random(SEED).shuffle(files)
    chars = 0
    for path in files:
        text = source_text(path)
        if text is not None:
            chars += len(text)
            yield text
        if chars > MAX_SOURCE_CHARS:
            break
    for word in WORDS:
        yield f" {word}" * 40


def train() -> Tokenizer:
    """The tokenizer, special tokens at the end of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=3,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"vocabulary has {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """What transformers' AutoTokenizer reads beside ``tokenizer.json``."""
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL_TOKENS
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "mask_token": MASK,
        "unk_token": None,
        "additional_special_tokens": [START_OF_TURN, END_OF_TURN],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "added_tokens_decoder": added,
        "chat_template": CHAT_TEMPLATE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train()
    tokenizer.save(str(out / "tokenizer.json"))
    config = json.dumps(tokenizer_config(tokenizer), indent=2)
    (out / "tokenizer_config.json").write_text(config + "\n")
    print(f"{out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
