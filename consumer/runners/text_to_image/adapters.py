"""LoRA adapters: named in the settings, loaded with the model, switched on for single jobs.

A request names an adapter, never a file or a model of the hub. An adapter that is loaded and not
in use changes nothing: its layers then call the model's own and add nothing, so the images are
the same to the byte. That holds for weights in 4 and 8 bits and for GGUF as well (tried on a CPU).
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

from consumer.ports.model import ModelUnavailable
from consumer.runners.faults import load_failure
from consumer.runners.text_to_image.adapter_conversion import counted_conversion
from consumer.runners.text_to_image.adapter_files import SETTING, keys_of, require_loadable
from consumer.runners.text_to_image.pipeline_loading import modules

log = structlog.get_logger()


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
        self._in_part: dict[str, str] = {}  # warnings for senders, by adapter
        if not files:
            return
        if not isinstance(pipe, LoraBaseMixin):
            family = type(pipe).__name__.removesuffix("Pipeline")
            raise ModelUnavailable(f"{SETTING}: {family} takes no LoRA adapters")
        for name, file in files.items():
            layers, of = _load(pipe, name, file)
            pipe.disable_lora()
            if layers < of:
                self._in_part[name] = f"{layers} of its {of} layers are for this model"

    def warnings(self, weights: Mapping[str, float]) -> tuple[str, ...]:
        """One sentence for each adapter in use of which the model took only a part.

        Args:
            weights: As `active` is given them.
        """
        used = sorted(name for name, weight in weights.items() if weight and name in self._in_part)
        return tuple(f"adapter {name}: {self._in_part[name]}" for name in used)

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


def _load(pipe: Any, name: str, file: Path) -> tuple[int, int]:
    """Load an adapter; how many layers it has in the model, and how many it has in its file."""
    before = _weights(pipe)
    reason = ""
    failure: ModelUnavailable | None = None
    layers = of = 0
    try:
        require_loadable(keys_of(file))
        with warnings.catch_warnings(), counted_conversion(pipe, file) as layers_of_file:
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # of another adapter
            pipe.load_lora_weights(
                str(file.parent),
                adapter_name=name,
                weight_name=file.name,
                use_safetensors=True,
                local_files_only=True,
            )
            of = len(layers_of_file)
            layers = len(_tuned(pipe, name))
            if layers:
                pipe.set_adapters([name])  # fails where diffusers cannot scale them
    except ModelUnavailable as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001 - the libraries raise dozens of kinds
        failure = load_failure(error, name=f"{SETTING}: {name}", folder=file.parent)
    if failure is not None:
        raise failure
    reason = reason or _what_did_not_arrive(pipe, name)
    if not reason and _changed(before, _weights(pipe)):
        reason = "it would change the model for all requests"
    if reason:
        raise ModelUnavailable(f"{SETTING}: {name}: {reason}")
    if layers < of:
        log.warning("adapter_loaded_in_part", adapter=name, layers=layers, of=of)
    else:
        log.info("adapter_loaded", adapter=name, layers=layers)
    return layers, of


def _what_did_not_arrive(pipe: Any, name: str) -> str:
    """Why the adapter cannot be used: it has no layers here, or not all of their weights."""
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


def _tuned(pipe: Any, name: str) -> dict[str, Any]:
    """The layers that have the adapter, by their names."""
    return {
        f"{part}.{path}": layer
        for part, module in modules(pipe)
        for path, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer)
        and any(name in getattr(layer, kind, ()) for kind in layer.adapter_layer_names)
    }
