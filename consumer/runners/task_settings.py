"""What a task's runner package says about itself without the import of its libraries."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, TypeAlias

from consumer.ports.model import ModelDescription
from consumer.runners.config import ModelConfig
from generation_contracts import TASKS, Request, Task

if TYPE_CHECKING:
    from PIL.Image import Image

TrialInputs: TypeAlias = "tuple[Request, list[Image]]"


@dataclass(frozen=True)
class RunnerSpec:
    """The runner package of a task.

    Attributes:
        module: Name of the module whose function `load(config)` returns a `LoadedModel`.
        attention: The attention backends. Others would be downloaded from the hub and run.
        settings: The fields of `ModelConfig` that other tasks may not know.
        is_pipeline: Whether the model is a diffusers pipeline, else a model of transformers.
        smallest: Returns the smallest request that uses all features of a model, and its images.
        sample: Returns a request with all defaults, and its images; None if none is known.
        loads_weights: Whether it loads a model of diffusers or transformers, which all the other
            settings of `ModelConfig` are about.
        setting_errors: Yields what is wrong with settings that only this task has.
        demonstration: Defaults of the demonstration model; None: the task has no such model.
    """

    module: str
    attention: tuple[str, ...]
    settings: frozenset[str]
    is_pipeline: bool
    smallest: Callable[[ModelDescription], TrialInputs]
    sample: Callable[[], "TrialInputs | None"]
    loads_weights: bool = True
    setting_errors: Callable[[ModelConfig], Iterable[str]] = lambda _: ()
    demonstration: Mapping[str, int | float | str] | None = None


def runner_spec(task: Task) -> RunnerSpec:
    """Return the `SPEC` of a task's runner package."""
    spec: RunnerSpec = import_module(f"consumer.runners.{task}.spec").SPEC
    return spec


def others_with(setting: str, task: Task) -> tuple[Task, ...]:
    """Return the other tasks that know a field of `ModelConfig`."""
    return tuple(each for each in TASKS if each != task and setting in runner_spec(each).settings)
