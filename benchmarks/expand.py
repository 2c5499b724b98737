"""A small SDAR checkpoint as a larger model of any family that computes the same function.

    python benchmarks/expand.py --shape sdar-8b --output DIR      # for other engines too

Published weights are large and not always at hand, and random ones decode nothing: how many tokens
a step decodes, how sure the model is and what eviction leaves out would mean nothing. Expanded,
``sdar-tiny`` has the answers, confidences and eviction decisions of a trained model at the cost of
a large one.

How it works. A number of the small model stands in several places of the larger one, equal bit for
bit. One of the places is read by the small model's weight (or two by half of it), the others by
pairs of opposite random weights, which cancel. Nothing is zero, neither weights nor activations.

* The stream holds as many whole copies of the small one as fit, shuffled. Its mean square is then
  that of the small one times a share, for which the norms' weights and their epsilon make up.
  (The norms of queries and keys see that epsilon too, where it is next to nothing.)
* Query and KV heads are repeated evenly. All importances grow by one factor, and so do their
  deltas: eviction decides the same. Exactly so where the factor is a power of two, which rounding
  of importances to bfloat16 leaves alone.
* A rotary pair stands where the larger head has its frequency. Heads are filled up with repeated
  dimensions, so that the norms over them stay; of these, queries are made inaudibly small.
* Dimensions of a head that do not turn repeat others, as every place that is not read.
* Feed-forward units beyond the small model's, and whole surplus layers behind its own, are random
  and come in equal pairs, the second subtracted from the first.
* Of a mixture, shared experts carry as many units as they hold, and each of the others all that are
  left. Whichever a token goes through add the same, in the end once: the weights of SDAR-MoE are
  equal, their logits being tiny; those of LLaDA2 add up to its scaling, which becomes a power of
  two, and the experts are divided by it. Gates are random, over inputs made white
  (``expand_routing.py``), so that the load is spread as it is in a trained model.
* Surplus tokens have random rows. One dimension of the stream holds a small constant, which the
  last norm makes large and the head subtracts from their logits: they have no probability.
* What is left over, of the stream or of pairs without a partner, is random too and 2**-40 times as
  large as what it is added to: every sum is rounded to what it was.

Positions beyond those the small model knows, 2048 of ``sdar-tiny``, work but mean nothing.
In bfloat16 the small model's weights are kept bit for bit, or halved. Only those of norms are
rounded anew: of the stream's if it has dimensions left over, of the queries' if the head grows.
Activations are rounded where the small model rounds, and in a mixture twice more: what experts add
in sum, and what shared ones do. In float32 all that differs is the order of sums.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from focus_ray.benchmarks.expand_files import write_checkpoint
from focus_ray.benchmarks.expand_fit import complete, fit, mask_token_id_of, spec_of
from focus_ray.benchmarks.expand_routing import whitening_of
from focus_ray.benchmarks.expand_weights import Expansion, layers_of
from focus_ray.models.checkpoint import resolve_checkpoint
from focus_ray.models.decoder import HEAD_WEIGHT, DecoderConfig, DecoderForCausalLM
from focus_ray.models.loading import LoadedModel, load_model
from focus_ray.models.moe import SparseMLP
from focus_ray.models.sdar import SdarConfig, SdarForCausalLM
from focus_ray.models.shapes import SHAPES, family_of
from focus_ray.models.spec import read_spec

DEFAULT_SMALL = "sdar-tiny"
RANDOM_STD = 0.02


def expand(
    small: LoadedModel | str,
    shape: DecoderConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> LoadedModel:
    """A model of ``shape`` that computes what ``small`` computes, made on ``device``.

    Args:
        small: a dense SDAR model, or the name of its checkpoint.
        shape: what to expand to. Its epsilon is replaced, and so are rotary base and scaling of
            LLaDA2; its mask id, if absent, is its family's where the vocabulary reaches it. Ids of
            the small vocabulary keep their meaning but for the mask's.
        dtype: of the weights; float32 or bfloat16.
        seed: of everything random; the same on the same kind of device gives the same model.

    Returns:
        The model with the small one's folder, whose tokenizer fits it.

    Raises:
        ValueError: ``shape`` cannot hold the small model; says which field.
        CheckpointError: the small checkpoint cannot be loaded.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype {dtype} has too small a range; take float32 or bfloat16")
    if isinstance(small, str):
        small = load_model(small, device=device)
    if not isinstance(small.model, SdarForCausalLM):
        raise ValueError(f"only dense SDAR models can be expanded, not {small.spec.architecture}")
    from_config = small.model.config
    assert isinstance(from_config, SdarConfig)
    mask_token_id = mask_token_id_of(small.spec, shape)
    config = complete(fit(shape, from_config), small.spec, mask_token_id, dtype)
    model = _uninitialised(config, device, dtype)
    has_experts = any(isinstance(layer.mlp, SparseMLP) for layer in layers_of(model))
    whitening = whitening_of(small, seed) if has_experts else []
    token_V = torch.arange(from_config.vocab_size, device=device)
    token_V[small.spec.mask_token_id] = mask_token_id
    Expansion(small.model, model, whitening, seed).fill(token_V)
    return LoadedModel(model, spec_of(small.spec, config), small.path, dtype)


def random_model(
    shape: DecoderConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    like: str = DEFAULT_SMALL,
) -> LoadedModel:
    """A model of ``shape`` with plain random weights, as other engines are measured with.

    Args:
        shape: its mask id, if absent, is its family's where the vocabulary reaches it.
        device: where it is made.
        dtype: of the weights.
        seed: of the weights.
        like: checkpoint whose tokenizer, block length and stop ids it gets.

    Raises:
        ValueError: the vocabulary is smaller than that of ``like``.
        CheckpointError: ``like`` cannot be read.
    """
    path = resolve_checkpoint(like)
    spec = read_spec(path, name=like)
    if shape.vocab_size < spec.vocab_size:
        raise ValueError(f"vocab_size {shape.vocab_size} is below the {spec.vocab_size} of {like}")
    config = complete(shape, spec, mask_token_id_of(spec, shape), dtype)
    model = _uninitialised(config, device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in model.weight_map().items():
        if name.endswith(".expert_bias"):
            weight.zero_()
        elif weight.ndim == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, RANDOM_STD, generator=generator)
    return LoadedModel(model, spec_of(spec, config), path, dtype)


def _uninitialised(
    config: DecoderConfig, device: torch.device | str, dtype: torch.dtype
) -> DecoderForCausalLM:
    _, model_cls = family_of(config)
    with torch.device(device):
        return model_cls.build(config, [HEAD_WEIGHT], dtype).eval()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Expand a small SDAR checkpoint to a larger shape."
    )
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write; must not exist"
    )
    parser.add_argument("--small", default=DEFAULT_SMALL, help="checkpoint to expand")
    parser.add_argument(
        "--random-weights", action="store_true", help="compute nothing in particular"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.output.exists():
        raise SystemExit(f"{args.output} exists already; name a new folder")
    shape, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
    start = time.perf_counter()
    if args.random_weights:
        loaded = random_model(
            shape, device=args.device, dtype=dtype, seed=args.seed, like=args.small
        )
    else:
        loaded = expand(args.small, shape, device=args.device, dtype=dtype, seed=args.seed)
    made = time.perf_counter()
    num_bytes = write_checkpoint(loaded, args.output)
    print(
        f"{args.output}: {num_bytes / 1e9:.1f} GB, made in {made - start:.1f} s, "
        f"written in {time.perf_counter() - made:.1f} s"
    )


if __name__ == "__main__":
    main()
