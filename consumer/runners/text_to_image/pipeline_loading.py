"""Loading of a diffusers pipeline. Folders that load and then give wrong images are refused."""

# mypy: allow-untyped-calls

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_type_hints

import accelerate
import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from consumer.ports.model import ModelMisconfigured, ModelUnavailable
from consumer.runners import quantization, vocabulary
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement
from consumer.runners.faults import load_failure
from consumer.runners.source import Source
from consumer.runners.text_to_image import folder, pipeline_options, schedulers
from consumer.runners.weights import (
    direct_load_kwargs,
    require_all_weights,
    require_no_new_weights,
)

# Parameters that a pipeline's `__call__` must have.
_NEEDED = (
    "prompt",
    "width",
    "height",
    "num_inference_steps",
    "num_images_per_prompt",
    "generator",
    "output_type",
)
# Parameters of pipelines that need more than a text, or do not generate images.
_MORE_THAN_TEXT = (
    "strength",
    "mask_image",
    "control_image",
    "video",
    "num_frames",
    "video_length",
    "prior_num_inference_steps",  # two pipelines in one, whose schedulers would be shared
)
_GIVEN = {"self", "prompt", "width", "height"}  # parameters that are always passed

_DENOISERS = ("transformer", "unet")

STEP_CALLBACK = "callback_on_step_end"
OLD_STEP_CALLBACK = "callback"  # in PixArt, Amused and others


def download(model_id: str, revision: str | None, *, cached_only: bool) -> str:
    """Download a pipeline from the hub and return its folder.

    The index is downloaded and checked first, so that no weights of a wrong class are downloaded.
    """
    found: dict[str, Any] = {"revision": revision, "local_files_only": cached_only}
    index = DiffusionPipeline.load_config(model_id, **found)
    text_to_image_class(index, model_id)
    folder: str = DiffusionPipeline.download(model_id, use_safetensors=True, **found)
    return folder


def load_pipeline(source: Source, placement: Placement, config: ModelConfig) -> Any:
    """Load a text-to-image pipeline with its weights and options, on the configured device.

    Raises:
        ModelUnavailable: The pipeline or an option cannot be used; the message is one line.
    """
    index = _read_index(source)
    text_to_image_class(index, source.id)
    vocabulary.require_vocabulary_files(source.folder, index, source.id)
    folder.require_known_classes(index, source.id)
    schedulers.require_generator(index, source.id)
    pipeline_options.require_attention_backend(config)
    try:
        parts = quantization.denoiser_from_gguf(config, placement, source.folder, index)
        variants = folder.variants(source.folder, index, source.id)
        parts |= _text_models(source, index, variants, placement, config)
        pipe = _from_folder(source, index, parts, variants, placement=placement, config=config)
        for name, module in modules(pipe):
            require_all_weights(module, f"{source.id}: {name}")
        schedulers.require_kind(pipe, source.id)
        _distribute(pipe, parts)
        pipeline_options.apply(pipe, denoiser(pipe), placement, config)
    except ModelUnavailable:
        raise
    except Exception as error:  # noqa: BLE001 - the libraries raise dozens of kinds
        failure = load_failure(error, name=source.id, folder=source.folder)
    else:
        return pipe
    raise failure


def text_to_image_class(index: Mapping[str, Any], name: str) -> type[Any]:
    """Return the pipeline's class, if it generates images from a text alone.

    Raises:
        ModelUnavailable: The class does not, or it is not a class of diffusers.
    """
    class_name = index.get("_class_name")
    found = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if not (inspect.isclass(found) and issubclass(found, DiffusionPipeline)):
        raise ModelUnavailable(f"{name}: model_index.json names no pipeline class of diffusers")
    parameters = inspect.signature(found.__call__).parameters
    required = {
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind not in {p.VAR_KEYWORD, p.VAR_POSITIONAL}
    }
    if (
        not parameters.keys() >= set(_NEEDED)
        or not required <= _GIVEN
        or any(unwanted in parameters for unwanted in _MORE_THAN_TEXT)
        or parameters["output_type"].default != "pil"
        or ("image" in parameters and not _image_is_optional(found))
    ):
        raise ModelUnavailable(f"{name}: {class_name} does not generate images from a text alone")
    if not {STEP_CALLBACK, OLD_STEP_CALLBACK} & parameters.keys():
        raise ModelUnavailable(f"{name}: {class_name} has no callback at its steps")
    _require_matching_denoiser(found, index, name)
    return found


