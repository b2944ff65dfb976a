"""A text as it grows: each new token of `generate` as the characters that it adds.

`TextStreamer` of transformers decodes everything since the last end of a line anew for each token,
and what follows an end of a line without its indentation where the tokenizer is SentencePiece's.
Here a token is decoded with the few before it that the last addition came from.
"""

import re
from typing import Any

from transformers.generation.streamers import BaseStreamer

from consumer.ports.model import OnText

_HALF = "\N{REPLACEMENT CHARACTER}"  # what an incomplete character is decoded to
# SentencePiece's tokens for bytes. A row of them is decoded as a whole: one more that does not fit
# takes back the characters before it.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>\Z")


class Deltas(BaseStreamer):
    """Tells what is added to one text; nothing is told that a later token could change.

    Args:
        tokenizer: Of the model.
        on_text: Told each addition.
    """

    def __init__(self, tokenizer: Any, on_text: OnText) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._tokens: list[int] = []  # the last ones
        self._known = 0  # how many of them are told
        self._told = ""
        self._is_prompt = True

    def put(self, value: Any) -> None:
        """Take the prompt's tokens, which come first, and then each new one, on any device."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._tokens += value.tolist()
        # None for an id behind the vocabulary: models have some rows more than their tokenizers.
        if _BYTE.match(self._tokenizer.convert_ids_to_tokens(self._tokens[-1]) or ""):
            return
        before = written_text(self._tokenizer, self._tokens[: self._known])
        text = written_text(self._tokenizer, self._tokens)
        if len(text) <= len(before) or text.endswith(_HALF):
            return  # a control token, or a part of a character
        del self._tokens[: self._known]
        self._known = len(self._tokens)
        self._tell(text[len(before) :])

    def end(self) -> None:
        """Nothing: `generate` comes here only when it has not failed, and `finish` knows more."""

    def finish(self, text: str) -> None:
        """Tell the rest of the whole text: what the last tokens alone could not decide."""
        if text.startswith(self._told):
            self._tell(text[len(self._told) :])

    def _tell(self, added: str) -> None:
        if added:
            self._told += added
            self._on_text(added)


def written_text(tokenizer: Any, tokens: list[int]) -> str:
    """Tokens that a model wrote as a text, without the control tokens."""
    text: str = tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text
