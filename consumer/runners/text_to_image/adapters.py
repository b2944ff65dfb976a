"""LoRA adapters: named in the settings, loaded with the model, switched on for single jobs.

A request names an adapter, never a file or a model of the hub. An adapter that is loaded and not
in use changes nothing: its layers then call the model's own and add nothing, so the pictures are
the same to the byte. That holds for weights in 4 and 8 bits and for GGUF as well (tried on a CPU).
"""

# mypy: allow-untyped-calls

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
from diffusers.loaders.lora_base import LoraBaseMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open

from consumer.ports import ModelUnavailable
from consumer.runners.config import ModelConfig
from consumer.runners.faults import load_failure
from consumer.runners.text_to_image.pipeline_loading import modules
from generation_contracts.requests import AdapterName

SETTING = "MODEL_ADAPTERS"

log = structlog.get_logger()

_NAME: TypeAdapter[str] = TypeAdapter(AdapterName)
# The first of the two matrices that an adapter has for a layer, as the trainers call it.
_MATRIX = re.compile(r"\.(lora_A|lora_down|lora\.down|lora_linear_layer\.down)\.weight$")


def find_adapters(config: ModelConfig) -> dict[str, Path]:
    """The files of the configured adapters, by name; nothing is loaded yet.

    Raises:
        ModelUnavailable: A file is not there, or adapters do not go with another setting.
    """
    if not config.adapters:
        return {}
    if config.device_map != "none":
        raise ModelUnavailable(
            f"{SETTING}, MODEL_DEVICE_MAP: not tried together; set one of the two"
        )
    if config.quantization == "torchao-int4":
        raise ModelUnavailable(f"{SETTING}, MODEL_QUANTIZATION: peft cannot add to torchao-int4")
    return {name: _file(name, place) for name, place in config.adapters.items()}


class Adapters:
    """The adapters of one pipeline. None is in use, but for the time of `active`.

    Args:
        pipe: The pipeline that all runs share; the adapters are loaded into it.
        files: As `find_adapters` gives them.

    Raises:
        ModelUnavailable: The pipeline takes no adapters, or not one of these.
    """

    def __init__(self, pipe: Any, files: Mapping[str, Path]) -> None:
        self._pipe = pipe
        if not files:
            return
        if not isinstance(pipe, LoraBaseMixin):
            family = type(pipe).__name__.removesuffix("Pipeline")
            raise ModelUnavailable(f"{SETTING}: {family} takes no LoRA adapters")
        for name, file in files.items():
            _load(pipe, name, file)
            pipe.disable_lora()

    @contextmanager
    def active(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Have adapters in use; afterwards none is, whatever happened.

        Must be entered in inference mode: moving weights in it, as offloading does, makes them
        tensors that can be switched nowhere else.

        Args:
            weights: By name; 1 is the adapter as it was made, 0 is without it.
        """
        # In one order, whatever the request's is: sums of floats depend on it in the last bit.
        wanted = {name: weight for name, weight in sorted(weights.items()) if weight}
        if not wanted:
            yield
            return
        try:
            self._pipe.enable_lora()
            self._pipe.set_adapters([*wanted], [*wanted.values()])
            yield
        finally:
            self._pipe.disable_lora()


def _file(name: str, place: str) -> Path:
    try:
        _NAME.validate_python(name)
    except ValidationError:
        raise ModelUnavailable(
            f"{SETTING}: {name!r} is no name: up to 64 letters, digits, - and _"
        ) from None
    # Not resolved: in the hub's cache the file is a link to one whose name does not tell its kind.
    file = Path(place).expanduser().absolute()
    if file.is_dir():
        files = sorted(file.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelUnavailable(
                f"{SETTING}: {name}: its folder has {len(files)} .safetensors files instead of one"
            )
        return files[0]
    if file.suffix != ".safetensors" or not file.is_file():
        raise ModelUnavailable(f"{SETTING}: {name}: there is no such folder or .safetensors file")
    return file


def _load(pipe: Any, name: str, file: Path) -> None:
    before = _weights(pipe)
    failure: ModelUnavailable | None = None
    layers = 0
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="peft")  # that there is more than one adapter
            pipe.load_lora_weights(
                str(file.parent),
                weight_name=file.name,
                adapter_name=name,
                use_safetensors=True,
                local_files_only=True,
            )
            layers = _layers(pipe, name)
            if layers:
                pipe.set_adapters([name])  # fails where diffusers cannot scale them
    except Exception as error:  # noqa: BLE001 - the libraries raise dozens of kinds
        failure = load_failure(error, name=f"{SETTING}: {name}", folder=file.parent)
    if failure is not None:
        raise failure
    if not layers:
        raise ModelUnavailable(f"{SETTING}: {name}: none of its weights are for this model")
    if _changed(before, _weights(pipe)):
        raise ModelUnavailable(f"{SETTING}: {name}: it would change the model for all requests")
    matrices = _matrices(file)
    if layers < matrices:
        log.warning("adapter_loaded_in_part", adapter=name, layers=layers, of=matrices)
    else:
        log.info("adapter_loaded", adapter=name, layers=layers)


def _weights(pipe: Any) -> dict[str, tuple[Any, Any, int]]:
    """All weights by name, with their shapes and a number that changes when they are written to."""
    return {
        f"{part}.{name.replace('.base_layer', '')}": (weight, weight.shape, weight._version)  # noqa: SLF001
        for part, module in modules(pipe)
        for name, weight in module.named_parameters()
    }


def _changed(
    before: Mapping[str, tuple[Any, Any, int]], after: Mapping[str, tuple[Any, Any, int]]
) -> bool:
    # The adapters of FLUX.1's control models replace norms and widen a layer; nothing is told, and
    # `disable_lora` does not undo it. An offloaded weight is another tensor after loading.
    for name, (weight, shape, version) in before.items():
        now, shape_now, version_now = after.get(name, (None, None, 0))
        if shape_now != shape or (now is weight and version_now != version):
            return True
    return False


def _layers(pipe: Any, name: str) -> int:
    return sum(
        isinstance(layer, BaseTunerLayer)
        and any(name in getattr(layer, kind, ()) for kind in layer.adapter_layer_names)
        for _, module in modules(pipe)
        for layer in module.modules()
    )


def _matrices(file: Path) -> int:
    with safe_open(file, framework="pt") as weights:
        return sum(bool(_MATRIX.search(key)) for key in weights.keys())  # noqa: SIM118 - no mapping
