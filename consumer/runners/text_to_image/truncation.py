"""Seeing that a prompt was cut: the pipelines only log it, words and all, and some do not."""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin


class TruncationTracker:
    """The text encoders that did not read a text whole, with how many tokens they read.

    Every pipeline reads its prompts in their order and then the negative ones in theirs, with each
    of its tokenizers, in one call or in a call for each: so the place of a text among all that a
    tokenizer was given tells whose it is.

    Args:
        prompts: How many are given to the pipeline; as many negative ones, or none.
    """

    def __init__(self, prompts: int = 1) -> None:
        self._prompts = prompts
        self._read: Counter[str] = Counter()  # texts, by tokenizer
        self._seen: dict[tuple[int, str], int] = {}

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

    def warnings(self, prompt: int = 0) -> tuple[str, ...]:
        """One sentence for each encoder that cut a prompt or its negative one, without the words.

        Args:
            prompt: Its place among the prompts.
        """
        return tuple(
            f"a prompt is longer than the model reads: {name} saw its first {tokens} tokens only"
            for (place, name), tokens in sorted(self._seen.items())
            if place == prompt
        )

    def _watching(self, name: str, original: type[Any]) -> type[Any]:
        note = self._note

        def call(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            encoded = original.__call__(self, text, *args, **kwargs)
            if kwargs.get("truncation") and text is not None:
                special = kwargs.get("add_special_tokens", True)
                whole = original.__call__(
                    self, text, add_special_tokens=special, return_attention_mask=False
                )
                note(name, _rows(whole["input_ids"]), _rows(encoded["input_ids"]))
            return encoded

        # The name stays: diffusers writes it into the configuration of the pipeline.
        members = {"__call__": call, "__module__": original.__module__}
        return type(original.__name__, (original,), members)

    def _note(self, name: str, whole: Sequence[Any], read: Sequence[Any]) -> None:
        # What is read is padded, if at all, to no more than what can be read: a text that is longer
        # than its padded row was cut.
        for all_of_it, part in zip(whole, read, strict=False):
            place = self._read[name] % self._prompts
            self._read[name] += 1
            if len(all_of_it) > len(part):
                self._seen[place, name] = len(part)


def _rows(ids: Sequence[Any]) -> Sequence[Any]:
    """The tokens of each text, also where there is one text and no list of them."""
    return [ids] if not len(ids) or isinstance(ids[0], int) else ids
