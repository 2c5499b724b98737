"""The training loop: next tokens first, then block diffusion, under a wall clock.

A run can be spread over several commands on one machine. Progress is a share of time: what was
trained, over that plus what is left in this command plus what later commands are promised to add.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention import KeyRanges, compiled_flex_layer, dense_attention, key_tiles
from checkpoint import load_weights, save_weights
from model import ModelShape, Sdar, layer_forward, rotary_tables
from objectives import Problem, compiled_head_loss, head_loss, masked_blocks, next_tokens
from optim import Optimizer
from shards import Batch, ShardPool
from torch import Tensor

CAUSAL_SHARE = 0.35
"""Share of the training time spent on next tokens."""
DECAY_SHARE = 0.6
"""Last share of the diffusion phase in which the learning rate falls to zero."""
WARM_STEPS = 100
CHECK_STEPS = 60
"""Steps before the check: attention has no effect through a fresh model's zero output matrices."""
SAVE_EVERY_S = 100.0
REPORT_EVERY = 100
LOSS_LIMIT = (300, 5.5)
"""After so many steps the loss must be below this, or the run is stopped as broken."""


class TrainingFailed(RuntimeError):
    """The run is broken and more device time would be wasted."""


@dataclass(frozen=True)
class Settings:
    """One command's part of a run.

    Args:
        out: where weights and the log of numbers go.
        work: folder of this machine that later commands find again.
        stop_at: ``time.monotonic()`` at which training stops.
        later_s: training seconds that later commands will add; 0 for the last one.
        causal_rows, diffusion_rows: rows per step in the two phases.
        dense: the definition of attention instead of flex, for CPUs.
    """

    out: Path
    work: Path
    stop_at: float
    later_s: float
    causal_rows: int = 32
    diffusion_rows: int = 20
    dense: bool = False


