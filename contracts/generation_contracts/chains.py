"""Chains: the next requests of a routing slip, derived from a request and its result.

The next requests depend on the previous request and its result only. A worker that derives them
again after a crash gets the same requests with the same ids. Nothing here does input or output.
"""

import hashlib

from generation_contracts.artifacts import ArtifactReference, ImageArtifact, TextOutput
from generation_contracts.base import Task
from generation_contracts.envelope import OUTPUTS, TEXT, ChainLink, Request, Step
from generation_contracts.events import ChainPlace, SucceededEvent
from generation_contracts.fields import MAX_BRANCH, MAX_CHAIN
from generation_contracts.requests import InvalidRequest
from generation_contracts.tasks import TASKS

MAX_BRANCHES = 64  # requests of one step of a chain
MAX_ID = 64  # characters
ID_PREFIX = 40  # characters of the chain's id in a step's id that would be longer than MAX_ID


def check_routing_slip(request: Request) -> None:
    """Check that every step of a routing slip can follow the previous step.

    The limits count from the request's position in its chain. A sender can set the position too.

    Raises:
        InvalidRequest: A step cannot follow. The text names the step.
    """
    images = TASKS[request.task].images_of(request)
    branches = 1
    longest = request.chain.branch if request.chain is not None else ""
    if request.chain is not None and request.chain.step + len(request.then) > MAX_CHAIN + 1:
        problem = f"the chain would have more than {MAX_CHAIN + 1} steps"
        raise InvalidRequest(f"then: {problem}", ({"field": "then", "problem": problem},))
    for index, step in enumerate(request.then):
        if step.uses_text and images:
            raise _wrong(index, step.text_field, f"{TEXT} follows a step that generates images")
        if step.input_images == OUTPUTS and images == 0:
            raise _wrong(index, "images", f"{OUTPUTS} follows a step that generates a text")
        if step.splits and images is None:
            raise _wrong(index, "each", "follows a step whose number of images is not known")
        if step.splits and images is not None and images > 1:
            branches *= images
            longest = _branch(longest, images - 1)
        images = TASKS[Task(step.task)].images_of(step)
        if branches > MAX_BRANCHES:
            raise _wrong(index, "each", f"the step would have more than {MAX_BRANCHES} requests")
        if len(longest) > MAX_BRANCH:
            raise _wrong(index, "each", "the chain splits too often")


def place_of(request: Request, request_id: str) -> ChainPlace | None:
    """Return the position of a request in its chain; None outside a chain."""
    link = request.chain
    if link is None:
        if not request.then:
            return None
        return ChainPlace(id=request_id, step=1, of=1 + len(request.then))
    return ChainPlace(id=link.id, step=link.step, of=link.step + len(request.then))


def next_requests(
    request: Request, request_id: str, result: SucceededEvent
) -> tuple[tuple[Task, Request], ...]:
    """Return the next requests of a routing slip; empty at its end.

    They get the deadline and the metadata of the request. The caller passes the reply subject on,
    in a header.

    Args:
        request: The request, checked with `check_routing_slip`.
        request_id: Its id, from the body, the subject or a header.
        result: Its terminal event.

    Raises:
        InvalidRequest: No valid request follows from the result.
    """
    if not request.then:
        return ()
    step, *rest = request.then
    link = request.chain or ChainLink(id=request_id, step=1)
    texts = [output.text for output in result.outputs if isinstance(output, TextOutput)]
    images = tuple(
        ArtifactReference(bucket=output.bucket, key=output.key)
        for output in result.outputs
        if isinstance(output, ImageArtifact)
    )
    try:
        written = step.with_text(texts[0] if texts else "")
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    spec = TASKS[Task(step.task)]
    fields = {
        **_parameters(step),
        **written,
        "deadline": request.deadline,
        "metadata": request.metadata,
        "then": tuple(rest),
    }
    if step.input_images == OUTPUTS and not images:
        raise InvalidRequest("images: the previous step returned no image")
    groups = [(image,) for image in images] if step.splits else [images]
    requests = []
    for number, group in enumerate(groups):
        branch = _branch(link.branch, number) if len(groups) > 1 else link.branch
        following = _follow(link, branch)
        if step.input_images == OUTPUTS:
            fields["images"] = group
        requests.append(spec.request(**fields, chain=following, request_id=id_of(following)))
    return tuple((spec.task, each) for each in requests)


def next_link(request: Request, request_id: str) -> ChainLink:
    """Return the position of the next step, before a split."""
    link = request.chain or ChainLink(id=request_id, step=1)
    return _follow(link, link.branch)


def possible_links(link: ChainLink, result: SucceededEvent) -> tuple[ChainLink, ...]:
    """Return every possible position of a request that follows a result.

    An event does not contain the routing slip, so both forms are possible: one request for all
    images, or one for each image.

    Args:
        link: Position of the request of the result; not the last step.
        result: Terminal event of that request.
    """
    images = sum(isinstance(output, ImageArtifact) for output in result.outputs)
    split = (_branch(link.branch, number) for number in range(images if images > 1 else 0))
    branches = (link.branch, *(branch for branch in split if len(branch) <= MAX_BRANCH))
    return tuple(_follow(link, branch) for branch in branches)


def id_of(link: ChainLink) -> str:
    """Return the id of a later request: the chain's id, the step, and the branch after a split."""
    place = "-".join(filter(None, (str(link.step), link.branch)))
    whole = f"{link.id}-{place}"
    if len(whole) <= MAX_ID:
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()[: MAX_ID - ID_PREFIX - 1]
    return f"{link.id[:ID_PREFIX]}-{digest}"


def _follow(link: ChainLink, branch: str) -> ChainLink:
    return ChainLink(id=link.id, step=link.step + 1, branch=branch)


def _branch(before: str, number: int) -> str:
    return f"{before}-{number}".removeprefix("-")


def _parameters(step: Step) -> dict[str, object]:
    """Return the fields of a step that its request has too; an absent list is `$outputs`."""
    fields = TASKS[Task(step.task)].request.model_fields
    given = {name: getattr(step, name) for name in step.model_fields_set if name in fields}
    return {name: value for name, value in given.items() if value != OUTPUTS}


def _wrong(index: int, field: str, problem: str) -> InvalidRequest:
    place = f"then.{index}.{field}"
    return InvalidRequest(f"{place}: {problem}", ({"field": place, "problem": problem},))
