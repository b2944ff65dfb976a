"""Your own runner: any Python code behind the queue of a worker. Needs pydantic, and no torch.

A runner is a subclass of `Runner`. The worker is started with `MODEL_TYPE=custom` and
`MODEL_RUNNER=package.module:Class`:

    class Invert(Runner[NoParameters]):
        parameters = NoParameters
        max_images = 1

        def run(self, parameters: NoParameters, context: Context) -> Output:
            return Image(ImageOps.invert(context.images[0]))
"""

from generation_runner.outputs import File, Image, Json, Output, Text
from generation_runner.runner import Cancelled, Context, NoParameters, Parameters, Runner

__all__ = [
    "Cancelled",
    "Context",
    "File",
    "Image",
    "Json",
    "NoParameters",
    "Output",
    "Parameters",
    "Runner",
    "Text",
]
