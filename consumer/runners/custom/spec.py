"""The task custom, as far as it is known without the runner of the operator."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from consumer.ports.model import ModelDescription
from consumer.runners.config import ModelConfig
from consumer.runners.task_settings import RunnerSpec, TrialInputs
from generation_contracts import CustomRequest

PLACEHOLDER = "s3://first-run/image.png"
SIDE = 224  # pixels: width and height of the input images of a trial run


def _smallest(_: ModelDescription) -> TrialInputs:
    # The smallest request that a runner accepts is not known; a runner without required parameters
    # and images can be tried.
    return CustomRequest(seed=0), []


def add_working_directory() -> None:
    """Let modules be imported from the working directory, as `python -m` does.

    It is the last place to look, so a file there replaces no installed package.
    """
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)


def setting_errors(config: ModelConfig) -> Iterator[str]:
    """Yield what is wrong with MODEL_RUNNER, without running code of its package."""
    add_working_directory()
    module, _, name = config.runner.partition(":")
    if not config.runner:
        yield "MODEL_RUNNER: must be set for MODEL_TYPE=custom: package.module:Class"
    elif not all(part.isidentifier() for part in (*module.split("."), name)):
        yield "MODEL_RUNNER: must be package.module:Class"
    elif find_spec(module.partition(".")[0]) is None:
        yield f"MODEL_RUNNER: there is no module {module.partition('.')[0]}"


SPEC = RunnerSpec(
    module="consumer.runners.custom.custom_model",
    attention=(),
    settings=frozenset({"runner"}),
    is_pipeline=False,
    smallest=_smallest,
    sample=lambda: None,
    setting_errors=setting_errors,
    loads_weights=False,
)
