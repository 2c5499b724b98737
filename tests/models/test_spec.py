from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from focus_ray.errors import CheckpointError
from focus_ray.models.spec import ModelSpec, SamplingDefaults, read_spec

WriteCheckpoint = Callable[..., Path]

GENERATION = "generation_config.json"


def test_facts_of_the_golden_checkpoint(golden_sdar: Path) -> None:
    assert read_spec(golden_sdar) == ModelSpec(
        architecture="SDARForCausalLM",
        vocab_size=512,
        num_layers=4,
        num_kv_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        mask_token_id=509,
        block_length=4,
        stop_token_ids=(1,),
        sampling=SamplingDefaults(temperature=0.0, top_p=1.0, top_k=0),
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize(
    ("explicit", "block_size", "name", "expected"),
    [
        pytest.param(8, 16, "SDAR-8B-Chat-b32", 8, id="an argument first"),
        pytest.param(None, 16, "SDAR-8B-Chat-b16", 16, id="then the config"),
        pytest.param(None, None, "SDAR-8B-Chat-b32", 32, id="then the name"),
        pytest.param(None, None, "sdar_B64_sft", 64, id="the name, spelled otherwise"),
        pytest.param(None, None, "SDAR-30B-A3B-Chat", 4, id="then 4; 30B is no block length"),
        pytest.param(None, None, "b32x-lab16", 4, id="a number inside a word"),
    ],
)
def test_block_length_order(
    explicit: int | None,
    block_size: int | None,
    name: str,
    expected: int,
    write_checkpoint: WriteCheckpoint,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = write_checkpoint(name, config={"block_size": block_size})
    assert read_spec(folder, block_length=explicit).block_length == expected
    assert caplog.records == []


def test_the_asked_name_is_searched_rather_than_the_folder(
    write_checkpoint: WriteCheckpoint,
) -> None:
    folder = write_checkpoint("0a1b2c", config={"block_size": None})
    assert read_spec(folder, name="JetLM/SDAR-8B-Chat-b16").block_length == 16


def test_a_name_that_contradicts_the_config_is_logged(
    write_checkpoint: WriteCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint("SDAR-8B-Chat-b32", config={"block_size": 4})
    with caplog.at_level(logging.WARNING):
        assert read_spec(folder).block_length == 4
    assert "block_size 4" in caplog.text
    assert "32" in caplog.text


def test_a_block_of_nothing_is_refused(golden_sdar: Path) -> None:
    with pytest.raises(CheckpointError, match="block_length must be at least 1, got 0"):
        read_spec(golden_sdar, block_length=0)


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        pytest.param(
            {"mask_token_id": 7},
            {"added_tokens.json": {"<|MASK|>": 8}},
            7,
            id="the config first",
        ),
        pytest.param(
            {},
            {
                "tokenizer_config.json": {"mask_token": "<hole>"},
                "added_tokens.json": {"<hole>": 9, "<|MASK|>": 8},
            },
            9,
            id="then the tokenizer's own mask",
        ),
        pytest.param(
            {},
            {
                "tokenizer_config.json": {"mask_token": {"content": "<|MASK|>"}},
                "added_tokens.json": {"<MASK>": 8},
            },
            8,
            id="one mask in two spellings, as SDAR publishes it",
        ),
        pytest.param(
            {},
            {"tokenizer.json": {"added_tokens": [{"id": 6, "content": "<|mask|>"}]}},
            6,
            id="a mask the tokenizer does not name as such",
        ),
        pytest.param(
            {},
            {"tokenizer_config.json": {"added_tokens_decoder": {"5": {"content": "<MASK>"}}}},
            5,
            id="listed in the tokenizer's config",
        ),
        pytest.param({"vocab_size": 151936}, {}, 151669, id="then the family's"),
    ],
)
def test_mask_token_order(
    config: dict[str, object],
    files: dict[str, object],
    expected: int,
    write_checkpoint: WriteCheckpoint,
) -> None:
    folder = write_checkpoint(config={"mask_token_id": None, **config}, files=files)
    assert read_spec(folder).mask_token_id == expected


@pytest.mark.parametrize(
    ("mask_token_id", "message"),
    [
        pytest.param(
            None, r"151669 \(the default of its architecture\) is outside", id="none known"
        ),
        pytest.param(512, r"512 \(config.json\) is outside the vocabulary of 512", id="too large"),
        pytest.param(-1, r"-1 \(config.json\) is outside", id="negative"),
    ],
)
def test_a_mask_outside_the_vocabulary_is_refused(
    mask_token_id: int | None, message: str, write_checkpoint: WriteCheckpoint
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_spec(write_checkpoint(config={"mask_token_id": mask_token_id}))


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        pytest.param({"eos_token_id": 3}, {}, (3,), id="config alone"),
        pytest.param({"eos_token_id": [3, 4, 3]}, {}, (3, 4), id="a list, each once"),
        pytest.param({}, {GENERATION: {"eos_token_id": [5, 1]}}, (5, 1), id="generation config"),
        pytest.param({}, {GENERATION: {"eos_token_id": 5}}, (5,), id="one id there"),
        pytest.param({}, {GENERATION: {"temperature": 1.0}}, (1,), id="none there"),
        pytest.param({"eos_token_id": None}, {}, (), id="none anywhere"),
    ],
)
def test_stop_token_ids(
    config: dict[str, object],
    files: dict[str, object],
    expected: tuple[int, ...],
    write_checkpoint: WriteCheckpoint,
) -> None:
    assert read_spec(write_checkpoint(config=config, files=files)).stop_token_ids == expected