def modules(pipe: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the name and module of each part that has weights."""
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            yield name, part


def denoiser(pipe: Any) -> Any:
    """Return the part that runs at each step: the transformer or the UNet."""
    return getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)


def _image_is_optional(found: type[Any]) -> bool:
    # A signature does not distinguish an edit model from FLUX.2, where images are optional. The
    # mapping of diffusers does. It also contains ControlNet pipelines, which need an image.
    listed = diffusers.AutoPipelineForText2Image  # in the module of the mapping
    known = inspect.getmodule(listed).AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()  # type: ignore[union-attr]
    return found in known and "controlnet" not in inspect.signature(found.__init__).parameters


def _require_matching_denoiser(found: type[Any], index: Mapping[str, Any], name: str) -> None:
    """Refuse a denoiser of another class, for which diffusers only logs a warning.

    Text encoders and autoencoders are not checked, because other classes can work there.
    """
    for part, hint in get_type_hints(found.__init__).items():
        expected = tuple(c for c in get_args(hint) or (hint,) if inspect.isclass(c))
        entry = index.get(part)
        if (
            part not in _DENOISERS
            or not expected
            or not isinstance(entry, list)
            or entry[0] is None
        ):
            continue
        actual = getattr(diffusers, str(entry[-1]), None)
        if inspect.isclass(actual) and not issubclass(actual, expected):
            raise ModelUnavailable(
                f"{name}: {part} has the class {actual.__name__} instead of {expected[0].__name__}"
            )


def _read_index(source: Source) -> dict[str, Any]:
    try:
        index = json.loads((source.folder / "model_index.json").read_text())
    except FileNotFoundError:
        raise ModelUnavailable(f"{source.id}: there is no model_index.json in it") from None
    except (OSError, ValueError):
        raise ModelUnavailable(f"{source.id}: its model_index.json cannot be read") from None
    if not isinstance(index, dict):
        raise ModelUnavailable(f"{source.id}: its model_index.json cannot be read")
    return index


def _text_models(
    source: Source,
    index: Mapping[str, Any],
    variants: Mapping[str, str],
    placement: Placement,
    config: ModelConfig,
) -> dict[str, Any]:
    """Load the parts that are models of transformers, by their names.

    transformers fills missing weights with random values and reports that only in its loading
    info, which diffusers does not request.
    """
    loaded = {}
    for name, entry in index.items():
        library, class_name = entry if isinstance(entry, list) else (None, "")
        part: Any = None
        if library == "transformers" and isinstance(class_name, str):
            part = getattr(transformers, class_name, None)
        if not (inspect.isclass(part) and issubclass(part, transformers.PreTrainedModel)):
            continue
        files = source.folder / name
        model_and_info: Any = part.from_pretrained(
            files,
            variant=variants.get(name),
            dtype=placement.dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **direct_load_kwargs(placement, config),
            **quantization.for_transformers(config, placement, files),
        )
        model, info = model_and_info
        require_no_new_weights(info, f"{source.id}: {name}")
        loaded[name] = model
    return loaded


def _from_folder(
    source: Source,
    index: Mapping[str, Any],
    parts: Mapping[str, Any],
    variants: Mapping[str, str],
    *,
    placement: Placement,
    config: ModelConfig,
) -> Any:
    # A part that the index names as absent, such as T5 in Stable Diffusion 3, is passed as None.
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    direct = direct_load_kwargs(placement, config)
    # One variant for all parts: diffusers reads the plain files of a part that does not have it.
    variant = min(variants.values(), default=None)
    pipe = DiffusionPipeline.from_pretrained(
        str(source.folder),
        dtype=placement.dtype,
        use_safetensors=True,
        local_files_only=True,
        **quantization.for_diffusers(config, placement, index),
        **({"device_map": config.device_map} if config.device_map != "none" else {}),
        variant=variant,
        **direct,
        **absent,
        **parts,
    )
    if direct:
        pipe.hf_device_map = None  # the parts are not distributed
    return pipe


def _distribute(pipe: Any, parts: Mapping[str, Any]) -> None:
    """Move the parts that were loaded here to the devices of the pipeline's device map.

    diffusers distributes whole parts. A part that fits on no GPU stays in main memory, and each
    step would copy it to a GPU. If there are several such parts, diffusers omits all but one.

    Raises:
        ModelUnavailable: A part does not fit on a GPU.
    """
    device_map = pipe.hf_device_map
    if not isinstance(device_map, dict):
        return
    for name, _ in modules(pipe):
        device = device_map.get(name, "cpu")
        if device == "cpu":
            raise ModelMisconfigured(f"MODEL_DEVICE_MAP: {name} does not fit on a GPU")
        if name in parts:
            # With hooks, because the inputs are on other devices.
            accelerate.dispatch_model(parts[name], {"": device}, force_hooks=True)
