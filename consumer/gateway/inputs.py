"""The objects of the store that a tenant may use as inputs.

A worker can read every object under its input prefixes, by default all outputs of all tenants.
With API keys, the gateway therefore accepts only outputs of the tenant's jobs and shared objects.
"""

from collections.abc import Iterator, Sequence
from http import HTTPStatus

from consumer.gateway.errors import ApiError
from consumer.gateway.tenants import Tenant
from generation_contracts import TASKS, Request, Step, Task
from generation_contracts.artifacts import ArtifactReference, ImageSource
from generation_contracts.subjects import is_queue_name


def require_own_inputs(tenant: Tenant, request: Request, shared: Sequence[str]) -> None:
    """Refuse a request that uses an object of another tenant, also in a step of its chain.

    Args:
        tenant: The tenant of the request.
        request: The request, with its chain.
        shared: `bucket/prefix` or `bucket` of the objects that every tenant may use.

    Raises:
        ApiError: 403 that names the parameter.
    """
    for param, source in _sources(request):
        path = _object_path(source)
        if path is None or _is_output_of(tenant, path) or _is_under(shared, path):
            continue
        raise ApiError(
            HTTPStatus.FORBIDDEN,
            f"{param}: not an output of your jobs",
            "input_not_allowed",
            param=param,
        )


def _sources(request: Request) -> Iterator[tuple[str, ImageSource]]:
    parts: list[tuple[str, Request | Step]] = [("", request)]
    parts += ((f"then.{n}.", step) for n, step in enumerate(request.then))
    for prefix, part in parts:
        for place, source in TASKS[Task(part.task)].sources(part):
            yield f"{prefix}{place}", source


def _object_path(source: ImageSource) -> str | None:
    """Return `bucket/key` of an object of the store; None for every other source."""
    if isinstance(source, ArtifactReference):
        return f"{source.bucket}/{source.key}"
    if isinstance(source, str) and source.startswith("s3://"):
        return source.removeprefix("s3://")
    return None


def _is_output_of(tenant: Tenant, path: str) -> bool:
    # Workers store outputs as `<prefix>/<queue>/<request id>/<file>`, with any prefix.
    *_, queue, request_id, _ = ("", "", *path.split("/"))
    return is_queue_name(queue) and tenant.owns(request_id)


def _is_under(prefixes: Sequence[str], path: str) -> bool:
    return any(path.startswith(f"{prefix.rstrip('/')}/") for prefix in prefixes)
