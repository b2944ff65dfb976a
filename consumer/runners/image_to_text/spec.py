"""The runner of image_to_text, as far as it is known without transformers."""

from consumer.ports.model import ModelDescription
from consumer.runners.task_settings import RunnerSpec, TrialInputs
from generation_contracts import ImageToTextRequest

# The contract requires a reference; the runner receives the decoded image instead.
PLACEHOLDER = "s3://first-run/image.png"
_QUESTION = "Describe this picture."
_SIDE = 224  # pixels: width and height of the image
_TOKENS = 2  # the first comes from the prompt, the second from the cache of keys and values
_SEED = 0


def _smallest(_: ModelDescription) -> TrialInputs:
    from PIL import Image

    request = ImageToTextRequest(
        prompt="What is it?", images=(PLACEHOLDER,), max_new_tokens=_TOKENS, seed=_SEED
    )
    return request, [Image.new("RGB", (_SIDE, _SIDE), "gray")]


def _sample() -> TrialInputs:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (_SIDE, _SIDE), "white")
    box = [_SIDE // 4, _SIDE // 4, 3 * _SIDE // 4, 3 * _SIDE // 4]
    ImageDraw.Draw(image).ellipse(box, fill="red")
    return ImageToTextRequest(prompt=_QUESTION, images=(PLACEHOLDER,)), [image]


SPEC = RunnerSpec(
    module="consumer.runners.image_to_text.vision_language",
    attention=("eager", "sdpa", "flex_attention", "flash_attention_2"),
    settings=frozenset({"max_image_pixels"}),
    is_pipeline=False,
    smallest=_smallest,
    sample=_sample,
    demonstration={},
)
