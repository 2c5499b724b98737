"""Measure a trained model: exact match, tokens per step, and whether FOCUS's signal is there.

    python training/evaluate.py --model DIR --out evaluation.json

``benchmarks/quality.py`` measures the same through the engine; this one needs nothing but torch.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import paths
import torch
from chat import chat_text
from checkpoint import load_weights
from generation import Completion, Generator, Step
from model import ModelShape, Sdar
from numpy.typing import NDArray
from tokenizers import Tokenizer

from focus_ray.tasks import Task, evaluation_set

THRESHOLDS = (0.9, 0.8)
BATCH_PROMPTS = 256
SAMPLES_KEPT = 60


def area_under_curve(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """Chance that a positive scores above a negative; ties count half."""
    high, low = scores[positive][:, None], scores[~positive][None]
    return float((high > low).mean() + 0.5 * (high == low).mean())


def step_statistics(steps: list[Step]) -> dict[str, float]:
    """Tokens per step, where they are decoded, and AUC of delta and of leftness."""
    chosen = [step for step in steps if not step.decoded.all()]
    if not chosen:
        return {"num_steps": len(steps)}
    leftness = [-np.arange(len(step.decoded), dtype=np.float32) for step in chosen]
    ranks = np.concatenate([np.flatnonzero(step.decoded) for step in steps])
    return {
        "num_steps": len(steps),
        "tokens_per_step": float(np.mean([step.decoded.sum() for step in steps])),
        "leftmost_decoded": float(np.mean([step.decoded[0] for step in steps])),
        "decoded_in_first_4": float((ranks < 4).mean()),
        "decoded_in_first_8": float((ranks < 8).mean()),
        "auc_delta": float(np.mean([area_under_curve(s.delta, s.decoded) for s in chosen])),
        "auc_leftness": float(
            np.mean([area_under_curve(x, s.decoded) for x, s in zip(leftness, chosen, strict=True)])
        ),
    }


def generate_all(
    generator: Generator, tasks: list[Task], tokenizer: Tokenizer, deadline: float
) -> list[Completion]:
    """Completions in the order of ``tasks``; prompts of similar length share a batch."""
    prompts = [tokenizer.encode(chat_text(task)).ids for task in tasks]
    # long answers last, so that a deadline cuts them and not everything
    order = sorted(
        range(len(tasks)), key=lambda i: (tasks[i].name == "long_answer", len(prompts[i]))
    )
    done: dict[int, Completion] = {}
    for first in range(0, len(order), BATCH_PROMPTS):
        batch = order[first : first + BATCH_PROMPTS]
        outputs = generator([prompts[i] for i in batch], deadline)
        done |= dict(zip(batch, outputs, strict=True))
    return [done[i] for i in range(len(tasks))]


def measure(
    model: Sdar,
    tasks: list[Task],
    tokenizer: Tokenizer,
    threshold: float,
    deadline: float,
    max_new: int,
) -> dict[str, Any]:
    """All numbers at one threshold."""
    start = time.monotonic()
    block = model.shape.block_size
    completions = generate_all(
        Generator(model, block, threshold, max_new), tasks, tokenizer, deadline
    )
    texts = [tokenizer.decode(completion.ids) for completion in completions]
    right: dict[str, list[bool]] = {}
    for task, text in zip(tasks, texts, strict=True):
        right.setdefault(task.name, []).append(task.is_right(text))
    every = [step for completion in completions for step in completion.steps]
    full = [step for completion in completions for step in completion.full_block_steps(block)]
    samples = [
        {"task": task.name, "user": task.user, "answer": text, "right": task.is_right(text)}
        for task, text in zip(tasks, texts, strict=True)
    ]
    samples.sort(key=lambda sample: bool(sample["right"]))
    return {
        "threshold": threshold,
        "exact_match": {name: round(float(np.mean(hits)), 4) for name, hits in right.items()},
        "num_problems": {name: len(hits) for name, hits in right.items()},
        "unfinished": sum(not completion.finished for completion in completions),
        "all_blocks": step_statistics(every),
        "full_blocks": step_statistics(full),
        "seconds": round(time.monotonic() - start, 1),
        "samples": samples[:SAMPLES_KEPT],
    }


def evaluate(model: Sdar, out: Path, deadline: float, toy: bool = False) -> None:
    """Measure at both thresholds, print the numbers and write them with some samples.

    Args:
        deadline: ``time.monotonic()`` after which sequences are left unfinished.
        toy: a handful of problems.
    """
    tokenizer = Tokenizer.from_file(str(paths.MODEL_DIR / "tokenizer.json"))
    tasks = evaluation_set(4, 1) if toy else evaluation_set()
    model.eval()
    results = []
    for number, threshold in enumerate(THRESHOLDS[:1] if toy else THRESHOLDS):
        share = (deadline - time.monotonic()) / (len(THRESHOLDS) - number)
        result = measure(
            model, tasks, tokenizer, threshold, time.monotonic() + share, 64 if toy else 1024
        )
        results.append(result)
        shown = {key: value for key, value in result.items() if key != "samples"}
        print(json.dumps(shown), flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=paths.MODEL_DIR)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Sdar(ModelShape()).to(device)
    load_weights(model, args.model)
    evaluate(model, args.out, time.monotonic() + args.seconds)


if __name__ == "__main__":
    main()
