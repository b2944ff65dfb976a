"""Schedulers: which ones work with a pipeline's weights, and the generators of their noise.

A pipeline takes any scheduler from its folder without a check. A scheduler of another kind gives
noise instead of an image, or fails at the first step of every request.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_type_hints

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from consumer.ports.model import ModelUnavailable
from consumer.runners.text_to_image.part_config import config_of

_FLOW = "FlowMatchEulerDiscreteScheduler"  # what most flow-matching pipelines are published with

# Flow-matching classes, whatever their configuration.
_ALWAYS_FLOW = ("FlowMatch", "FlowMap", "LTXEulerAncestralRF")

_INVERSE = "InverseScheduler"  # suffix of the classes that turn an image into noise

# It seeds its noise from torch's global generator, or with a constant.
_WITHOUT_GENERATOR = "DPMSolverSDEScheduler"

_MAX_LEAST_STEPS = 4  # PNDM's first steps use another method and need four

# Raised by `set_timesteps` for too few steps, or without an argument that a pipeline passes.
_SET_TIMESTEPS_FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

# Values that every class named in a pipeline's signature supports. Whether a class supports another
# value shows only in a run.
_USUAL = {
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
}


def require_generator(index: Mapping[str, Any], name: str) -> None:
    """Refuse a scheduler whose noise does not depend on the seed of a request.

    Args:
        index: The pipeline's model_index.json.
        name: The pipeline's name in messages.

    Raises:
        ModelUnavailable: Names the scheduler.
    """
    entry = index.get("scheduler")
    scheduler = entry[-1] if isinstance(entry, list) and entry else None
    if scheduler == _WITHOUT_GENERATOR:
        raise ModelUnavailable(f"{name}: {scheduler} ignores the seed of a request")


def require_kind(pipe: Any, name: str) -> None:
    """Refuse a scheduler for another kind of weights than the pipeline's.

    Args:
        pipe: The loaded pipeline.
        name: The pipeline's name in messages.

    Raises:
        ModelUnavailable: Names the scheduler and the required kind.
    """
    scheduler: Any = getattr(pipe, "scheduler", None)
    named = _scheduler_names(type(pipe))
    if scheduler is None or not named:
        return
    given, family = type(scheduler).__name__, type(pipe).__name__.removesuffix("Pipeline")
    if needs_flow(type(pipe)) and not _is_flow(scheduler):
        raise ModelUnavailable(
            f"{name}: {given} is for other weights: {family} needs a flow-matching scheduler, such "
            f"as {_FLOW}, or prediction_type flow_prediction with use_flow_sigmas"
        )
    if given.endswith(_INVERSE):
        raise ModelUnavailable(f"{name}: {given} adds noise instead of removing it")
    if given.startswith(_ALWAYS_FLOW) and not all(map(_can_flow, named)):
        raise ModelUnavailable(
            f"{name}: {given} is a flow-matching scheduler, and {family} does not work with one"
        )


def needs_flow(pipeline: type[Any]) -> bool:
    """Return whether the weights of a pipeline's class are trained for flow matching."""
    return _scheduler_names(pipeline) == {_FLOW}


def is_unusual(pipe: Any) -> bool:
    """Return whether only a run can show that the pipeline works with its scheduler.

    That applies to a class that the pipeline's signature does not name, and to a configuration
    value that the class may not support.
    """
    scheduler: Any = getattr(pipe, "scheduler", None)
    named = _scheduler_names(type(pipe))
    if scheduler is None or not named:
        return False
    config = config_of(scheduler)
    return type(scheduler).__name__ not in named or any(
        config.get(key, values[0]) not in values for key, values in _USUAL.items()
    )


def least_steps(scheduler: Any) -> int:
    """Return the fewest steps that a scheduler supports; 1 where only a run could show it."""
    # With shift_terminal, a schedule of one step divides 0 by 0.
    if config_of(scheduler).get("shift_terminal"):
        return 2
    for steps in range(1, _MAX_LEAST_STEPS + 1):
        try:
            scheduler.from_config(scheduler.config).set_timesteps(steps)
        except _SET_TIMESTEPS_FAILURES:
            continue
        return steps
    return 1


def fresh_scheduler(shared: Any, generators: Sequence[torch.Generator]) -> Any:
    """Return a new scheduler for one run, whose noise comes from the generators of the images.

    Many pipelines do not pass their generators to `step`. A scheduler that adds noise would then
    draw it from torch's global generator, and the image would not depend on the seed alone.

    Args:
        shared: The scheduler of the pipeline; not changed.
        generators: One for each image of the run.
    """
    scheduler = shared.from_config(shared.config)
    if "generator" in inspect.signature(scheduler.step).parameters:
        # A subclass, not a bound method as an attribute: such a reference cycle would keep the
        # tensors of the run until the next garbage collection.
        scheduler.__class__ = _with_generators(type(scheduler))  # type: ignore[arg-type]
        scheduler.generators = list(generators)
    return scheduler


@functools.cache
def _with_generators(kind: type[Any]) -> type[Any]:
    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(kind.step).bind_partial(self, *args, **kwargs).arguments
        if given.get("generator") is None:
            kwargs["generator"] = self.generators
        return kind.step(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})


def _scheduler_names(pipeline: type[Any]) -> frozenset[str]:
    """Return the scheduler classes in the signature of a pipeline; empty where it names none."""
    hint = get_type_hints(pipeline.__init__).get("scheduler")
    classes = get_args(hint) or (hint,)
    names = {c.__name__ for c in classes if inspect.isclass(c)}
    if KarrasDiffusionSchedulers.__name__ in names:
        names |= {member.name for member in KarrasDiffusionSchedulers}
    return frozenset(n for n in names if _is_scheduler(getattr(diffusers, n, None)))


def _is_scheduler(found: Any) -> bool:
    # The annotation SchedulerMixin means any class.
    mixin = diffusers.SchedulerMixin
    return inspect.isclass(found) and issubclass(found, mixin) and found is not mixin


def _can_flow(name: str) -> bool:
    # Sana names DPMSolverMultistepScheduler, which supports both kinds by configuration.
    options = inspect.signature(getattr(diffusers, name).__init__).parameters
    return name.startswith(_ALWAYS_FLOW) or "use_flow_sigmas" in options


def _is_flow(scheduler: Any) -> bool:
    if type(scheduler).__name__.startswith(_ALWAYS_FLOW):
        return True
    config = config_of(scheduler)
    return config.get("prediction_type") == "flow_prediction" and bool(
        config.get("use_flow_sigmas")
    )
