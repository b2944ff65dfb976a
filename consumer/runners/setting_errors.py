"""Wrong settings of a model, found without the import of torch, diffusers and transformers.

The import takes 10 s. What depends on the loaded model or on the device is checked after it.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from ctypes import CDLL
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from consumer.ports.model import ModelUnavailable
from consumer.runners.config import ModelConfig
from consumer.runners.defaults import checked_defaults
from consumer.runners.task_settings import others_with, runner_spec
from consumer.runners.text_to_image.adapter_files import find_adapters
from generation_contracts import TASKS, Task

QUANTIZATION_PACKAGES = {
    "bitsandbytes-4bit": "bitsandbytes",
    "bitsandbytes-8bit": "bitsandbytes",
    "torchao-int8": "torchao",
    "torchao-int4": "torchao",
    "gguf": "gguf",
}

_FOR_CLASSIFIERS = ("safety_labels", "safety_threshold")
_BY_LAYERS = {"sequential", "group"}  # offload modes that move single layers
_CHECKERS = "package.module:callable, a folder, or an id on the hub"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Builds of torch for CUDA, and for the CPU: `2.9.0+cu128`, `2.9.0` of the registry, `2.9.0+cpu`.
_CUDA_OR_CPU_BUILD = re.compile(r"[\d.]+(\+(cu\d+|cpu))?")


def find_setting_errors(task: Task, config: ModelConfig) -> list[str]:
    """Return one line for each wrong setting; each line begins with the settings' names.

    The lines may contain paths of the settings: they are for the operator.
    """
    spec = runner_spec(task)
    if not spec.loads_weights:
        return [
            *spec.setting_errors(config),
            *_device_errors(config),
            *_weight_errors(task, config),
        ]
    return [
        *_demonstration_errors(task, config),
        *model_id_errors(config),
        *_device_errors(config),
        *combination_errors(task, config),
        *_quantization_errors(config),
        *attention_errors(task, config.attention),
        *_refusals_of_defaults(task, config),
        *_adapter_errors(config),
        *checker_errors(config),
    ]


def _weight_errors(task: Task, config: ModelConfig) -> Iterator[str]:
    """Yield the settings about weights, for a task that loads none."""
    known = {"device", *runner_spec(task).settings}
    others = (each.name for each in fields(ModelConfig) if each.name not in known)
    if names := in_use(config, others):
        yield f"{', '.join(names)}: not for MODEL_TYPE={task}"


def _demonstration_errors(task: Task, config: ModelConfig) -> Iterator[str]:
    if not config.model_id and runner_spec(task).demonstration is None:
        yield f"MODEL_ID: must be set, there is no demonstration model for MODEL_TYPE={task}"


def model_id_errors(config: ModelConfig) -> Iterator[str]:
    """Yield what is wrong with MODEL_ID and MODEL_REVISION, if it can be known without the hub."""
    path = Path(config.model_id).expanduser()
    if path.is_file():
        yield (
            f"MODEL_ID: {path} is a file: a model is a folder with its configuration and weights, "
            "or an id on the hub"
        )
    elif config.revision is not None and path.is_dir():
        yield "MODEL_REVISION: only a model of the hub has revisions"
    elif config.model_id and not path.is_dir() and not _HUB_ID.fullmatch(config.model_id):
        yield f"MODEL_ID: there is no folder {path}"


def combination_errors(task: Task, config: ModelConfig) -> Iterator[str]:
    """Yield settings that contradict each other or the task."""
    yield from _task_errors(task, config)
    if config.device_map != "none":
        if config.offload != "none":
            yield (
                "MODEL_DEVICE_MAP, MODEL_OFFLOAD: parts on several GPUs stay there; set one of them"
            )
        if config.quantization != "none" and runner_spec(task).is_pipeline:
            yield (
                "MODEL_DEVICE_MAP, MODEL_QUANTIZATION: not compatible for a pipeline; "
                "set one of them"
            )
    if config.quantization != "none" and config.offload in _BY_LAYERS:
        # accelerate cannot split weights of torchao and GGUF, and group offloading of bitsandbytes
        # weights is not documented to work.
        yield (
            "MODEL_QUANTIZATION, MODEL_OFFLOAD: quantized weights are moved as whole parts only; "
            "take none or model"
        )
    if config.quantization == "torchao-int4" and config.offload == "model":
        yield "MODEL_QUANTIZATION, MODEL_OFFLOAD: torchao-int4 stays on its device; take none"
    if config.compile and config.offload in _BY_LAYERS:
        yield (
            "MODEL_COMPILE, MODEL_OFFLOAD: the weights of compiled blocks stay in them; "
            "take none or model"
        )
    if config.compile and config.adapters:
        # Each change of adapters would recompile the blocks during a job.
        yield "MODEL_COMPILE, MODEL_ADAPTERS: each change of adapters would recompile; set one"


def in_use(config: ModelConfig, fields: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the settings among `fields` that differ from their defaults."""
    unset = ModelConfig()
    return tuple(
        "MODEL_ID" if field == "model_id" else f"MODEL_{field.upper()}"
        for field in fields
        if getattr(config, field) != getattr(unset, field)
    )


