"""The rows of one `generate`: where each text ends, and whom its tokens are told."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from consumer.ports.model import BatchMember
from consumer.runners.faults import BadOutput


@dataclass
class Row:
    """One text as it is written.

    Attributes:
        member: Whose it is: told each token, and asked after it.
        prompt_tokens: Without the padding before them.
        most: Tokens that the text may have.
        tokens: That it has so far.
        is_cancelled: Nobody wants it any more.
        is_over: So or otherwise; it is neither told nor asked again.
    """

    member: BatchMember
    prompt_tokens: int
    most: int
    tokens: int = 0
    is_cancelled: bool = False
    is_over: bool = False

    def take(self, *, ends: bool) -> None:
        """Count a token, which may be one that ends a text."""
        self.tokens += 1
        self.member.on_step(self.tokens, self.most)
        self.is_cancelled = self.member.cancelled()
        self.is_over = self.is_cancelled or ends or self.tokens >= self.most


class Rows(StoppingCriteria):
    """Stops each row at the very token with which it is over; `generate` pads it from there on.

    Args:
        rows: In the order of the model's.
        ends: The tokens that end a text.
    """

    def __init__(self, rows: Sequence[Row], ends: Collection[int]) -> None:
        self._rows = rows
        self._ends = ends

    def __call__(self, input_ids: Any, *_: Any, **__: Any) -> Any:
        """Look at the tokens that have just been written, padding included."""
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if not row.is_over:
                row.take(ends=token in self._ends)
        return torch.tensor([row.is_over for row in self._rows], device=input_ids.device)


class Numbers(LogitsProcessor):
    """Refuses scores that are not numbers.

    Greedy decoding would make gibberish of them, and sampling on cuda ends the process's device.
    """

    def __call__(self, _: Any, scores: Any) -> Any:
        """Give the scores back as they are."""
        if not (scores < math.inf).all():  # -inf is a token that is ruled out
            raise BadOutput("the model made scores that are not numbers")
        return scores
