"""Seeing that a prompt was cut: the pipelines only log it, words and all, and some do not."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin


class Cuts:
    """The text encoders that did not read a text whole, with how many tokens they read."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def watched(self, name: str, part: Any) -> Any:
        """A stand-in for a tokenizer, or a processor with one, that notes what it cuts.

        The original is not changed. Any other part is returned as it is.
        """
        if isinstance(part, ProcessorMixin) and hasattr(part, "tokenizer"):
            stand_in: Any = copy.copy(part)
            stand_in.tokenizer = self.watched(name, part.tokenizer)
            return stand_in
        if not isinstance(part, PreTrainedTokenizerBase):
            return part
        stand_in = copy.copy(part)
        stand_in.__class__ = self._watching(name, type(part))
        return stand_in

    def warnings(self) -> tuple[str, ...]:
        """One sentence for each encoder, without the prompt."""
        return tuple(
            f"a prompt is longer than the model reads: {name} saw its first {tokens} tokens only"
            for name, tokens in sorted(self._seen.items())
        )

    def _watching(self, name: str, original: type[Any]) -> type[Any]:
        seen = self._seen

        def call(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            encoded = original.__call__(self, text, *args, **kwargs)
            if kwargs.get("truncation") and text is not None:
                special = kwargs.get("add_special_tokens", True)
                whole = original.__call__(
                    self, text, add_special_tokens=special, return_attention_mask=False
                )
                tokens = _longest(encoded["input_ids"])
                if _longest(whole["input_ids"]) > tokens:
                    seen[name] = tokens
            return encoded

        # The name stays: diffusers writes it into the configuration of the pipeline.
        members = {"__call__": call, "__module__": original.__module__}
        return type(original.__name__, (original,), members)


def _longest(rows: Sequence[Any]) -> int:
    if len(rows) and isinstance(rows[0], int):
        return len(rows)
    return max((len(row) for row in rows), default=0)