def attention_errors(task: Task, name: str) -> Iterator[str]:
    """Yield what is wrong with MODEL_ATTENTION."""
    backends = runner_spec(task).attention
    if name and name not in backends:
        yield f"MODEL_ATTENTION: must be one of {', '.join(backends)}"


def checker_errors(config: ModelConfig) -> Iterator[str]:
    """Yield what is wrong with the safety checker, without running code of its package."""
    setting = config.safety_checker
    if setting and ":" not in setting:
        yield from _classifier_errors(setting)
        if not config.safety_labels:
            yield "MODEL_SAFETY_LABELS: without a label the classifier would flag nothing"
        return
    if unused := in_use(config, _FOR_CLASSIFIERS):
        yield f"{', '.join(unused)}: only for a classifier as MODEL_SAFETY_CHECKER"
    if not setting:
        return
    module, _, name = setting.partition(":")
    parts = [*module.split("."), *name.split(".")]
    if not all(part.isidentifier() for part in parts):
        yield f"MODEL_SAFETY_CHECKER: must be {_CHECKERS}"
    elif find_spec(parts[0]) is None:
        yield f"MODEL_SAFETY_CHECKER: there is no module {parts[0]}"


def _classifier_errors(setting: str) -> Iterator[str]:
    path = Path(setting).expanduser()
    if path.is_file():
        yield f"MODEL_SAFETY_CHECKER: {path} is a file: must be {_CHECKERS}"
    elif path.is_absolute() and not path.is_dir():
        yield f"MODEL_SAFETY_CHECKER: there is no folder {path}"
    elif not path.is_dir() and ("/" not in setting or not _HUB_ID.fullmatch(setting)):
        yield f"MODEL_SAFETY_CHECKER: must be {_CHECKERS}"


def _task_errors(task: Task, config: ModelConfig) -> Iterator[str]:
    spec = runner_spec(task)
    if not spec.is_pipeline:
        if config.offload == "group":
            yield "MODEL_OFFLOAD: group is for pipelines; take model or sequential"
        if config.quantization == "gguf":
            pipelines = [each for each in TASKS if runner_spec(each).is_pipeline]
            yield f"MODEL_QUANTIZATION: gguf is only for MODEL_TYPE={', '.join(pipelines)}"
    foreign: dict[tuple[Task, ...], list[str]] = {}
    for setting in (each.name for each in fields(ModelConfig)):
        others = () if setting in spec.settings else others_with(setting, task)
        if others:
            foreign.setdefault(others, []).extend(in_use(config, [setting]))
    for others, names in foreign.items():
        if names:
            yield f"{', '.join(names)}: only for MODEL_TYPE={', '.join(others)}"


def _device_errors(config: ModelConfig) -> Iterator[str]:
    """Yield a device that this process cannot have, as far as the system alone shows it."""
    if config.device == "cuda" and not _may_have_cuda():
        yield "MODEL_DEVICE: there is no cuda device: torch or this machine is without CUDA"
    if config.device == "mps" and sys.platform != "darwin":
        yield "MODEL_DEVICE: mps is the device of macOS"
    if config.device == "cpu" and config.offload != "none":
        yield "MODEL_OFFLOAD: the device is cpu, there is nothing to offload from"
    if config.device in {"cpu", "mps"} and config.device_map != "none":
        yield f"MODEL_DEVICE_MAP: needs the device cuda, this one is {config.device}"


def _may_have_cuda() -> bool:
    """Return False if torch can have no CUDA device: its build or the system has no driver."""
    if sys.platform == "darwin":
        return False
    try:
        build = _CUDA_OR_CPU_BUILD.fullmatch(version("torch"))
    except PackageNotFoundError:
        return True
    if build is None or sys.platform != "linux":
        return True  # for example ROCm, whose device is named cuda too
    if build[2] == "cpu":
        return False
    try:
        CDLL("libcuda.so.1")  # the driver's library; loading it does not initialize the device
    except OSError:
        return False
    return True


def _quantization_errors(config: ModelConfig) -> Iterator[str]:
    if config.quantization == "none":
        return
    package = QUANTIZATION_PACKAGES[config.quantization]
    if find_spec(package) is None:
        yield f"MODEL_QUANTIZATION: the package {package} is not installed"
    if config.quantization == "gguf" and not Path(config.model_id or "?").expanduser().is_dir():
        yield "MODEL_QUANTIZATION, MODEL_ID: gguf needs a folder with the model"


def _refusals_of_defaults(task: Task, config: ModelConfig) -> Iterator[str]:
    try:
        checked_defaults(TASKS[task].parameters, config.defaults)
    except ModelUnavailable as error:
        yield str(error)


def _adapter_errors(config: ModelConfig) -> Iterator[str]:
    for name, path in config.adapters.items():
        try:
            find_adapters(replace(config, adapters={name: path}))
        except ModelUnavailable as error:
            yield str(error)
