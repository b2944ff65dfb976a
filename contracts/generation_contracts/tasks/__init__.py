"""The tasks: one module for each member of `Task`, which defines `SPEC`."""

from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from operator import or_
from typing import Annotated, Any, Final

from pydantic import Field

from generation_contracts.base import Task
from generation_contracts.tasks.spec import TaskSpec


def _spec_of(task: Task) -> TaskSpec:
    spec: TaskSpec = import_module(f"{__name__}.{task}").SPEC
    return spec


TASKS: Final[Mapping[Task, TaskSpec]] = {task: _spec_of(task) for task in Task}

_STEPS: Any = reduce(or_, (spec.step for spec in TASKS.values()))
NEXT_STEP: Final[Any] = Annotated[_STEPS, Field(discriminator="task")]

# A request contains steps of every task, so its model is complete when all tasks are known.
for _spec in TASKS.values():
    _spec.request.model_rebuild(_types_namespace={"NextStep": NEXT_STEP})

__all__ = ["NEXT_STEP", "TASKS", "TaskSpec"]
