"""The training schedule of all models: warm-up, cosine decay, clipped gradients."""

import math
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import structlog
import torch
from torch.nn import functional

log = structlog.get_logger()

_WARM_UP = 200  # steps
_MAX_GRADIENT = 1.0
_LOG_INTERVAL = 100  # steps


class Schedule:
    """Optimizers whose learning rates rise first and then fall to 2 % of the maximum.

    Args:
        parameters: The parameters for AdamW, or parameter groups as torch defines them.
        matrices: The parameters for Muon: the weights in the layers of a transformer. Muon
            orthogonalizes their updates and needs fewer steps.
        rate: The highest learning rate; the `lr` of a group overrides it.
        steps: Number of training steps.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor] | list[dict[str, object]],
        *,
        matrices: Iterable[torch.Tensor] = (),
        rate: float,
        steps: int,
    ) -> None:
        adam = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), fused=True)
        self._optimizers: list[torch.optim.Optimizer] = [adam]
        if weights := list(matrices):
            muon = torch.optim.Muon(
                weights, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            )
            self._optimizers.append(muon)
        self._rates = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=steps))
            for optimizer in self._optimizers
        ]

    def state_dict(self) -> dict[str, object]:
        """Return the state of the optimizers and learning rates."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "rates": [rates.state_dict() for rates in self._rates],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for rates, saved in zip(self._rates, state["rates"], strict=True):
            rates.load_state_dict(saved)

    def step(self, loss: torch.Tensor) -> None:
        """Make one optimizer step for the loss of a batch."""
        loss.backward()  # type: ignore[no-untyped-call]
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        parameters = [parameter for group in groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT)
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            optimizer.step()
            rates.step()
            optimizer.zero_grad(set_to_none=True)


def split(modules: Iterable[torch.nn.Module]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Split parameters into the weights in transformer layers, for Muon, and all others.

    Weights that turn a condition into scales and shifts are among the others, because they start at
    zero and have no direction.
    """
    inner: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            within = any(part in name for part in ("blocks.", "layers."))
            matrix = parameter.ndim == 2
            (inner if within and matrix and "norm" not in name else others).append(parameter)
    return inner, others


def autocast() -> torch.autocast:
    """Return a context that computes in bfloat16 if the CPU has instructions for it.

    Other CPUs take 50 times as long for a convolution in bfloat16 as for one in float32.
    """
    has_instructions = bool(torch.cpu.get_capabilities().get("avx512_bw"))
    return torch.autocast("cpu", torch.bfloat16, enabled=has_instructions)


class ProgressLog:
    """Logs the progress of a training."""

    def __init__(self, model: str, steps: int) -> None:
        self._model = model
        self._steps = steps
        self._began = time.monotonic()
        self._sum = 0.0
        self._count = 0

    def add(self, step: int, loss: torch.Tensor) -> None:
        """Log the mean loss every hundred steps."""
        self._sum += float(loss.detach())
        self._count += 1
        if (step + 1) % _LOG_INTERVAL == 0:
            seconds = time.monotonic() - self._began
            log.info(
                "training",
                model=self._model,
                step=step + 1,
                of=self._steps,
                loss=round(self._sum / self._count, 5),
                minutes=round(seconds / 60, 1),
            )
            self._sum, self._count = 0.0, 0


def _rate(step: int, *, steps: int) -> float:
    if step < _WARM_UP:
        return (step + 1) / _WARM_UP
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))


def attribute_loss(
    heads: Iterable[torch.nn.Module], vectors: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the summed cross-entropy of auxiliary heads.

    Args:
        heads: One classifier for each attribute.
        vectors: Input of the heads, shape (number, width).
        labels: Shape (number, attributes).
    """
    losses = [
        functional.cross_entropy(head(vectors).float(), labels[:, n])
        for n, head in enumerate(heads)
    ]
    return torch.stack(losses).sum()
