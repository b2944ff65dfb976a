"""Runners: the loaded models. The only package that imports torch, diffusers and transformers.

Importing this package is cheap. `ModelRunner.load` imports the libraries in the inference thread,
which takes 9 s and 780 MB for diffusers.
"""

import os
from dataclasses import replace

from consumer.runners.config import ModelConfig
from consumer.runners.demonstration.known_words import DemonstrationRunner
from consumer.runners.runner import ModelRunner
from consumer.runners.setting_errors import find_setting_errors
from consumer.runners.task_settings import runner_spec
from generation_contracts import Task

# The libraries read these when they are imported, so they must be set before. The first overrides
# even trust_remote_code=True: code that comes with a model is never run. The others turn off
# telemetry, and warnings about optional libraries during the import.
os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__all__ = ["ModelConfig", "ModelRunner", "create_runner", "find_setting_errors"]


def create_runner(task: Task, config: ModelConfig) -> ModelRunner:
    """Create a runner for a task; `load` loads the model."""
    best = runner_spec(task).demonstration
    if not config.model_id and best is not None:  # MODEL_DEFAULTS overrides the best settings
        defaults = {**best, **config.defaults}
        return DemonstrationRunner(task, replace(config, defaults=defaults))
    return ModelRunner(task, config)
