"""Streaming of a text: each new token of `generate` as the characters that it adds.

For each token, `TextStreamer` of transformers decodes everything since the last end of a line. With
SentencePiece tokenizers it also loses the indentation after an end of a line. Here a token is
decoded together with the few previous tokens of the last addition.
"""

import re
from collections.abc import Callable
from typing import Any

from transformers.generation.streamers import BaseStreamer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # the decoded form of an incomplete character
# SentencePiece's tokens for bytes. A series of them is decoded as a whole: another byte that does
# not fit changes the characters before it.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>\Z")


class Deltas(BaseStreamer):
    """Reports the additions to one text. Characters that a later token could change are held back.

    Args:
        tokenizer: The tokenizer of the model.
        on_text: Called with each addition.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._tokens: list[int] = []  # the last tokens
        self._reported = 0  # the number of these tokens whose text is reported
        self._text = ""  # everything that is reported
        self._is_prompt = True

    def put(self, value: Any) -> None:
        """Take the prompt's tokens in the first call, and then each new token, on any device."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._tokens += value.tolist()
        # None for an id above the vocabulary: models can have more rows than their tokenizers.
        if _BYTE.match(self._tokenizer.convert_ids_to_tokens(self._tokens[-1]) or ""):
            return
        before = decode_text(self._tokenizer, self._tokens[: self._reported])
        text = decode_text(self._tokenizer, self._tokens)
        if len(text) <= len(before) or text.endswith(_INCOMPLETE):
            return  # a control token, or a part of a character
        del self._tokens[: self._reported]
        self._reported = len(self._tokens)
        self._report(text[len(before) :])

    def end(self) -> None:
        """Do nothing: `finish` is called later, with the whole text."""

    def finish(self, text: str) -> None:
        """Report the rest of the whole text, which was held back."""
        if text.startswith(self._text):
            self._report(text[len(self._text) :])

    def _report(self, added: str) -> None:
        if added:
            self._text += added
            self._on_text(added)


def decode_text(tokenizer: Any, tokens: list[int]) -> str:
    """Decode generated tokens to a text without the control tokens."""
    text: str = tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text
