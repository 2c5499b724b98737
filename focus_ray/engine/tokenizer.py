"""Text to token ids and back, safe against text that spells special tokens.

Two tokenizers come from one ``tokenizer.json``. The stock one decodes. The one that encodes is the
same except that every added token has a new, unguessable spelling: whatever users write, be it
``<|im_end|>`` or the mask token, is ordinary text to it. Specials of a chat template are found in
what the template itself wrote (see ``user_text.py``) and handed over in their new spelling, so that
one call encodes the whole prompt with the pipeline of the checkpoint, to the same ids.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from focus_ray.engine.chat_template import ChatTemplate, Messages
from focus_ray.engine.token_bytes import piece_bytes, token_bytes
from focus_ray.engine.tokenizer_files import TokenizerFiles
from focus_ray.engine.user_text import ShadowAlphabet, refuse_lone_surrogates
from focus_ray.errors import CheckpointError, RequestRejected

# What the library raises when its Rust code panics: no Exception, and nothing one can import.
RUST_PANIC = "PanicException"
# Most characters that a normaliser to NFC makes one of.
NFC_CHARS = 4


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation: the text, for people, and what the model reads."""

    text: str
    token_ids: list[int]


class Tokenizer:
    """The tokenizer of one checkpoint. Immutable; may be shared by threads.

    Args:
        files: what the checkpoint folder holds.

    Raises:
        CheckpointError: the files contradict each other.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        added = files.definition["added_tokens"]
        self.added_tokens: Mapping[str, int] = {token["content"]: token["id"] for token in added}
        self.special_ids = frozenset(token["id"] for token in added if token["special"])
        self._stock = _build(files.definition, self.added_tokens)

        nonce = secrets.token_hex(16)
        self._hidden_spellings = {
            spelling: f"\U0010fffd{nonce}{token_id:x}\U0010fffd"
            for spelling, token_id in self.added_tokens.items()
        }
        self._encoder = _build(
            _respell(files.definition, self._hidden_spellings),
            {self._hidden_spellings[spelling]: i for spelling, i in self.added_tokens.items()},
        )
        longest_first = sorted(self.added_tokens, key=len, reverse=True)
        self._added_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

        vocab = self._stock.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        # A bound for byte-level tokenizers; others may drop spaces or take a strange word as one.
        self.max_chars_per_token = NFC_CHARS * max(map(len, vocab))
        self.mask_token_id = self._id_of(files, "mask_token")
        self.eos_token_id = self._id_of(files, "eos_token")
        decoder = files.definition.get("decoder") or {}
        self._bytes_of_id: dict[bool, Mapping[int, bytes]] = {}  # by skip_special_tokens
        if decoder.get("type") == "ByteLevel":
            self._bytes_of_id = {
                skip: _BytesOfId(self._stock, self.special_ids if skip else frozenset())
                for skip in (False, True)
            }
        self._alphabet = ShadowAlphabet(self.added_tokens)
        self._chat_templates = {
            name: ChatTemplate(source, self._alphabet, files.named_tokens)
            for name, source in files.chat_templates.items()
        }

    @classmethod
    def from_path(cls, path: Path) -> Tokenizer | None:
        """The tokenizer in folder ``path``; None if there is none.

        Raises:
            CheckpointError: its files cannot be used.
        """
        files = TokenizerFiles.read(path)
        return None if files is None else cls(files)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> list[int]:
        """Token ids of ``text``, all of it ordinary.

        Args:
            text: may spell added tokens; none of them results from it.
            add_special_tokens: put the checkpoint's own frame around it, as a first ``<s>``, where
                it has one.
            param: the request field to name in errors.

        Raises:
            RequestRejected: ``text`` holds a lone surrogate.
        """
        refuse_lone_surrogates(text, param, param)
        return self._ids(text, add_special_tokens, param)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``; bytes that are no UTF-8 become U+FFFD."""
        return self._stock.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself, special or not; U+FFFD for part of a character."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, in UTF-8; exact for part of a character too."""
        return token_bytes(self.token_text(token_id), self._stock.id_to_token(token_id))

    def bytes_of_id(self, skip_special_tokens: bool = True) -> Mapping[int, bytes] | None:
        """What each token adds to a text, in UTF-8; None where that depends on other tokens.

        Any id may be looked up; one that the vocabulary does not have adds nothing.
        """
        return self._bytes_of_id.get(skip_special_tokens)

    def new_decode_stream(self, skip_special_tokens: bool = True) -> TokenStream:
        return TokenStream(self._stock, skip_special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat_templates)

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; see ``render_chat``."""
        return self.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        ).token_ids

    def render_chat(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """A conversation through the checkpoint's chat template.

        Added tokens come from the template alone. What a message, a tool or a keyword argument
        spells, at any depth and also together with its surroundings, is ordinary text.

        Args:
            messages: objects with ``role`` and ``content``, and what else the template reads.
            add_generation_prompt: end with the head of the assistant's answer.
            tools: JSON schemas of functions.
            chat_template_kwargs: further variables of the template, as ``enable_thinking``.

        Raises:
            RequestRejected: there is no chat template, it refuses the messages, or a string in them
                is no valid Unicode.
        """
        names = ("tool_use", "default") if tools else ("default",)
        template = next((t for n in names if (t := self._chat_templates.get(n))), None)
        if template is None:
            raise RequestRejected(
                "this model has no chat template; send the whole prompt as text instead",
                param="messages",
            )
        shadowed = template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        text = self._added_pattern.sub(
            lambda match: self._hidden_spellings[match[0]], str.__str__(shadowed)
        )
        token_ids = self._ids(self._alphabet.plain(text), False, "messages")
        return ChatPrompt(self._alphabet.plain(shadowed), token_ids)

    def _ids(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        """Ids of a text in the hidden spellings.

        A batch of one, because that lets other threads run meanwhile, which ``encode`` does not.
        """
        try:
            [encoding] = self._encoder.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        except BaseException as error:
            if type(error).__name__ != RUST_PANIC:
                raise
            raise RequestRejected(
                f"{param}: the tokenizer gave up on this text of {len(text)} characters: {error}; "
                "send less, or less that is alike",
                param,
            ) from error
        return encoding.ids

    def _id_of(self, files: TokenizerFiles, role: str) -> int | None:
        spelling = files.named_tokens.get(role, "")
        token_id = self._stock.token_to_id(spelling)
        return files.aliases.get(spelling) if token_id is None else token_id


class _BytesOfId(dict[int, bytes]):
    """Filled as ids are looked up; for decoders that are byte-level alone."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, skipped_ids: frozenset[int]) -> None:
        super().__init__(dict.fromkeys(skipped_ids, b""))
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> bytes:
        piece = self._tokenizer.id_to_token(token_id)
        self[token_id] = found = b"" if piece is None else piece_bytes(piece)
        return found


