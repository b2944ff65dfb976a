"""The operator's safety checker: a callable or a classifier that flags images."""

import pkgutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
import torch

from consumer.ports.model import ModelMisconfigured
from consumer.runners.config import ModelConfig
from consumer.runners.faults import BadOutput
from consumer.runners.setting_errors import checker_errors
from consumer.runners.text_to_image.image_classifier import load_classifier

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


def load_checker(config: ModelConfig, device: torch.device) -> SafetyChecker | None:
    """Import the callable or load the classifier, and log whether there is one.

    Args:
        config: Names the checker and the policy.
        device: Of a classifier.

    Raises:
        ModelMisconfigured: The setting does not name a callable or a classifier.
        ModelUnavailable: The classifier cannot be loaded.
    """
    setting = config.safety_checker
    log.info("safety_checker", checker=setting or "off", policy=config.safety_policy)
    if error := next(checker_errors(config), None):
        raise ModelMisconfigured(error)
    if not setting:
        return None
    if ":" not in setting:
        return SafetyChecker(load_classifier(config, device))
    return _imported(setting)


def _imported(setting: str) -> SafetyChecker:
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
