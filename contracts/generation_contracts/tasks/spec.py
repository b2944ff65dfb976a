"""What the other modules need to know about a task; see `TASKS`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from generation_contracts.artifacts import ImageSource
from generation_contracts.base import RequestPart, Task
from generation_contracts.envelope import OUTPUTS, Request, Step

OutputKind = Literal["image", "text", "file"]


@dataclass(frozen=True)
class TaskSpec:
    """One task: its messages and how their fields are used.

    The subjects, the schemas, the commands, the endpoints and the workers are derived from it.

    Attributes:
        title: For people, in lower case.
        request: The message of a request.
        parameters: The optional fields of the request; a worker's settings may give defaults.
        step: The message of a later step of a routing slip.
        output: Kind of the outputs; all kinds but `text` are files in the store. `file` stands for
            outputs of every kind.
        image_fields: Fields of the request that are input images: one image or a list.
        count_field: Field with the number of outputs; None: there is one.
        stream_field: Field that requests the text in progress events; None: there is no text.
        preview_field: Field that requests previews in progress events; None: there are none.
        options: Short names of the fields in the command line.
        examples: JSON of example requests by name, for the schemas and the golden files.
        event_examples: JSON of events that only this task has, by name.
    """

    title: str
    request: type[Request]
    parameters: type[RequestPart]
    step: type[Step]
    output: OutputKind
    image_fields: tuple[str, ...] = ()
    count_field: str | None = None
    stream_field: str | None = None
    preview_field: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    event_examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """The task itself."""
        return self.request.task

    @property
    def stores_files(self) -> bool:
        """Whether the outputs are files in the store."""
        return self.output != "text"

    def images_of(self, part: Request | Step) -> int | None:
        """Return the number of images that a request or a step generates; None if unknown."""
        if self.output != "image":
            return None if self.output == "file" else 0
        return 1 if self.count_field is None else int(getattr(part, self.count_field))

    def sources(self, part: Request | Step) -> Iterator[tuple[str, ImageSource]]:
        """Yield the input images of a request or a step, each with its place (`images.0`)."""
        for name in self.image_fields:
            value: Any = getattr(part, name)
            if isinstance(value, tuple):
                yield from ((f"{name}.{number}", source) for number, source in enumerate(value))
            elif value is not None and value != OUTPUTS:
                yield name, value

    def streams(self, request: Request) -> bool:
        """Return whether progress events carry the text of this request."""
        return self.stream_field is not None and bool(getattr(request, self.stream_field))

    def previews(self, request: Request) -> bool:
        """Return whether progress events carry previews of this request."""
        return self.preview_field is not None and bool(getattr(request, self.preview_field))
