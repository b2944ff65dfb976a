"""What the settings say about the model, as the runners take it; no library is imported here."""

from dataclasses import dataclass
from typing import Literal

Device = Literal["auto", "cuda", "mps", "cpu"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Offload = Literal["none", "model", "sequential", "group"]

MAX_IMAGE_PIXELS = 1_200_000  # pixels; about 1,530 tokens of Qwen2.5-VL, whose own limit is 16,384


@dataclass(frozen=True)
class ModelConfig:
    """Which model to load, and how.

    Attributes:
        model_id: A folder, or an id on the Hugging Face hub; empty for the demonstration model,
            whose weights are random until trained ones come with it.
        revision: Commit, tag or branch on the hub; a folder has none.
        device: `auto` takes the first of cuda, mps and cpu that is there.
        dtype: `auto` is bfloat16 on cuda, float32 elsewhere.
        offload: Where the weights wait while they are not in use: on the device (`none`), or in
            main memory, whole models at a time (`model`), layer by layer (`sequential`), or in
            groups of layers (`group`).
        quantization: `none` or `bitsandbytes-4bit`.
        compile: Compile the model; the first run takes minutes longer.
        max_image_pixels: An input picture larger than this is made smaller, in pixels.
    """

    model_id: str = ""
    revision: str | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    offload: Offload = "none"
    quantization: str = "none"
    compile: bool = False
    max_image_pixels: int = MAX_IMAGE_PIXELS
