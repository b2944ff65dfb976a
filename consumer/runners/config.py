"""The configuration of a model, derived from the settings. This module imports no library."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Device = Literal["auto", "cuda", "mps", "cpu"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Offload = Literal["none", "model", "sequential", "group"]
Quantization = Literal[
    "none", "bitsandbytes-4bit", "bitsandbytes-8bit", "torchao-int8", "torchao-int4", "gguf"
]

SafetyPolicy = Literal["flag", "blank", "fail"]

SAFETY_LABELS = ("nsfw",)  # the label of the most used classifiers
SAFETY_THRESHOLD = 0.5
MAX_IMAGE_PIXELS = 1_200_000  # pixels; about 1,530 tokens of Qwen2.5-VL, whose own limit is 16,384


@dataclass(frozen=True)
class ModelConfig:
    """Which model to load, and how.

    Attributes:
        model_id: A folder, or an id on the Hugging Face hub; empty for the demonstration model.
        revision: Commit, tag or branch on the hub; a folder has none.
        device: `auto` is the first available one of cuda, mps and cpu.
        dtype: `auto` is bfloat16 on cuda, float32 elsewhere.
        offload: Where unused weights are: on the device (`none`) or in main memory, moved as whole
            models (`model`), layer by layer (`sequential`), or in groups of layers (`group`).
        device_map: `balanced` distributes the parts over all GPUs.
        quantization: Of the large parts; `gguf` for a transformer that is stored as GGUF.
        compile: Compile the repeated blocks; the first run takes minutes longer.
        warm_up: Generate one output during loading.
        vae_tiling: Decode images in tiles.
        vae_slicing: Decode one image at a time.
        channels_last: Memory format of the convolutions.
        attention: An attention backend of diffusers or transformers; empty for their default.
        step_cache: Threshold of the first-block cache; 0 is off.
        defaults: Values by request field, for requests that omit the field; they override the
            model's defaults.
        adapters: Folders of LoRA adapters by the names that requests use.
        safety_checker: `package.module:callable`, or a classifier: a folder, or an id on the hub;
            empty for none.
        safety_labels: The classifier's labels that flag an image.
        safety_threshold: Probability of these labels from which an image is flagged.
        safety_policy: What happens to a flagged image: published with its flag, published in
            black, or its request fails.
        max_image_pixels: Larger input images are scaled down to this number of pixels.
        runner: `package.module:Class` of a runner of the operator; empty for the other tasks.
    """

    model_id: str = ""
    revision: str | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    offload: Offload = "none"
    device_map: Literal["none", "balanced"] = "none"
    quantization: Quantization = "none"
    compile: bool = False
    warm_up: bool = False
    vae_tiling: bool = False
    vae_slicing: bool = False
    channels_last: bool = False
    attention: str = ""
    step_cache: float = 0.0
    defaults: Mapping[str, int | float | str] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)
    safety_checker: str = ""
    safety_labels: tuple[str, ...] = SAFETY_LABELS
    safety_threshold: float = SAFETY_THRESHOLD
    safety_policy: SafetyPolicy = "flag"
    max_image_pixels: int = MAX_IMAGE_PIXELS
    runner: str = ""
