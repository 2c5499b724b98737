"""A small SDAR checkpoint as a model of any larger SDAR shape that computes the same function.

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
* Feed-forward units beyond the small model's, and whole surplus layers behind its own, are random
  and come in equal pairs, the second subtracted from the first.
* Surplus tokens have random rows. One dimension of the stream holds a small constant, which the
  last norm makes large and the head subtracts from their logits: they have no probability.
* What is left over, of the stream or of pairs without a partner, is random too and 2**-40 times as
  large as what it is added to: every sum is rounded to what it was.

Positions beyond those the small model knows, 2048 of ``sdar-tiny``, work but mean nothing.
In bfloat16 the small model's weights are kept bit for bit, or halved. Only those of norms are
rounded anew: of the stream's if it has dimensions left over, of the queries' if the head grows.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from focus_ray.benchmarks.expand_files import write_checkpoint
from focus_ray.benchmarks.expand_weights import Expansion, stream_share
from focus_ray.models.checkpoint import resolve_checkpoint
from focus_ray.models.decoder import HEAD_WEIGHT
from focus_ray.models.loading import LoadedModel, load_model
from focus_ray.models.sdar import SdarConfig, SdarForCausalLM
from focus_ray.models.spec import ModelSpec, read_spec

DEFAULT_SMALL = "sdar-tiny"
RANDOM_STD = 0.02

SDAR_8B = SdarConfig(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=32768,
    dtype="bfloat16",
)
SDAR_4B = SDAR_8B.model_copy(update={"hidden_size": 2560, "intermediate_size": 9728})
SDAR_1_7B = SDAR_8B.model_copy(
    update={
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    }
)
SHAPES = {"sdar-1.7b": SDAR_1_7B, "sdar-4b": SDAR_4B, "sdar-8b": SDAR_8B}

# A whole number of times the small model's, so that its heads are repeated evenly.
MULTIPLES = ("num_attention_heads", "num_key_value_heads")
AT_LEAST = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")


def expand(
    small: LoadedModel | str,
    shape: SdarConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> LoadedModel:
    """A model of ``shape`` that computes what ``small`` computes, made on ``device``.

    Args:
        small: an SDAR model, or the name of its checkpoint.
        shape: what to expand to. Its epsilon is replaced; its mask id, if absent, is SDAR's own
            where the vocabulary reaches it. Ids of the small vocabulary keep their meaning but for
            the mask's.
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
        raise ValueError(f"only SDAR models can be expanded, not {small.spec.architecture}")
    from_config = small.model.config
    assert isinstance(from_config, SdarConfig)
    _require_room(from_config, shape)
    mask_token_id = _mask_token_id(small.spec, shape)
    share = stream_share(from_config, shape)
    config = _complete(shape, small.spec, mask_token_id, dtype).model_copy(
        update={"rms_norm_eps": from_config.rms_norm_eps * share}
    )
    model = _uninitialised(config, device, dtype)
    expansion = Expansion(
        {name: weight.to(device, dtype) for name, weight in small.model.weight_map().items()},
        model.weight_map(),
        from_config,
        config,
        seed,
    )
    token_V = torch.arange(from_config.vocab_size, device=device)
    token_V[small.spec.mask_token_id] = mask_token_id
    expansion.fill_ends(token_V)
    for index in range(config.num_hidden_layers):
        if index < from_config.num_hidden_layers:
            expansion.fill_layer(index)
        else:
            expansion.fill_surplus_layer(index)
    return LoadedModel(model, _spec(small.spec, config, mask_token_id), small.path, dtype)


def random_model(
    shape: SdarConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    like: str = DEFAULT_SMALL,
) -> LoadedModel:
    """A model of ``shape`` with plain random weights, as other engines are measured with.

    Args:
        shape: its mask id, if absent, is SDAR's own where the vocabulary reaches it.
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
    mask_token_id = _mask_token_id(spec, shape)
    config = _complete(shape, spec, mask_token_id, dtype)
    model = _uninitialised(config, device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for weight in model.weight_map().values():
        if weight.ndim == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, RANDOM_STD, generator=generator)
    return LoadedModel(model, _spec(spec, config, mask_token_id), path, dtype)


def _require_room(small: SdarConfig, shape: SdarConfig) -> None:
    for name in (*AT_LEAST, *MULTIPLES):
        have, need = getattr(shape, name), getattr(small, name)
        if have < need or (name in MULTIPLES and have % need):
            rule = "a multiple of" if name in MULTIPLES else "at least"
            raise ValueError(f"{name} {have} must be {rule} the small model's {need}")
    if shape.tie_word_embeddings:
        raise ValueError("tie_word_embeddings must not be set: surplus tokens need a head")


def _mask_token_id(small: ModelSpec, shape: SdarConfig) -> int:
    """The mask id of the larger model: given, or SDAR's, or for small vocabularies unchanged."""
    usual = SdarConfig.default_mask_token_id
    given = shape.mask_token_id
    if given is None:
        return usual if usual < shape.vocab_size else small.mask_token_id
    if given >= shape.vocab_size:
        raise ValueError(f"mask_token_id {given} is outside the vocabulary of {shape.vocab_size}")
    if given < small.vocab_size and given != small.mask_token_id:
        raise ValueError(
            f"mask_token_id {given} is another token of the small model; take its own, "
            f"{small.mask_token_id}, or one from {small.vocab_size} on"
        )
    return given


def _complete(
    shape: SdarConfig, small: ModelSpec, mask_token_id: int, dtype: torch.dtype
) -> SdarConfig:
    return shape.model_copy(
        update={
            "mask_token_id": mask_token_id,
            "block_size": small.block_length,
            "dtype": str(dtype).removeprefix("torch."),
            "tie_word_embeddings": False,
        }
    )


def _uninitialised(
    config: SdarConfig, device: torch.device | str, dtype: torch.dtype
) -> SdarForCausalLM:
    with torch.device(device):
        return SdarForCausalLM.build(config, [HEAD_WEIGHT], dtype).eval()


def _spec(small: ModelSpec, config: SdarConfig, mask_token_id: int) -> ModelSpec:
    return replace(
        small,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        mask_token_id=mask_token_id,
        dtype=getattr(torch, config.dtype),
    )


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
