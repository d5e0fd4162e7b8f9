"""A tokenizer with the shape of mlx-lm's TokenizerWrapper: one token per UTF-8 byte, ChatML markers as tokens."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import jinja2

SPECIAL = {"<|im_start|>": 256, "<|im_end|>": 257}
SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")


class FakeTokenizer:
    """Bytes and two special tokens. `alternate`: its template refuses two messages of one role in a row."""

    def __init__(self, *, alternate: bool = False, has_chat_template: bool = True) -> None:
        self.alternate = alternate
        self.has_chat_template = has_chat_template
        self.chat_template = "{{ messages }}"
        self.init_kwargs: dict[str, str] = {}
        self.added_tokens_decoder: dict[int, Any] = {}

    def get_vocab(self) -> dict[str, int]:
        return dict(SPECIAL)

    def __len__(self) -> int:
        return 256 + len(SPECIAL)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = []
        for part in SPLIT.split(text):
            ids += [SPECIAL[part]] if part in SPECIAL else list(part.encode())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        assert not tokenize
        roles = [m["role"] for m in messages]
        if self.alternate and any(a == b for a, b in itertools.pairwise(roles)):
            raise jinja2.TemplateError("Conversation roles must alternate")
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")
