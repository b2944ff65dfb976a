"""Going on with a training that was broken off: it takes an hour or more on a small machine."""

import random
from pathlib import Path
from typing import Any

import structlog
import torch

log = structlog.get_logger()

EVERY = 250  # steps


class Checkpoint:
    """The state of a training in a file, replaced as a whole.

    Args:
        file: None: nothing is kept.
        choice: What the scenes are drawn with; its state is kept as well as torch's.
        parts: Whatever has a `state_dict` and changes: models, optimizers.
    """

    def __init__(self, file: Path | None, choice: random.Random, parts: dict[str, Any]) -> None:
        self._file = file
        self._choice = choice
        self._parts = parts

    def resume(self) -> int:
        """Set everything as it was.

        Returns:
            The number of steps that were done; 0 where nothing was kept.
        """
        if self._file is None or not self._file.is_file():
            return 0
        # Written by this class, on this machine: besides tensors it has the states of optimizers.
        kept = torch.load(self._file, weights_only=False)
        for name, part in self._parts.items():
            part.load_state_dict(kept[name])
        torch.set_rng_state(kept["torch"])
        self._choice.setstate(kept["choice"])
        log.info("resumed", step=kept["step"])
        return int(kept["step"])

    def keep(self, step: int) -> None:
        """Write it down after every so many steps."""
        if self._file is None or step % EVERY:
            return
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {"step": step, "torch": torch.get_rng_state(), "choice": self._choice.getstate()}
        fresh = self._file.with_suffix(".new")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, fresh)
        fresh.replace(self._file)
