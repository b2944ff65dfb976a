"""The rows of one `generate` call: end of each text, progress and cancellation of its request."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from consumer.ports.model import RunRequest
from consumer.runners.faults import BadOutput


@dataclass
class Row:
    """The state of one text during its generation.

    Attributes:
        run: The request. Each token is reported to it as a step, and it is polled after each token.
        prompt_tokens: Number of tokens of the prompt, without padding.
        most: The most tokens of the text.
        tokens: Number of tokens so far.
        is_cancelled: Whether the request is cancelled.
        is_over: Whether the text has ended, or the request is cancelled. The request then gets no
            progress and is not polled.
    """

    run: RunRequest
    prompt_tokens: int
    most: int
    tokens: int = 0
    is_cancelled: bool = False
    is_over: bool = False

    def take(self, *, ends: bool) -> None:
        """Count a token; `ends` says whether it is an end token."""
        self.tokens += 1
        self.run.progress.step(self.tokens, self.most)
        self.is_cancelled = self.run.cancelled()
        self.is_over = self.is_cancelled or ends or self.tokens >= self.most


class RowStopping(StoppingCriteria):
    """Stops each row at the token with which it is over; `generate` pads the row from there.

    Args:
        rows: In the order of the batch.
        ends: The end tokens.
    """

    def __init__(self, rows: Sequence[Row], ends: Collection[int]) -> None:
        self._rows = rows
        self._ends = ends

    def __call__(self, input_ids: Any, *_: Any, **__: Any) -> Any:
        """Process the newest token of each row; return a bool tensor, True for ended rows.

        Args:
            input_ids: Shape (rows, tokens), including padding.
        """
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if not row.is_over:
                row.take(ends=token in self._ends)
        return torch.tensor([row.is_over for row in self._rows], device=input_ids.device)


class ValidScores(LogitsProcessor):
    """Refuses scores that are NaN or infinite.

    Greedy decoding would generate nonsense from them, and sampling makes a cuda device unusable for
    the process.
    """

    def __call__(self, _: Any, scores: Any) -> Any:
        """Return the scores unchanged.

        Raises:
            BadOutput: A score is NaN or infinite.
        """
        if not (scores < math.inf).all():  # -inf marks an excluded token
            raise BadOutput("the model made scores that are not numbers")
        return scores
