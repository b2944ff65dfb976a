"""The envelope of a request, and the steps of its routing slip."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias

from pydantic import Field

from generation_contracts.artifacts import ImageSource
from generation_contracts.base import RequestPart, Task
from generation_contracts.fields import MAX_CHAIN, MAX_PROMPT, Branch, Deadline, Metadata, ModelName
from generation_contracts.subjects import RequestId, SubjectName

OUTPUTS = "$outputs"
TEXT = "$text"


class Step(RequestPart):
    """Base of the later steps of a routing slip. A subclass has a `task` and the parameters.

    Attributes:
        text_field: The field in which `$text` is replaced.
    """

    text_field: ClassVar[str] = "prompt"

    if TYPE_CHECKING:
        task: str
        prompt: str

    model: ModelName | None = Field(
        default=None, description="name of a model or a queue; absent: the default queue"
    )

    @property
    def input_images(self) -> tuple[ImageSource, ...] | str | None:
        """The input images, `$outputs` for those of the previous step, None for no images."""
        images: tuple[ImageSource, ...] | str | None = getattr(self, "images", None)
        return images

    @property
    def uses_text(self) -> bool:
        """Whether the step contains `$text`, the text of the previous step."""
        return TEXT in self.prompt

    def with_text(self, text: str) -> dict[str, Any]:
        """Return the fields of the step's request in which `$text` is replaced.

        Raises:
            ValueError: The result is empty. The text begins with the field.
        """
        # Models read far fewer characters, so truncation at the limit of the contract does no harm.
        prompt = self.prompt.replace(TEXT, text)[:MAX_PROMPT]
        if not prompt.strip():
            raise ValueError(f"{self.text_field}: the previous step returned an empty text")
        return {"prompt": prompt}

    @property
    def splits(self) -> bool:
        """Whether the step is one request for each image of the previous step."""
        return False


if TYPE_CHECKING:
    NextStep: TypeAlias = Step  # the union of the steps of all tasks, see `tasks/__init__.py`


class ChainLink(RequestPart):
    """Position of a request in a chain. The worker that queues the next request writes it."""

    id: RequestId = Field(description="id of the chain: the id of its first request")
    step: int = Field(ge=1, le=MAX_CHAIN + 1, description="the first request is 1")
    branch: Branch = Field(
        default="", description="index at each split of the chain, such as `0-2`; empty before"
    )


class Request(RequestPart):
    """Base of all requests: the fields of every request apart from its parameters.

    Attributes:
        task: The task of the request; on the wire it is part of the subject.
    """

    task: ClassVar[Task]
    if TYPE_CHECKING:
        seed: int | None  # among the parameters of every task

    request_id: RequestId | None = Field(
        default=None,
        description="absent: last token of the subject, else Nats-Msg-Id, else derived",
    )
    reply_to: SubjectName | None = Field(
        default=None,
        description="subject for the terminal event; or the header Reply-To",
    )
    deadline: Deadline | None = Field(
        default=None,
        description="with time zone; the request fails with `deadline_exceeded` when it passes",
    )
    metadata: Metadata = Field(
        default_factory=dict, description="free for the sender; every event repeats it"
    )
    then: Annotated[tuple["NextStep", ...], Field(max_length=MAX_CHAIN, fail_fast=True)] = Field(
        default=(), description="routing slip: the next steps, each made from the previous result"
    )
    chain: ChainLink | None = Field(default=None, description="set by workers only")
    model: ModelName | None = Field(
        default=None,
        description="name of a model or a queue: a worker refuses the name of another model",
    )
