"""LoRA adapters: named in the settings, loaded with the model, activated for single runs.

A request names an adapter, never a file or a model of the hub. A loaded adapter that is not active
changes no byte of an image, because its layers then only call the layers of the model. That also
holds for weights in 4 and 8 bits and for GGUF (tested on a CPU).
"""

# mypy: allow-untyped-calls

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from peft.tuners.tuners_utils import BaseTunerLayer

from consumer.ports.model import ModelMisconfigured, ModelUnavailable
from consumer.runners.faults import load_failure
from consumer.runners.text_to_image.adapter_conversion import counted_conversion
from consumer.runners.text_to_image.adapter_files import SETTING, keys_of, require_loadable
from consumer.runners.text_to_image.pipeline_loading import modules

log = structlog.get_logger()


class Adapters:
    """The adapters of one pipeline. They are active only inside the context `active`.

    Args:
        pipe: The pipeline that all runs share; the adapters are loaded into it.
        files: The adapters' files by name, from `find_adapters`.

    Raises:
        ModelUnavailable: The pipeline does not support adapters, or an adapter does not fit.
    """

    def __init__(self, pipe: Any, files: Mapping[str, Path]) -> None:
        self._pipe = pipe
        self._partial: dict[str, str] = {}  # warnings for senders, by adapter
        if not files:
            return
        if not isinstance(pipe, LoraBaseMixin):
            family = type(pipe).__name__.removesuffix("Pipeline")
            raise ModelMisconfigured(f"{SETTING}: {family} takes no LoRA adapters")
        for name, file in files.items():
            layers, in_file = _load(pipe, name, file)
            pipe.disable_lora()
            if layers < in_file:
                self._partial[name] = f"{layers} of its {in_file} layers are for this model"

    def warnings(self, weights: Mapping[str, float]) -> tuple[str, ...]:
        """Return a warning for each active adapter of which the model has only some layers.

        Args:
            weights: As passed to `active`.
        """
        used = sorted(name for name, weight in weights.items() if weight and name in self._partial)
        return tuple(f"adapter {name}: {self._partial[name]}" for name in used)

    @contextmanager
    def active(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Activate adapters for the time of the context, also if the context raises.

        Must be entered in inference mode: offloading moves weights in it, which makes them
        inference tensors, and adapters on such tensors can be switched only in inference mode.

        Args:
            weights: Adapter weight by name; 1 is the adapter as it was trained, 0 is without it.
        """
        # Sorted, because the order of a floating-point sum affects its last bit.
        nonzero = {name: weight for name, weight in sorted(weights.items()) if weight}
        if not nonzero:
            yield
            return
        try:
            self._pipe.enable_lora()
            self._pipe.set_adapters([*nonzero], [*nonzero.values()])
            yield
        finally:
            self._pipe.disable_lora()


def _load(pipe: Any, name: str, file: Path) -> tuple[int, int]:
    """Load an adapter; return the number of its layers in the model, and in its file.

    Raises:
        ModelUnavailable: The adapter does not fit, or would change the model.
    """
    before = _weights(pipe)
    reason = ""
    failure: ModelUnavailable | None = None
    layers = in_file = 0
    try:
        require_loadable(keys_of(file))
        with warnings.catch_warnings(), counted_conversion(pipe, file) as layers_of_file:
            # Given for each adapter after the first.
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            pipe.load_lora_weights(
                str(file.parent),
                adapter_name=name,
                weight_name=file.name,
                use_safetensors=True,
                local_files_only=True,
            )
            in_file = len(layers_of_file)
            layers = len(_tuned(pipe, name))
            if layers:
                pipe.set_adapters([name])  # raises if diffusers cannot scale the layers
    except ModelUnavailable as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001 - the libraries raise dozens of kinds
        failure = load_failure(error, name=f"{SETTING}: {name}", folder=file.parent)
    if failure is not None:
        raise failure
    reason = reason or _missing_weights(pipe, name)
    if not reason and _changed(before, _weights(pipe)):
        reason = "it would change the model for all requests"
    if reason:
        raise ModelMisconfigured(f"{SETTING}: {name}: {reason}")
    if layers < in_file:
        log.warning("adapter_loaded_in_part", adapter=name, layers=layers, of=in_file)
    else:
        log.info("adapter_loaded", adapter=name, layers=layers)
    return layers, in_file


def _missing_weights(pipe: Any, name: str) -> str:
    """Return why a loaded adapter cannot be used: no layers, or weights missing or not finite."""
    tuned = _tuned(pipe, name)
    if not tuned:
        return "none of its weights are for this model"
    for layer, module in tuned.items():
        for weight, tensor in module.named_parameters():
            if name not in weight.split("."):
                continue
            # A weight that the file lacks stays on the meta device.
            if tensor.is_meta:
                return f"it lacks weights, such as {layer}.{weight}"
            if not torch.isfinite(tensor).all():
                return f"it has weights that are not numbers, such as {layer}.{weight}"
    return ""


def _weights(pipe: Any) -> dict[str, tuple[Any, Any, int]]:
    """Return all weights by name, each with its shape and its version.

    torch increments the version of a tensor at each in-place change.
    """
    return {
        f"{part}.{name.replace('.base_layer', '')}": (weight, weight.shape, weight._version)  # noqa: SLF001
        for part, module in modules(pipe)
        for name, weight in module.named_parameters()
    }


def _changed(
    before: Mapping[str, tuple[Any, Any, int]], after: Mapping[str, tuple[Any, Any, int]]
) -> bool:
    # Adapters of FLUX.1's control models silently replace norms and widen a layer, and
    # `disable_lora` does not undo it. An offloaded weight is a different tensor after loading.
    for name, (weight, shape, version) in before.items():
        now, shape_now, version_now = after.get(name, (None, None, 0))
        if shape_now != shape or (now is weight and version_now != version):
            return True
    return False


def _tuned(pipe: Any, name: str) -> dict[str, Any]:
    """Return the layers that have the adapter, by their names."""
    return {
        f"{part}.{path}": layer
        for part, module in modules(pipe)
        for path, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer)
        and any(name in getattr(layer, kind, ()) for kind in layer.adapter_layer_names)
    }
