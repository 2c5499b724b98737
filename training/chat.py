"""How a conversation becomes text: ChatML, as SDAR's own template writes it."""

from __future__ import annotations

from tokenizers import Tokenizer

from focus_ray.tasks import Task

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
MASK = "<|MASK|>"
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN, MASK)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token.

    Raises:
        ValueError: the tokenizer does not have it.
    """
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise ValueError(f"the tokenizer has no token {token!r}")
    return token_id


def chat_text(task: Task) -> str:
    """The conversation with the generation prompt; what follows is the answer."""
    turns = (
        f"{START_OF_TURN}{turn['role']}\n{turn['content']}{END_OF_TURN}\n" for turn in task.messages
    )
    return "".join(turns) + f"{START_OF_TURN}assistant\n"
