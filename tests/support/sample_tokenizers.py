"""Small tokenizers of many kinds, and the ChatML template, for tests of the text rooms."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as StockTokenizer

from focus_ray.engine.tokenizer import Tokenizer

SPELLINGS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|MASK|>"]
SPECIAL = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
CORPUS = [
    "system user assistant tool function name arguments think im_start im_end MASK endoftext",
    "Hello, world! How many apples does Anna have?\n\nShe has 12 apples.",
    "<|im_start|> <|im_end|> <think> </think> <|MASK|> {\"name\": \"f\"} ```python\nx = 1\n```",
    "Größe, naïve, 你好世界, 😀😀, \t tabs\r\n\n\n",
] * 20  # fmt: skip

# The constructs of Qwen3's template, which SDAR ships: namespaces, walking backwards, string
# methods on contents, thinking cut out of earlier turns, tool calls, a switch for thinking.
CHATML = """\
{%- macro text_of(content) -%}
    {%- if content is string -%}{{ content }}
    {%- else -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(open=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.open and message.role == 'user' and text_of(message.content) is string
        and not text_of(message.content).startswith('<think>') %}
        {%- set ns.open = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = text_of(message.content or '') | trim %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is defined %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role }}
        {%- if loop.index0 > ns.last and reasoning %}
            {{- '\\n<think>\\n' ~ reasoning ~ '\\n</think>\\n' }}
        {%- endif %}
        {{- '\\n' + content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {%- if call.function.arguments is string %}{{- call.function.arguments }}
            {%- else %}{{- call.function.arguments | tojson }}{%- endif %}
            {{- '}' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role in ['system', 'user', 'tool'] %}
        {{- '<|im_start|>' + message.role + '\\n' + text_of(message.content) + '<|im_end|>\\n' }}
    {%- else %}
        {{- raise_exception('no such role: ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def added(spelling: str) -> AddedToken:
    return AddedToken(spelling, special=spelling in SPECIAL, normalized=False)


def qwen2_like() -> StockTokenizer:
    """Added tokens after the vocabulary, as Qwen2 and SDAR have them."""
    stock = StockTokenizer(models.BPE())
    stock.normalizer = normalizers.NFC()
    pattern = (
        r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    stock.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    stock.decoder = decoders.ByteLevel()
    stock.train_from_iterator(CORPUS, bpe_trainer())
    stock.add_tokens([added(spelling) for spelling in SPELLINGS])
    return stock


def added_inside_vocabulary() -> StockTokenizer:
    """Added tokens at the head of the vocabulary, where training puts them; a frame of one."""
    stock = StockTokenizer(models.BPE(ignore_merges=True))
    stock.decoder = decoders.ByteLevel()
    stock.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    stock.train_from_iterator(CORPUS, bpe_trainer(list(map(added, SPELLINGS))))
    stock.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return stock


def added_reached_by_merges() -> StockTokenizer:
    """Added tokens that are ordinary results of merges too: BPE alone would build them."""
    stock = StockTokenizer(models.BPE())
    stock.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    stock.decoder = decoders.ByteLevel()
    stock.train_from_iterator(SPELLINGS * 50, bpe_trainer())
    assert all(len(stock.encode(spelling)) == 1 for spelling in SPELLINGS)
    stock.add_tokens([added(spelling) for spelling in SPELLINGS])
    return stock


def word_level() -> StockTokenizer:
    """Whole words; an added token spelled as a word would come straight from the vocabulary."""
    words = sorted({word for line in CORPUS for word in line.split()} | set(SPELLINGS))
    stock = StockTokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>")
    )
    stock.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    stock.add_tokens([added(spelling) for spelling in SPELLINGS])
    return stock


def unigram() -> StockTokenizer:
    """Sentence pieces; only the first piece of a text gets a leading space."""
    stock = StockTokenizer(models.Unigram())
    stock.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    stock.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        unk_token="<unk>",
        special_tokens=["<unk>", *map(added, SPELLINGS)],
        show_progress=False,
    )
    stock.train_from_iterator(CORPUS, trainer)
    return stock


def bpe_trainer(special_tokens: Sequence[AddedToken] = ()) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special_tokens),
        show_progress=False,
    )


KINDS: list[Callable[[], StockTokenizer]] = [
    qwen2_like,
    added_inside_vocabulary,
    added_reached_by_merges,
    word_level,
    unigram,
]


def save(stock: StockTokenizer, folder: Path, **config: Any) -> Path:
    stock.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_path(folder)
    assert tokenizer is not None
    return tokenizer


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def added_in(tokenizer: Tokenizer, token_ids: list[int]) -> list[int]:
    """The added tokens among ``token_ids``; an unknown character is one for other reasons."""
    added_ids = {i for spelling, i in tokenizer.added_tokens.items() if spelling != "<unk>"}
    return [token_id for token_id in token_ids if token_id in added_ids]


def with_template(folder: Path, template: str, **config: Any) -> Tokenizer:
    return load(save(qwen2_like(), folder, chat_template=template, **config))
