"""The runner of the daemon: cheap to create; `load` imports the libraries and loads the model."""

from collections.abc import Hashable, Sequence
from typing import Protocol

import structlog

from consumer.ports.model import ModelDescription, ModelUnavailable, RunnerOutput, RunRequest
from consumer.runners import libraries
from consumer.runners.config import ModelConfig
from consumer.runners.task_settings import runner_spec
from generation_contracts import Request, Task

log = structlog.get_logger()


class LoadedModel(Protocol):
    """A loaded model, as returned by `load(config)` of the module of each task."""

    @property
    def description(self) -> ModelDescription:
        """The model and the parameters that it accepts."""

    def check(self, request: Request) -> None:
        """See `consumer.ports.model.Runner.check`."""

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool
    ) -> Sequence[RunnerOutput | None]:
        """See `consumer.ports.model.Runner.run`."""

    def batch_key(self, request: Request) -> Hashable | None:
        """See `consumer.ports.model.Runner.batch_key`."""

    def close(self) -> None:
        """Release the device memory of the weights."""


class ModelRunner:
    """A `consumer.ports.model.Runner`. All methods but `check` run in the inference thread.

    Args:
        task: The task of the model.
        config: The model and its options.
    """

    def __init__(self, task: Task, config: ModelConfig) -> None:
        self._task = task
        self._config = config
        self._model: LoadedModel | None = None

    def load(self) -> ModelDescription:
        """Import the libraries, load the weights and, if an option needs it, make a probe run.

        Raises:
            ModelUnavailable: The message is one line without a path.
        """
        model: LoadedModel = libraries.import_frozen(runner_spec(self._task).module).load(
            self._config
        )
        from consumer.runners import first_run, options

        if settings := options.options_needing_probe(self._config):
            first_run.run_once(model, self._task, settings)
        self._model = model
        log.info("model_loaded", **model.description.info.model_dump())
        return model.description

    def check(self, request: Request) -> None:
        """Validate a request against the model, without running it. Any thread may call this.

        Raises:
            UnsupportedParameter: Names the field.
        """
        self._loaded().check(request)

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool = False
    ) -> Sequence[RunnerOutput | None]:
        """Run the model once; see `consumer.ports.model.Runner.run`."""
        return self._loaded().run(runs, save_memory=save_memory)

    def batch_key(self, request: Request) -> Hashable | None:
        """Return a key that is equal for requests of one batch; None: the request runs alone."""
        return self._loaded().batch_key(request)

    def close(self) -> None:
        """Release the weights; a second call has no effect."""
        model, self._model = self._model, None
        if model is not None:
            model.close()

    def _loaded(self) -> LoadedModel:
        if self._model is None:
            raise ModelUnavailable("no model is loaded")
        return self._model
