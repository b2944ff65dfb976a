"""The runner that the daemon holds: cheap to make, it imports and loads everything in `load`."""

from collections.abc import Hashable, Sequence
from typing import Protocol

import structlog

from consumer.ports.model import ModelDescription, ModelUnavailable, RunnerOutput, RunRequest
from consumer.runners import libraries
from consumer.runners.config import ModelConfig
from generation_contracts import Request, Task

log = structlog.get_logger()

_MODULES = {
    Task.TEXT_TO_IMAGE: "consumer.runners.text_to_image.diffusion",
    Task.IMAGE_TO_TEXT: "consumer.runners.image_to_text.vision_language",
}


class LoadedModel(Protocol):
    """What a module of `_MODULES` makes with its `load(config)`."""

    @property
    def description(self) -> ModelDescription:
        """What the model is and takes."""

    def check(self, request: Request) -> None:
        """See `consumer.ports.model.Runner.check`."""

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool
    ) -> Sequence[RunnerOutput | None]:
        """See `consumer.ports.model.Runner.run`."""

    def batch_key(self, request: Request) -> Hashable | None:
        """See `consumer.ports.model.Runner.batch_key`."""

    def close(self) -> None:
        """Give the device's memory back."""


class ModelRunner:
    """A `consumer.ports.model.Runner`, called in the inference thread but for `check`.

    Args:
        task: Decides which kind of model it is.
        config: Which model, and how it is loaded.
    """

    def __init__(self, task: Task, config: ModelConfig) -> None:
        self._task = task
        self._config = config
        self._model: LoadedModel | None = None

    def load(self) -> ModelDescription:
        """Import the libraries, load the weights and, where an option wants it, run once.

        Raises:
            ModelUnavailable: With one clear line that has no path in it.
        """
        model: LoadedModel = libraries.import_with_all(_MODULES[self._task]).load(self._config)
        from consumer.runners import first_run, options

        if settings := options.options_needing_probe(self._config):
            first_run.run_once(model, self._task, settings)
        self._model = model
        log.info("model_loaded", **model.description.info.model_dump())
        return model.description

    def check(self, request: Request) -> None:
        """See whether the model can do what is asked, without running it; in any thread.

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
        """What requests have in common that can run as one; None: it runs alone."""
        return self._loaded().batch_key(request)

    def close(self) -> None:
        """Let go of the weights; once more is no fault."""
        model, self._model = self._model, None
        if model is not None:
            model.close()

    def _loaded(self) -> LoadedModel:
        if self._model is None:
            raise ModelUnavailable("no model is loaded")
        return self._model
