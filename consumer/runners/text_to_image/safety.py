"""The operator's own safety checker: a callable that says of each image whether it is flagged."""

import pkgutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
import torch

from consumer.ports.model import ModelUnavailable
from consumer.runners.faults import BadOutput

if TYPE_CHECKING:
    from PIL.Image import Image

SETTING = "MODEL_SAFETY_CHECKER"

log = structlog.get_logger()

# What the device does to a checker is told as what it is, not as a fault of the checker.
_OF_THE_DEVICE = (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)


class SafetyChecker:
    """Asks the callable, and takes nothing for an answer but one bool for each image.

    Args:
        check: Called in the inference thread with a list of RGB images.
    """

    def __init__(self, check: Callable[..., Any]) -> None:
        self._check = check

    def flags(self, images: "Sequence[Image]") -> list[bool]:
        """Which images are flagged. They are not changed: the callable has copies.

        Raises:
            BadOutput: The callable raised, or its answer is not one bool for each image.
        """
        try:
            answer = self._check([image.copy() for image in images])
        except _OF_THE_DEVICE:
            raise
        except Exception as error:
            log.exception("safety_checker_raised")
            raise BadOutput(f"the safety checker raised {type(error).__name__}") from None
        if not isinstance(answer, list | tuple) or len(answer) != len(images):
            raise BadOutput("the safety checker did not answer with one flag for each image")
        if not all(isinstance(flag, bool | np.bool_) for flag in answer):
            raise BadOutput("the safety checker gave a flag that is neither true nor false")
        return [bool(flag) for flag in answer]


def load_checker(setting: str) -> SafetyChecker | None:
    """Import the callable, and tell in the log whether there is one.

    Args:
        setting: `package.module:callable`; empty for none.

    Raises:
        ModelUnavailable: There is nothing of that name that can be called.
    """
    log.info("safety_checker", checker=setting or "off")
    if not setting:
        return None
    if ":" not in setting:
        raise ModelUnavailable(f"{SETTING}: must be package.module:callable")
    try:
        found = pkgutil.resolve_name(setting)
    except Exception as error:  # importing runs code that is not ours
        log.exception("safety_checker_not_imported")
        reason = type(error).__name__
    else:
        if callable(found):
            return SafetyChecker(found)
        reason = "it cannot be called"
    raise ModelUnavailable(f"{SETTING}: {setting} cannot be used: {reason}")
