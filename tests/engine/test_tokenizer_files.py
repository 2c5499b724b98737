"""Which tokenizer files are read, and which are refused."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

import pytest
from sample_tokenizers import added_in, load, qwen2_like, save, user, with_template

from focus_ray.engine.tokenizer import Tokenizer
from focus_ray.errors import CheckpointError


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.from_path(tmp_path) is None


@pytest.mark.parametrize(
    ("files", "words"),
    [
        pytest.param({"vocab.json": "{}"}, "vocab.json but no tokenizer.json", id="slow only"),
        pytest.param({"tokenizer.json": "{"}, "no valid JSON", id="broken JSON"),
        pytest.param({"tokenizer.json": "[]"}, "holds a list", id="no object"),
        pytest.param({"tokenizer.json": '{"model": {"type": "BPE"}, "added_tokens": []}'},
                     "cannot be used", id="no vocabulary"),
    ],
)  # fmt: skip
def test_unusable_files(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=words):
        Tokenizer.from_path(tmp_path)


def test_added_tokens_with_a_gap_are_refused(tmp_path: Path) -> None:
    folder = save(qwen2_like(), tmp_path)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["added_tokens"][-1]["id"] += 5
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(CheckpointError, match=re.escape("'<|MASK|>'")):
        Tokenizer.from_path(folder)


def test_broken_template_is_refused_on_loading(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="line 1"):
        with_template(tmp_path, "{% if %}")


def test_mask_named_by_the_config_alone(tmp_path: Path) -> None:
    """As in some SDAR repositories: one id, two spellings, and a mask that is not special."""
    stock = qwen2_like()
    mask_id = stock.token_to_id("<|MASK|>")
    folder = save(stock, tmp_path, mask_token="<MASK>", eos_token={"content": "<|im_end|>"})
    (folder / "added_tokens.json").write_text(json.dumps({"<MASK>": mask_id}))
    tokenizer = load(folder)
    assert tokenizer.mask_token_id == mask_id
    assert tokenizer.eos_token_id == stock.token_to_id("<|im_end|>")
    assert mask_id not in tokenizer.encode("<MASK> <|MASK|>")


def test_named_tokens_count_as_special(tmp_path: Path) -> None:
    tokenizer = load(save(qwen2_like(), tmp_path, mask_token="<|MASK|>"))
    mask_id = tokenizer.mask_token_id
    assert mask_id is not None
    assert mask_id in tokenizer.special_ids
    assert tokenizer.decode([mask_id]) == ""
    assert tokenizer.token_text(mask_id) == "<|MASK|>"


def test_added_tokens_of_the_config_are_added(tmp_path: Path) -> None:
    stock = qwen2_like()
    next_id = stock.get_vocab_size()
    folder = save(
        stock,
        tmp_path,
        added_tokens_decoder={
            str(next_id): {"content": "<|new|>", "special": True},
            str(next_id - 1): {"content": "<another mask>", "special": False},
        },
        chat_template="<|new|>{{ messages[0].content }}<another mask>",
    )
    tokenizer = load(folder)
    assert tokenizer.vocab_size == next_id + 1
    token_ids = tokenizer.apply_chat_template([user("<|new|>")])
    assert added_in(tokenizer, token_ids) == [next_id]
    assert tokenizer.token_text(next_id - 1) == "<|MASK|>", "tokenizer.json wins"


def test_named_templates(tmp_path: Path) -> None:
    template = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
    ]
    tokenizer = load(save(qwen2_like(), tmp_path, chat_template=template))
    assert tokenizer.render_chat([user("x")]).text == "plain"
    assert tokenizer.render_chat([user("x")], tools=[{"a": 1}]).text == "tools"


def test_template_file_wins(tmp_path: Path) -> None:
    folder = save(qwen2_like(), tmp_path)
    (folder / "chat_template.jinja").write_text("from the file")
    assert load(folder).render_chat([user("x")]).text == "from the file"


def test_what_templates_may_use(tmp_path: Path) -> None:
    tokenizer = with_template(
        tmp_path,
        "{{ eos_token }}{{ strftime_now('%Y') }}{% generation %}<{{ messages[0].n + 1 }}>"
        "{% endgeneration %}{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}"
        "{% endfor %}",
        eos_token="<|im_end|>",
    )
    chat = tokenizer.render_chat([user("x") | {"n": 1}])
    assert chat.text == f"<|im_end|>{datetime.now().year}<2>1"
    assert added_in(tokenizer, chat.token_ids) == [tokenizer.eos_token_id]


def test_limits_of_the_file_do_not_cut_prompts(tmp_path: Path) -> None:
    stock = qwen2_like()
    stock.enable_truncation(4)
    stock.enable_padding(length=4)
    tokenizer = load(save(stock, tmp_path))
    assert len(tokenizer.encode("a b c d e f g h")) > 4
    assert len(tokenizer.encode("a")) == 1
