"""Chains: a routing slip's next requests, made from a request and what it gave. Pure.

Everything about a next request follows from the request before it and its result: whoever makes it
again, after a crash, makes the same one with the same id.
"""

import hashlib

from generation_contracts.artifacts import ArtifactReference, ImageArtifact, TextOutput
from generation_contracts.base import Task
from generation_contracts.events import ChainPlace, SucceededEvent
from generation_contracts.requests import (
    MAX_BRANCH,
    MAX_CHAIN,
    MAX_PROMPT,
    ChainLink,
    ImageToTextRequest,
    ImageToTextStep,
    InvalidRequest,
    NextStep,
    Request,
    TextToImageRequest,
)

TEXT = "$text"
OUTPUTS = "$outputs"
MAX_BRANCHES = 64  # requests that one slip may fan out into, at its widest
MAX_ID = 64  # characters
KEPT_OF_ID = 40  # characters of a chain's id, where it is too long to be followed by a place


def check_slip(request: Request) -> None:
    """See whether every step of a routing slip can be made from the one before it.

    Where the request says that it stands in a chain, from there: senders can say so too.

    Raises:
        InvalidRequest: Names the step.
    """
    pictures = request.num_images if isinstance(request, TextToImageRequest) else 0
    branches = 1
    longest = request.chain.branch if request.chain is not None else ""
    if request.chain is not None and request.chain.step + len(request.then) > MAX_CHAIN + 1:
        problem = f"the chain would have more than {MAX_CHAIN + 1} steps"
        raise InvalidRequest(f"then: {problem}", ({"field": "then", "problem": problem},))
    for index, step in enumerate(request.then):
        if TEXT in step.prompt and pictures:
            raise _wrong(index, "prompt", f"{TEXT} follows a step that makes pictures")
        if isinstance(step, ImageToTextStep):
            if step.images == OUTPUTS and not pictures:
                raise _wrong(index, "images", f"{OUTPUTS} follows a step that makes a text")
            if _splits(step) and pictures > 1:
                branches *= pictures
                longest = _branch(longest, pictures - 1)
            pictures = 0
        else:
            pictures = step.num_images
        if branches > MAX_BRANCHES:
            raise _wrong(index, "each", f"would make more than {MAX_BRANCHES} requests")
        if len(longest) > MAX_BRANCH:
            raise _wrong(index, "each", "the chain has split too often")


def place_of(request: Request, request_id: str) -> ChainPlace | None:
    """Where in its chain a request stands; None when it is alone."""
    link = request.chain
    if link is None:
        if not request.then:
            return None
        return ChainPlace(id=request_id, step=1, of=1 + len(request.then))
    return ChainPlace(id=link.id, step=link.step, of=link.step + len(request.then))


def next_requests(
    request: Request, request_id: str, result: SucceededEvent
) -> tuple[tuple[Task, Request], ...]:
    """What a routing slip asks for next; empty at its end.

    The deadline and the metadata go on with it. The reply subject does not: it is in a header.

    Args:
        request: What was asked for; its slip has been checked.
        request_id: Its id, wherever it was told.
        result: What it gave.

    Raises:
        InvalidRequest: The result makes no request.
    """
    if not request.then:
        return ()
    step, *rest = request.then
    link = request.chain or ChainLink(id=request_id, step=1)
    texts = [output.text for output in result.outputs if isinstance(output, TextOutput)]
    pictures = tuple(
        ArtifactReference(bucket=output.bucket, key=output.key)
        for output in result.outputs
        if isinstance(output, ImageArtifact)
    )
    # A prompt is cut where the contract ends; models read far less of it.
    prompt = step.prompt.replace(TEXT, texts[0] if texts else "")[:MAX_PROMPT]
    if not prompt.strip():
        raise InvalidRequest("prompt: the step before gave an empty text")
    common = {
        **_parameters(step),
        "prompt": prompt,
        "deadline": request.deadline,
        "metadata": request.metadata,
        "then": tuple(rest),
    }
    if not isinstance(step, ImageToTextStep):
        own = _follow(link, link.branch)
        made = TextToImageRequest(**common, chain=own, request_id=id_of(own))
        return ((Task.TEXT_TO_IMAGE, made),)
    groups = [(picture,) for picture in pictures] if _splits(step) else [pictures]
    many = len(groups) > 1
    requests = []
    for number, group in enumerate(groups):
        branch = _branch(link.branch, number) if many else link.branch
        own = _follow(link, branch)
        images = group if step.images == OUTPUTS else step.images
        requests.append(
            ImageToTextRequest(**common, images=images, chain=own, request_id=id_of(own))
        )
    return tuple((Task.IMAGE_TO_TEXT, one) for one in requests)


def next_link(request: Request, request_id: str) -> ChainLink:
    """Where the next request stands, before it is split."""
    link = request.chain or ChainLink(id=request_id, step=1)
    return _follow(link, link.branch)


def possible_links(link: ChainLink, result: SucceededEvent) -> tuple[ChainLink, ...]:
    """Return every place where a request after a result may stand.

    An event does not carry the routing slip, so both forms are possible: one request for all of its
    images, or one for each.

    Args:
        link: Where the request of the result stands; it is not the last step.
        result: What it gave.
    """
    images = sum(isinstance(output, ImageArtifact) for output in result.outputs)
    split = (_branch(link.branch, number) for number in range(images if images > 1 else 0))
    branches = (link.branch, *(branch for branch in split if len(branch) <= MAX_BRANCH))
    return tuple(_follow(link, branch) for branch in branches)


def id_of(link: ChainLink) -> str:
    """The id of a later request: the chain's, the step's number, and the branch where it split."""
    place = "-".join(filter(None, (str(link.step), link.branch)))
    whole = f"{link.id}-{place}"
    if len(whole) <= MAX_ID:
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()[: MAX_ID - KEPT_OF_ID - 1]
    return f"{link.id[:KEPT_OF_ID]}-{digest}"


def _follow(link: ChainLink, branch: str) -> ChainLink:
    return ChainLink(id=link.id, step=link.step + 1, branch=branch)


def _branch(before: str, number: int) -> str:
    return f"{before}-{number}".removeprefix("-")


def _splits(step: NextStep) -> bool:
    return isinstance(step, ImageToTextStep) and step.each and step.images == OUTPUTS


def _parameters(step: NextStep) -> dict[str, object]:
    left_out = {"task", "prompt", "images", "each"}
    return {name: getattr(step, name) for name in step.model_fields_set - left_out}


def _wrong(index: int, field: str, problem: str) -> InvalidRequest:
    place = f"then.{index}.{field}"
    return InvalidRequest(f"{place}: {problem}", ({"field": place, "problem": problem},))
