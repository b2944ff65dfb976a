"""The operator's safety checker: a callable that flags images."""

import pkgutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
import torch

from consumer.ports.model import ModelMisconfigured
from consumer.runners.faults import BadOutput
from consumer.runners.setting_errors import checker_errors

if TYPE_CHECKING:
    from PIL.Image import Image

SETTING = "MODEL_SAFETY_CHECKER"

log = structlog.get_logger()

# Failures of the device, which are not reported as failures of the checker.
_OF_THE_DEVICE = (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)


class SafetyChecker:
    """Calls the checker and accepts only one bool for each image as its result.

    Args:
        check: Called in the inference thread with a list of RGB images.
    """

    def __init__(self, check: Callable[..., Any]) -> None:
        self._check = check

    def flags(self, images: "Sequence[Image]") -> list[bool]:
        """Return a flag for each image. The callable gets copies, so the images do not change.

        Raises:
            BadOutput: The callable raised, or did not return one bool for each image.
        """
        try:
            flags = self._check([image.copy() for image in images])
        except _OF_THE_DEVICE:
            raise
        except Exception as error:
            log.exception("safety_checker_raised")
            raise BadOutput(f"the safety checker raised {type(error).__name__}") from None
        if not isinstance(flags, list | tuple) or len(flags) != len(images):
            raise BadOutput("the safety checker did not return one flag for each image")
        if not all(isinstance(flag, bool | np.bool_) for flag in flags):
            raise BadOutput("the safety checker returned a flag that is neither true nor false")
        return [bool(flag) for flag in flags]


def load_checker(setting: str) -> SafetyChecker | None:
    """Import the callable, and log whether there is one.

    Args:
        setting: `package.module:callable`; empty for none.

    Raises:
        ModelMisconfigured: The setting does not name a callable.
    """
    log.info("safety_checker", checker=setting or "off")
    if not setting:
        return None
    if error := next(checker_errors(setting), None):
        raise ModelMisconfigured(error)
    try:
        found = pkgutil.resolve_name(setting)
    except (ModuleNotFoundError, AttributeError) as missing:
        reason = str(missing)
    except Exception as error:  # the import runs the operator's code
        log.exception("safety_checker_not_imported")
        reason = type(error).__name__
    else:
        if callable(found):
            return SafetyChecker(found)
        reason = "it is not callable"
    raise ModelMisconfigured(f"{SETTING}: {setting} cannot be used: {reason}")
