"""Runners: the loaded models. The only folder in which torch, diffusers or transformers appear.

Importing this package is cheap: the libraries, 9 s and 780 MB for diffusers, are imported by
`Runner.load`, in the inference thread.
"""

import os
from dataclasses import replace

from consumer.runners import demonstration
from consumer.runners.config import ModelConfig
from consumer.runners.runner import ModelRunner
from generation_contracts import Task

# All are read once, when the libraries are imported, so they must be set before. The first beats
# even trust_remote_code=True: no code that came with a model is ever run. The others: no telemetry,
# and no warnings while they are imported, of optional libraries that nobody asked for.
os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__all__ = ["ModelConfig", "ModelRunner", "create_runner"]


def create_runner(task: Task, config: ModelConfig) -> ModelRunner:
    """A runner for a task; nothing is loaded before its `load` is called."""
    if not config.model_id:  # the demonstration model, at its best where nobody says otherwise
        own = {**demonstration.DEFAULTS[task], **config.defaults}
        config = replace(config, defaults=own)
    return ModelRunner(task, config)
