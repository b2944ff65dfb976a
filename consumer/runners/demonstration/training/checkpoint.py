"""Checkpoints, to resume an interrupted training: it takes an hour or more on a small machine."""

import random
from pathlib import Path
from typing import Any

import structlog
import torch

log = structlog.get_logger()

EVERY = 250  # steps


class Checkpoint:
    """The state of a training in a file, which is replaced atomically.

    Args:
        file: File of the checkpoint; None saves no checkpoints.
        choice: Random generator of the scenes. A checkpoint contains its state and that of torch.
        parts: Objects with a `state_dict`: models and optimizers.
    """

    def __init__(self, file: Path | None, choice: random.Random, parts: dict[str, Any]) -> None:
        self._file = file
        self._choice = choice
        self._parts = parts

    def resume(self) -> int:
        """Restore the saved state.

        Returns:
            The number of completed steps; 0 without a checkpoint.
        """
        if self._file is None or not self._file.is_file():
            return 0
        # A trusted file, written by this class. It also contains the states of optimizers.
        state = torch.load(self._file, weights_only=False)
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["torch"])
        self._choice.setstate(state["choice"])
        log.info("resumed", step=state["step"])
        return int(state["step"])

    def save(self, step: int) -> None:
        """Save the state, if the step is a multiple of `EVERY`."""
        if self._file is None or step % EVERY:
            return
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {"step": step, "torch": torch.get_rng_state(), "choice": self._choice.getstate()}
        fresh = self._file.with_suffix(".new")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, fresh)
        fresh.replace(self._file)
