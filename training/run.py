"""Train and evaluate sdar-tiny in one command.

    python training/run.py --minutes 20 --out DIR            # on one GPU, from nothing to a model
    python training/run.py --minutes 1 --out DIR --toy       # the same on a CPU, at toy size

A run may be spread over commands on one machine, each with its own limit; the first promises what
the later ones will add, so that the schedule is known:

    python training/run.py --minutes 9.2 --later-minutes 6.5 --out DIR
    python training/run.py --minutes 9.2 --resume --out DIR

Exit status 3: a self-check failed or the loss did not fall.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()

import argparse  # noqa: E402  (the clock starts before torch is imported)
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import paths  # noqa: E402
import torch  # noqa: E402
from checkpoint import save_configs  # noqa: E402
from evaluate import evaluate  # noqa: E402
from model import ModelShape  # noqa: E402
from shards import ShardPool  # noqa: E402
from train import Settings, Trainer, TrainingFailed  # noqa: E402

TEXT_PERCENT = 25
EVALUATION_S = 80.0
TOY_SHAPE = ModelShape(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=16,
    intermediate_size=128,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint goes")
    parser.add_argument("--minutes", type=float, default=20.0, help="limit of this command")
    parser.add_argument(
        "--later-minutes", type=float, default=0.0, help="training of later commands"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the state in --work")
    parser.add_argument(
        "--weights", type=Path, help="with --resume: checkpoint to use without a state"
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/sdar-tiny-training"))
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 3))
    parser.add_argument("--max-text-chars", type=int, default=300_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="toy size on the CPU")
    return parser.parse_args()


def start_text(args: argparse.Namespace) -> subprocess.Popen[bytes] | None:
    """Build the natural text beside the training, unless an earlier command did."""
    folder = args.work / "text"
    if (folder / "done").exists():
        return None
    script = Path(__file__).with_name("text.py")
    command = [sys.executable, str(script), "--out", str(folder)]
    command += ["--max-chars", str(args.max_text_chars), "--processes", str(args.workers)]
    return subprocess.Popen(command)


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    shape = TOY_SHAPE if args.toy else ModelShape()
    device = torch.device("cpu" if args.toy else "cuda")
    torch.manual_seed(args.seed + 1000 * args.resume)
    torch.set_float32_matmul_precision("high")

    last = args.later_minutes == 0
    evaluation_s = 0.0 if not last else 10.0 if args.toy else EVALUATION_S
    settings = Settings(
        out=args.out,
        work=args.work,
        stop_at=STARTED + args.minutes * 60 - evaluation_s - (1 if args.toy else 8),
        later_s=args.later_minutes * 60,
        causal_rows=4 if args.toy else 32,
        diffusion_rows=4 if args.toy else 20,
        dense=args.toy,
    )
    text = start_text(args)
    pool = ShardPool(
        args.work / "shards",
        paths.MODEL_DIR / "tokenizer.json",
        args.work / "text",
        TEXT_PERCENT,
        args.workers,
        seed=args.seed + 1000 * args.resume,
        device=device,
        shard_rows=4 if args.toy else 64,
    )
    trainer = Trainer(shape, settings, device)
    try:
        if args.resume:
            trainer.resume(args.weights)
        trainer.run(pool)
    except TrainingFailed as failure:
        print(f"stopped: {failure}", flush=True)
        sys.exit(3)
    finally:
        pool.close()
        if text is not None:
            text.terminate()
            text.wait()
    save_configs(shape, args.work / "config")
    print(f"trained after {time.monotonic() - STARTED:.0f} s", flush=True)
    if last:
        deadline = STARTED + args.minutes * 60 - 4
        evaluate(trainer.model, args.out / "evaluation.json", deadline, toy=args.toy)
    print(f"done after {time.monotonic() - STARTED:.0f} s", flush=True)


if __name__ == "__main__":
    main()
