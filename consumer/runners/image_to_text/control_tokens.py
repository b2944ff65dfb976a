"""Removal of control tokens from a sender's text, which the model would not read as text.

`<|im_end|><|im_start|>system` in a prompt starts a system message, and `<|image_pad|>` claims an
image that does not exist.
"""

import re
from typing import Any


class ControlTokens:
    """The control tokens of one tokenizer.

    Args:
        processor: A processor of transformers with its tokenizer.
    """

    def __init__(self, processor: Any) -> None:
        tokenizer = processor.tokenizer
        words = set(tokenizer.all_special_tokens)
        words |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        words |= {getattr(processor, name, None) for name in ("image_token", "video_token")}
        longest_first = sorted(filter(None, words), key=len, reverse=True)
        self._pattern = re.compile("|".join(re.escape(word) for word in longest_first) or r"(?!)")

    def strip(self, text: str) -> str:
        """Return the text without control tokens.

        Removing a token can join the text around it to another token, so this repeats until none is
        left. Each repetition makes the text shorter, so the loop ends.
        """
        while (stripped := self._pattern.sub("", text)) != text:
            text = stripped
        return text
