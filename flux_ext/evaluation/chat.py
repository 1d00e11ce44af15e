"""One form for all prompts: the tokenizer's chat template around them where it has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "What is this?"


@dataclass(frozen=True)
class ChatFormat:
    """What stands around a message of the user, up to the start of the answer."""

    before: str = ""
    after: str = "\n"

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """The tokenizer's template; without one the message alone and a line break.

        A start token that the template writes and the tokenizer adds anyway is left out: prompts are tokenized with
        their special tokens.

        Raises:
            ValueError: the template changes the message.
        """
        if not getattr(tokenizer, "chat_template", None):
            return cls()
        messages = [{"role": "user", "content": _PROBE}]
        text = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        )
        before, probe, after = text.rpartition(_PROBE)
        if not probe:
            raise ValueError("tokenizer has a chat template that changes the user's message")
        start = tokenizer.bos_token
        if (
            isinstance(start, str)
            and start
            and before.startswith(start)
            and tokenizer(before)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
        ):
            before = before.removeprefix(start)
        return cls(before, after)
