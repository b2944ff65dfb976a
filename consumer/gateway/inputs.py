"""Which objects of the store a tenant may name as inputs.

A worker reads every object under its input prefixes, by default all outputs of all tenants. So
with API keys, a request may refer to the outputs of its tenant's own jobs and to shared objects.
"""

from collections.abc import Iterator, Sequence
from http import HTTPStatus

from consumer.gateway.errors import ApiError
from consumer.gateway.tenants import Tenant
from generation_contracts import Request, Task
from generation_contracts.artifacts import ArtifactReference, ImageSource
from generation_contracts.requests import ImageToTextRequest, ImageToTextStep


def require_own_inputs(tenant: Tenant, request: Request, for_all: Sequence[str]) -> None:
    """Refuse a request that names an object of another tenant, in its chain too.

    Args:
        tenant: Who asks.
        request: With its chain.
        for_all: `bucket/prefix` or `bucket` of what every tenant may name.

    Raises:
        ApiError: 403 that names the parameter.
    """
    for param, source in _sources(request):
        place = _place_of(source)
        if place is None or _is_output_of(tenant, place) or _is_under(for_all, place):
            continue
        raise ApiError(
            HTTPStatus.FORBIDDEN,
            f"{param}: not an output of your jobs",
            "input_not_allowed",
            param=param,
        )


def _sources(request: Request) -> Iterator[tuple[str, ImageSource]]:
    parts = [("", request), *((f"then.{n}.", step) for n, step in enumerate(request.then))]
    for place, part in parts:
        if isinstance(part, ImageToTextRequest | ImageToTextStep) and part.images != "$outputs":
            for number, source in enumerate(part.images):
                yield f"{place}images.{number}", source


def _place_of(source: ImageSource) -> str | None:
    """Return `bucket/key` of an object of the store; None for every other source."""
    if isinstance(source, ArtifactReference):
        return f"{source.bucket}/{source.key}"
    if isinstance(source, str) and source.startswith("s3://"):
        return source.removeprefix("s3://")
    return None


def _is_output_of(tenant: Tenant, place: str) -> bool:
    # A worker's outputs are `<prefix>/<task>/<request id>/<file>`, whatever its prefix is.
    *_, task, request_id, _ = ("", "", *place.split("/"))
    return task in set(Task) and tenant.owns(request_id)


def _is_under(prefixes: Sequence[str], place: str) -> bool:
    return any(place.startswith(f"{prefix.rstrip('/')}/") for prefix in prefixes)