@dataclass
class Progress:
    """How far a run is; saved with its state."""

    num_steps: int = 0
    diffusion_steps: int = 0
    trained_s: float = 0.0
    tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """One model, its optimizer and where it is in the schedule."""

    def __init__(self, shape: ModelShape, settings: Settings, device: torch.device) -> None:
        self.model = Sdar(shape).to(device)
        self.optimizer = Optimizer(self.model)
        self.progress = Progress()
        self.settings, self.device = settings, device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.cos, self.sin = rotary_tables(shape, device)
        self._saved_at = time.monotonic()

    # -- schedule -----------------------------------------------------------------------------

    def share_done(self) -> float:
        """Trained time over the whole run's, 0 to 1."""
        left = max(0.0, self.settings.stop_at - time.monotonic()) + self.settings.later_s
        return self.progress.trained_s / (self.progress.trained_s + left + 1e-9)

    def rate(self, share: float) -> float:
        """Multiplier of the learning rates."""
        warm = min(1.0, (self.progress.num_steps + 1) / WARM_STEPS)
        if share < CAUSAL_SHARE:
            return warm
        within = (share - CAUSAL_SHARE) / (1 - CAUSAL_SHARE)
        again = min(1.0, 0.3 + 0.7 * self.progress.diffusion_steps / WARM_STEPS)
        return warm * again * min(1.0, max(0.0, 1 - within) / DECAY_SHARE)

    # -- one step -----------------------------------------------------------------------------

    def problem(self, batch: Batch, diffusion: bool) -> Problem:
        shape = self.model.shape
        if diffusion:
            return masked_blocks(batch, shape.mask_token_id)
        return next_tokens(batch, shape.eos_token_id)

    def loss(self, problem: Problem, dense: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted loss, plain loss, accuracy."""
        model, shape = self.model, self.model.shape
        cos, sin = self.cos[problem.positions], self.sin[problem.positions]
        if dense:
            attend = dense_attention(problem.ranges)

            def run_layer(
                index: int, x: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor
            ) -> Tensor:
                return layer_forward(
                    x, cos, sin, attend, shape.head_dim, shape.rms_norm_eps, *weights
                )
        else:
            bounds = (*problem.ranges, *key_tiles(problem.ranges))
            flex_layer = compiled_flex_layer()

            def run_layer(
                index: int, x: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor
            ) -> Tensor:
                return flex_layer(x, cos, sin, bounds, shape.head_dim, shape.rms_norm_eps, *weights)

        hidden = model.hidden(problem.ids, cos, sin, run_layer, self.dtype)
        hidden = hidden[:, : problem.targets.shape[1]].contiguous()
        compute = head_loss if dense else compiled_head_loss()
        return compute(
            hidden, model.lm_head.weight, problem.targets, problem.weights, problem.counted
        )

    def step(self, pool: ShardPool, diffusion: bool, rate: float) -> Tensor:
        """One update; returns loss, plain loss and accuracy as one tensor on the device."""
        settings = self.settings
        rows = settings.diffusion_rows if diffusion else settings.causal_rows
        batch = pool.batch(rows)
        loss, plain, accuracy = self.loss(self.problem(batch, diffusion), settings.dense)
        loss.backward()
        self.optimizer.step(rate, self.progress.num_steps)
        self.progress.num_steps += 1
        self.progress.diffusion_steps += diffusion
        self.progress.tokens += batch["clean"].numel()
        return torch.stack([loss.detach(), plain, accuracy])

    # -- checks -------------------------------------------------------------------------------

    def check_attention(self, pool: ShardPool) -> None:
        """Compare flex with dense attention on one row, loss and gradient, for the phases to come.

        It also compiles both phases before time is spent on the first.

        Raises:
            TrainingFailed: they differ by more than bfloat16 explains.
        """
        for diffusion in (False, True) if self.share_done() < CAUSAL_SHARE else (True,):
            rows = self.settings.diffusion_rows if diffusion else self.settings.causal_rows
            problem = self.problem(pool.batch(rows), diffusion)
            only_first = problem.weights.clone()
            only_first[1:] = 0
            problem = problem._replace(weights=only_first)
            flex_loss, flex_grads = self._loss_and_gradients(problem, dense=False)
            first_row = Problem(
                ids=problem.ids[:1],
                positions=problem.positions[:1],
                ranges=KeyRanges(*(bound[:1] for bound in problem.ranges)),
                targets=problem.targets[:1],
                weights=problem.weights[:1],
                counted=problem.counted[:1],
            )
            dense_loss, dense_grads = self._loss_and_gradients(first_row, dense=True)
            apart = abs(flex_loss - dense_loss) / dense_loss
            cosine = min(
                F.cosine_similarity(a.flatten().float(), b.flatten().float(), dim=0).item()
                for a, b in zip(flex_grads, dense_grads, strict=True)
            )
            name = "masked blocks" if diffusion else "next tokens"
            print(
                f"check, {name}: flex loss {flex_loss:.5f}, dense {dense_loss:.5f}, "
                f"worst gradient cosine {cosine:.4f}",
                flush=True,
            )
            if not (apart < 0.01 and cosine > 0.9):
                raise TrainingFailed(f"flex attention differs from its definition on {name}")

    def _loss_and_gradients(self, problem: Problem, dense: bool) -> tuple[float, list[Tensor]]:
        loss, _, _ = self.loss(problem, dense)
        loss.backward()
        layers = [self.model.model.layers[0], self.model.model.layers[-1]]
        gradients = [
            parameter.grad.clone()
            for layer in layers
            for name, parameter in layer.named_parameters()
            if parameter.grad is not None and name.endswith(("q_proj.weight", "v_proj.weight"))
        ]
        self.model.zero_grad(set_to_none=True)
        return loss.item(), gradients

    # -- the loop -----------------------------------------------------------------------------

    def run(self, pool: ShardPool) -> None:
        """Train until ``stop_at``; weights and state are saved on the way and at the end.

        Raises:
            TrainingFailed: a check failed, or the loss is not finite or does not fall.
        """
        for _ in range(CHECK_STEPS if not self.settings.dense else 1):
            share = self.share_done()
            self.step(pool, diffusion=share >= CAUSAL_SHARE, rate=self.rate(share))
        if not self.settings.dense:
            self.check_attention(pool)
        window: list[Tensor] = []
        last = time.monotonic()
        report_time, report_tokens = last, self.progress.tokens
        while time.monotonic() < self.settings.stop_at:
            share = self.share_done()
            rate = self.rate(share)
            window.append(self.step(pool, share >= CAUSAL_SHARE, rate))
            if self.progress.num_steps % 10 == 0 and self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.monotonic()
            self.progress.trained_s += now - last
            last = now
            if self.progress.num_steps % REPORT_EVERY == 0 or self.settings.dense:
                speed = (self.progress.tokens - report_tokens) / (now - report_time)
                self._report(window, share, rate, speed, pool)
                window.clear()
                report_time, report_tokens = now, self.progress.tokens
            if now - self._saved_at > SAVE_EVERY_S:
                self.save()
        self.save()

    def _report(
        self, window: list[Tensor], share: float, rate: float, speed: float, pool: ShardPool
    ) -> None:
        loss, plain, accuracy = torch.stack(window).mean(0).tolist()
        progress = self.progress
        entry = {
            "step": progress.num_steps,
            "share": round(share, 4),
            "loss": round(loss, 4),
            "plain_loss": round(plain, 4),
            "accuracy": round(accuracy, 4),
            "rate": round(rate, 4),
            "clean_tokens_per_s": round(speed),
        }
        progress.history.append(entry)
        waiting = len(pool.fresh)
        print(
            f"[{progress.trained_s:6.1f} s] {entry} waiting groups {waiting} repeated rows "
            f"{pool.rows_repeated}",
            flush=True,
        )
        limit_steps, limit = LOSS_LIMIT
        if not math.isfinite(loss) or (progress.num_steps >= limit_steps and plain > limit):
            raise TrainingFailed(f"loss {loss:.3f} after {progress.num_steps} steps")

    # -- saving -------------------------------------------------------------------------------

    def save(self) -> None:
        """Weights and numbers to ``out``, everything needed to go on to ``work``."""
        settings = self.settings
        save_weights(self.model, settings.out)
        (settings.out / "progress.json").write_text(json.dumps(asdict(self.progress)) + "\n")
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        unfinished = settings.work / "state.unfinished"
        torch.save(state, unfinished)
        unfinished.replace(settings.work / "state.pt")
        self._saved_at = time.monotonic()

    def resume(self, weights: Path | None) -> None:
        """Go on from the state in ``work``; without one, from saved weights with fresh momenta.

        Raises:
            FileNotFoundError: neither exists.
        """
        state_file = self.settings.work / "state.pt"
        if state_file.exists():
            state: dict[str, Any] = torch.load(state_file, map_location=self.device)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress = Progress(**state["progress"])
        elif weights is not None:
            load_weights(self.model, weights)
            saved = json.loads((weights / "progress.json").read_text())
            self.progress = Progress(**saved)
        else:
            raise FileNotFoundError(
                f"{state_file} does not exist; name saved weights with --weights"
            )
        print(
            f"resumed at step {self.progress.num_steps}, {self.progress.trained_s:.0f} s trained",
            flush=True,
        )
