"""Schedulers of a pipeline: which ones its weights can be run with, and where their noise is from.

A pipeline takes any scheduler from its folder without a check. One of another kind makes noise
that looks like a result, or fails at the first step of every request.
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

# Classes that step along the straight way from noise to image, with any configuration.
_ALWAYS_FLOW = ("FlowMatch", "FlowMap", "LTXEulerAncestralRF")

_INVERSE = "InverseScheduler"  # ending of the classes that turn an image into noise

# Its seed is drawn from torch's global generator, or is the same for all requests.
_WITHOUT_GENERATOR = "DPMSolverSDEScheduler"

_MOST_OF_THE_LEAST = 4  # steps: PNDM's first ones are of another method and need four

# What `set_timesteps` raises for too few steps, or without an argument that a pipeline passes.
_SET_TIMESTEPS_FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

# Values that every class named in a pipeline's signature reads; with another one, only a run shows
# whether the class reads it.
_USUAL = {
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
}


def require_generator(index: Mapping[str, Any], name: str) -> None:
    """Refuse a scheduler whose noise does not depend on the seed of a request.

    Args:
        index: The pipeline's model_index.json.
        name: What to call the pipeline.

    Raises:
        ModelUnavailable: Names the scheduler.
    """
    entry = index.get("scheduler")
    scheduler = entry[-1] if isinstance(entry, list) and entry else None
    if scheduler == _WITHOUT_GENERATOR:
        raise ModelUnavailable(f"{name}: {scheduler} draws noise that no seed of a request decides")


def require_kind(pipe: Any, name: str) -> None:
    """Refuse a scheduler for another kind of weights than the pipeline's.

    Args:
        pipe: The pipeline, loaded.
        name: What to call the pipeline.

    Raises:
        ModelUnavailable: Names the scheduler and the kind that is needed.
    """
    scheduler: Any = getattr(pipe, "scheduler", None)
    named = _named_by(type(pipe))
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
    """Whether the weights of a pipeline's class are made for flow matching."""
    return _named_by(pipeline) == {_FLOW}


def is_unusual(pipe: Any) -> bool:
    """Whether only a run can show that the pipeline works with its scheduler.

    That is so for a class that the pipeline's signature does not name, and for a class with a value
    in its configuration that it may not read.
    """
    scheduler: Any = getattr(pipe, "scheduler", None)
    named = _named_by(type(pipe))
    if scheduler is None or not named:
        return False
    config = config_of(scheduler)
    return type(scheduler).__name__ not in named or any(
        config.get(key, values[0]) not in values for key, values in _USUAL.items()
    )


def least_steps(scheduler: Any) -> int:
    """The fewest steps that a scheduler can make; 1 where only a run could show it."""
    # With shift_terminal, a schedule of one step divides 0 by 0.
    if config_of(scheduler).get("shift_terminal"):
        return 2
    for steps in range(1, _MOST_OF_THE_LEAST + 1):
        try:
            scheduler.from_config(scheduler.config).set_timesteps(steps)
        except _SET_TIMESTEPS_FAILURES:
            continue
        return steps
    return 1


def fresh_scheduler(shared: Any, generators: Sequence[torch.Generator]) -> Any:
    """A scheduler for one run, whose noise comes from the generators of the images.

    Many pipelines do not pass their generators to `step`: a scheduler that adds noise would then
    take it from torch's global generator, another one for each run.

    Args:
        shared: The scheduler of the pipeline; not changed.
        generators: One for each image of the run.
    """
    scheduler = shared.from_config(shared.config)
    if "generator" in inspect.signature(scheduler.step).parameters:
        # A subclass, not an attribute that refers to the object: such a cycle would keep
        # the tensors of the run until the garbage collector comes.
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


def _named_by(pipeline: type[Any]) -> frozenset[str]:
    """The scheduler classes in the signature of a pipeline; empty where it names none."""
    hint = get_type_hints(pipeline.__init__).get("scheduler")
    classes = get_args(hint) or (hint,)
    names = {c.__name__ for c in classes if inspect.isclass(c)}
    if KarrasDiffusionSchedulers.__name__ in names:
        names |= {member.name for member in KarrasDiffusionSchedulers}
    return frozenset(n for n in names if _is_scheduler(getattr(diffusers, n, None)))


def _is_scheduler(found: Any) -> bool:
    # SchedulerMixin itself stands for any class.
    mixin = diffusers.SchedulerMixin
    return inspect.isclass(found) and issubclass(found, mixin) and found is not mixin


def _can_flow(name: str) -> bool:
    # Sana names DPMSolverMultistepScheduler, whose configuration is for either kind of weights.
    options = inspect.signature(getattr(diffusers, name).__init__).parameters
    return name.startswith(_ALWAYS_FLOW) or "use_flow_sigmas" in options


def _is_flow(scheduler: Any) -> bool:
    if type(scheduler).__name__.startswith(_ALWAYS_FLOW):
        return True
    config = config_of(scheduler)
    return config.get("prediction_type") == "flow_prediction" and bool(
        config.get("use_flow_sigmas")
    )
