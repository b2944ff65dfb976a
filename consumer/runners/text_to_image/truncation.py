"""Detection of truncated prompts.

Pipelines only log a truncation, with the words of the prompt, and some do not log it.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin


class TruncationTracker:
    """Records which tokenizers truncated which prompts, and how many tokens they kept.

    With each tokenizer, a pipeline encodes the prompts in order and then the negative prompts in
    order, in one call or one call each. The position of a text among all texts of a tokenizer
    therefore identifies its prompt.

    Args:
        prompts: Number of prompts; there are as many negative prompts, or none.
    """

    def __init__(self, prompts: int = 1) -> None:
        self._prompts = prompts
        self._texts: Counter[str] = Counter()  # encoded texts, by tokenizer
        self._truncated: dict[tuple[int, str], int] = {}  # tokens kept, by prompt and tokenizer

    def tracked(self, name: str, part: Any) -> Any:
        """Return a copy of a tokenizer, or of a processor with one, that records truncations.

        The original is not changed. Any other part is returned unchanged.
        """
        if isinstance(part, ProcessorMixin) and hasattr(part, "tokenizer"):
            tracked: Any = copy.copy(part)
            tracked.tokenizer = self.tracked(name, part.tokenizer)
            return tracked
        if not isinstance(part, PreTrainedTokenizerBase):
            return part
        tracked = copy.copy(part)
        tracked.__class__ = self._tracking(name, type(part))
        return tracked

    def warnings(self, prompt: int = 0) -> tuple[str, ...]:
        """Return one warning for each tokenizer that truncated a prompt or its negative prompt.

        The warnings do not contain words of the prompt.

        Args:
            prompt: Index of the prompt.
        """
        return tuple(
            f"the prompt was truncated: {name} read only its first {tokens} tokens"
            for (index, name), tokens in sorted(self._truncated.items())
            if index == prompt
        )

    def _tracking(self, name: str, original: type[Any]) -> type[Any]:
        record = self._record

        def call(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            encoded = original.__call__(self, text, *args, **kwargs)
            if kwargs.get("truncation") and text is not None:
                special = kwargs.get("add_special_tokens", True)
                whole = original.__call__(
                    self, text, add_special_tokens=special, return_attention_mask=False
                )
                record(name, _rows(whole["input_ids"]), _rows(encoded["input_ids"]))
            return encoded

        # The class name must not change: diffusers writes it into the pipeline's configuration.
        members = {"__call__": call, "__module__": original.__module__}
        return type(original.__name__, (original,), members)

    def _record(self, name: str, whole: Sequence[Any], encoded: Sequence[Any]) -> None:
        # Rows are padded to at most the encoder's maximum length. A text with more tokens than its
        # padded row was truncated.
        for tokens, row in zip(whole, encoded, strict=False):
            index = self._texts[name] % self._prompts
            self._texts[name] += 1
            if len(tokens) > len(row):
                self._truncated[index, name] = len(row)


def _rows(ids: Sequence[Any]) -> Sequence[Any]:
    """Return the tokens of each text; a single text may come without the outer list."""
    return [ids] if not len(ids) or isinstance(ids[0], int) else ids
