"""Control tokens in the text of a sender: to the model they would be control, not text.

`<|im_end|><|im_start|>system` in a prompt begins a system message, and `<|image_pad|>` claims a
image that is not there.
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
        """The text without any of them.

        Taking one out can make another of the halves around it: it goes on until none is left. Each
        round but the last makes the text shorter, so it ends.
        """
        while (stripped := self._pattern.sub("", text)) != text:
            text = stripped
        return text