@pytest.mark.parametrize("eos", ["</s>", 512, True, [1, -1]], ids=str)
def test_a_stop_token_outside_the_vocabulary_is_refused(
    eos: object, write_checkpoint: WriteCheckpoint
) -> None:
    with pytest.raises(CheckpointError, match="eos_token_id"):
        read_spec(write_checkpoint(config={"eos_token_id": eos}))


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        pytest.param(None, SamplingDefaults(), id="no file: greedy"),
        pytest.param({"do_sample": False, "temperature": 0.6}, SamplingDefaults(), id="greedy"),
        pytest.param(
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
            SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95),
            id="what SDAR publishes",
        ),
        pytest.param({"do_sample": True}, SamplingDefaults(temperature=1.0), id="only sampled"),
        pytest.param(
            {"temperature": 0.7, "top_k": None}, SamplingDefaults(temperature=0.7), id="no flag"
        ),
        pytest.param({"top_p": 0.9}, SamplingDefaults(), id="neither flag nor temperature"),
    ],
)
def test_recommended_sampling(
    generation: dict[str, object] | None,
    expected: SamplingDefaults,
    write_checkpoint: WriteCheckpoint,
) -> None:
    files = {} if generation is None else {GENERATION: generation}
    assert read_spec(write_checkpoint(files=files)).sampling == expected


def test_impossible_sampling_is_refused(write_checkpoint: WriteCheckpoint) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config.json.*top_p"):
        read_spec(write_checkpoint(files={GENERATION: {"do_sample": True, "top_p": 2.0}}))


@pytest.mark.parametrize(
    "architectures", [["LlamaForCausalLM"], [], None, "SDARForCausalLM"], ids=str
)
def test_an_unknown_architecture_is_refused_with_what_is_supported(
    architectures: object, write_checkpoint: WriteCheckpoint
) -> None:
    folder = write_checkpoint(config={"architectures": architectures})
    with pytest.raises(CheckpointError, match=r"supported: .*SDARForCausalLM"):
        read_spec(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"head_dim": None}, r"config.json: head_dim: Field required", id="missing"),
        pytest.param({"rope_theta": None}, r"config.json: rope_theta is missing", id="no base"),
        pytest.param({"num_attention_heads": 3}, r"config.json: .*not a multiple", id="heads"),
    ],
)
def test_a_config_at_fault_is_named_with_its_field(
    fields: dict[str, object], message: str, write_checkpoint: WriteCheckpoint
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_spec(write_checkpoint(config=fields))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        read_spec(tmp_path)