class TokenStream:
    """Decodes ids as they come, holding back what may still become another character."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    def step(self, token_id: int) -> str | None:
        """Text that became final with ``token_id``; None if there is none yet."""
        try:
            return self._stream.step(self._tokenizer, token_id)
        except Exception:
            # Decoders with byte fallback take back a run of bytes that turns out not to be UTF-8;
            # what was given out stays, and decoding starts afresh. Byte-level ones never do this.
            self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            return self._stream.step(self._tokenizer, token_id)


def _respell(definition: dict[str, Any], new_spellings: Mapping[str, str]) -> dict[str, Any]:
    """``definition`` with its added tokens renamed, in the model's own vocabulary too.

    A token that no longer has its name there cannot result from ordinary text either. BPE merges
    that would build it are dropped.
    """
    definition = copy.deepcopy(definition)
    for token in definition["added_tokens"]:
        token["content"] = new_spellings[token["content"]]
        token["single_word"] = False  # was decided when the template's text was searched
    model = definition["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {new_spellings.get(piece, piece): i for piece, i in vocab.items()}
    else:  # Unigram: [piece, score] at the place of its id
        model["vocab"] = [[new_spellings.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") is not None:
        model["unk_token"] = new_spellings.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            merge
            for merge, (left, right) in ((m, _merge_parts(m)) for m in model["merges"])
            if not {left, right, left + right.removeprefix(prefix)} & new_spellings.keys()
        ]
    return definition


def _merge_parts(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _build(definition: dict[str, Any], added_tokens: Mapping[str, int]) -> tokenizers.Tokenizer:
    """The tokenizer of ``definition``, without limits on length.

    Raises:
        CheckpointError: it cannot be built, or gives an added token an id that it does not name.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_str(
            json.dumps(definition | {"truncation": None, "padding": None})
        )
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"tokenizer.json cannot be used: {error}") from error
    for spelling, token_id in added_tokens.items():
        if tokenizer.token_to_id(spelling) != token_id:
            raise CheckpointError(
                f"the tokenizer files give the added token {spelling!r} id {token_id}, but the "
                f"vocabulary puts it at {tokenizer.token_to_id(spelling)}; the ids of added tokens "
                "must follow the vocabulary without gaps"
            )
    return tokenizer
