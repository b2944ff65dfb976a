"""Loads the runner that MODEL_RUNNER names, and calls it as the inference thread calls a model."""

import copy
import inspect
import json
from collections.abc import Callable, Hashable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel, ValidationError

from consumer.ports.model import (
    Interrupted,
    ModelDescription,
    ModelMisconfigured,
    RunnerOutput,
    RunRequest,
    UnsupportedParameter,
)
from consumer.runners.config import ModelConfig
from consumer.runners.custom.outputs import generated
from consumer.runners.custom.run_context import RunContext
from consumer.runners.custom.spec import add_working_directory
from consumer.runners.device import place, release
from consumer.runners.faults import BadOutput, load_failure, translate_failures
from generation_contracts import CustomRequest, ModelInfo, Request
from generation_contracts.schema import json_schemas
from generation_runner import Cancelled, Runner

SETTING = "MODEL_RUNNER"
_PARAMETERS = frozenset({"parameters", "images"})


def load(config: ModelConfig) -> "CustomModel":
    """Import, create and load the runner.

    Raises:
        ModelMisconfigured: There is no such class, or it breaks the rules of `Runner`.
        ModelUnavailable: Its constructor or `load` has raised.
    """
    runner_class = _class(config.runner)
    placement = place(config)
    name = runner_class.name or runner_class.__name__
    runner: Runner[Any] | None = None
    try:
        runner = runner_class()
        runner.load(placement.device.type)
    except Exception as error:  # noqa: BLE001 - code of the operator
        failure = load_failure(error, name=name)
        if runner is not None:
            _close(runner)
    else:
        info = ModelInfo(
            id=name,
            revision=runner_class.version or None,
            family=config.runner,
            dtype="none",
            device=placement.device.type,
            libraries=_libraries(runner_class),
        )
        return CustomModel(runner, info, lambda: release(placement.device))
    raise failure


class CustomModel:
    """A loaded runner; see `consumer.ports.model.Runner` for the contract of its methods.

    Args:
        runner: The runner; its `load` has returned.
        info: Identifies it in events.
        free: Frees the device memory of a failed run.
    """

    def __init__(self, runner: Runner[Any], info: ModelInfo, free: Callable[[], None]) -> None:
        self._runner = runner
        self._free = free
        self._description = ModelDescription(
            info=info, parameters=_PARAMETERS, defaults={}, request_schema=_schema(runner)
        )

    @property
    def description(self) -> ModelDescription:
        """The runner and its parameters."""
        return self._description

    def check(self, request: Request) -> None:
        """Validate the parameters and the number of images."""
        self._validated(request)
        given = len(getattr(request, "images", None) or ())
        least, most = self._runner.min_images, self._runner.max_images
        if not least <= given <= most:
            takes = str(least) if least == most else f"{least} to {most}"
            raise UnsupportedParameter("images", f"images: this runner takes {takes}")

    def batch_key(self, request: Request) -> Hashable | None:
        """Return the key of the runner, which the operator may have left out."""
        return self._runner.batch_key(self._validated(request))

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool
    ) -> Sequence[RunnerOutput | None]:
        """Run the runner; `save_memory` changes nothing, because runners have no such options."""
        del save_memory
        return translate_failures(lambda: self._run(runs), free=self._free)

    def close(self) -> None:
        """Close the runner."""
        _close(self._runner)

    def _run(self, runs: Sequence[RunRequest]) -> Sequence[RunnerOutput | None]:
        parameters = [self._validated(run.request) for run in runs]
        contexts = [RunContext(run, raises=len(runs) == 1) for run in runs]
        try:
            if len(runs) == 1:
                made: list[Any] = [self._runner.run(parameters[0], contexts[0])]
            else:
                made = list(self._runner.run_batch(parameters, contexts))
        except Cancelled:
            raise Interrupted from None
        if len(made) != len(runs):
            raise BadOutput("run_batch returned another number of outputs")
        if all(context.cancelled for context in contexts):
            raise Interrupted
        return [
            None if context.cancelled else generated(each, context)
            for each, context in zip(made, contexts, strict=True)
        ]

    def _validated(self, request: Request) -> BaseModel:
        given: dict[str, Any] = getattr(request, "parameters", {})
        try:
            # Strict as the contract: "2" is not a number.
            return self._runner.parameters.model_validate_json(json.dumps(given), strict=True)
        except ValidationError as error:
            detail = error.errors(include_input=False, include_url=False, include_context=False)[0]
            place = ".".join(["parameters", *(str(part) for part in detail["loc"])])
            unknown = detail["type"] == "extra_forbidden"
            problem = "there is no such parameter" if unknown else detail["msg"]
            text = f"{place}: {problem[0].lower()}{problem[1:]}"
            raise UnsupportedParameter(_printable(place), _printable(text)) from None


def _class(setting: str) -> type[Runner[Any]]:
    add_working_directory()
    module, _, name = setting.partition(":")
    try:
        found = getattr(import_module(module), name, None)
    except Exception as error:  # noqa: BLE001 - code of the operator
        failure = load_failure(error, name=SETTING)
    else:
        if not (isinstance(found, type) and issubclass(found, Runner)):
            raise ModelMisconfigured(
                f"{SETTING}: {module} has no class {name} that is a generation_runner.Runner"
            )
        if inspect.isabstract(found):
            raise ModelMisconfigured(f"{SETTING}: {name} has no method run")
        if not 0 <= found.min_images <= found.max_images:
            raise ModelMisconfigured(f"{SETTING}: {name}: min_images is above max_images")
        return found
    raise failure


def _close(runner: Runner[Any]) -> None:
    try:
        runner.close()
    except Exception as error:  # noqa: BLE001 - code of the operator
        load_failure(error, name=f"{SETTING}: close")


def _schema(runner: Runner[Any]) -> dict[str, Any]:
    """Return the JSON Schema of a request, with the parameters of the runner."""
    schema = copy.deepcopy(json_schemas()[CustomRequest.__name__])
    schema["properties"]["parameters"] = runner.parameters.model_json_schema()
    schema.pop("examples", None)
    return schema


def _libraries(runner_class: type[Runner[Any]]) -> dict[str, str] | None:
    """Return the version of the distribution that the runner comes from, if it is one."""
    name = runner_class.__module__.partition(".")[0].replace("_", "-")
    try:
        return {name: version(name)}
    except PackageNotFoundError:
        return None


def _printable(text: str) -> str:
    return "".join(c for c in text if c.isprintable())[:300]
