"""The bounds of a key, checked before a request is queued."""

import math
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from http import HTTPStatus

from consumer.gateway.errors import ApiError, invalid
from consumer.gateway.inputs import require_own_inputs
from consumer.gateway.tenants import Bounds, Caller, Tenant
from generation_contracts import TASKS, Request, Step, Task

MINUTE = 60.0  # seconds
WAITING_RETRY_AFTER = 5  # seconds
VIEW_AGE = 10.0  # seconds after which the list of unfinished requests includes earlier changes

Unfinished = Callable[[Tenant], Awaitable[Collection[str]]]


class Limits:
    """Admits requests within the bounds of their key.

    A bound applies to the fields that a request sets. A field that is absent gets the model's
    default, which the operator has chosen, and is not checked.

    Each gateway counts its own requests per minute. The queued and running requests are read from
    the queue, so their bound applies to all gateways together, except for requests that several
    gateways admit within the same second.

    Args:
        unfinished: Returns the ids of a tenant's queued and running requests; at most a few
            seconds old.
        input_prefixes: Prefixes of the objects that every tenant may use as inputs.
        now: The clock, in seconds.
    """

    def __init__(
        self,
        unfinished: Unfinished,
        *,
        input_prefixes: Sequence[str] = (),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._unfinished = unfinished
        self._input_prefixes = input_prefixes
        self._now = now
        self._minutes: dict[str, deque[float]] = {}  # the times of the requests, by key id
        # Changes that the list of unfinished requests may not show yet, with their times.
        self._admitted: OrderedDict[str, float] = OrderedDict()
        self._ended: OrderedDict[str, float] = OrderedDict()

    async def admit(self, caller: Caller, request: Request) -> None:
        """Check a request against the bounds of its caller's key, and count it.

        Do not call this for a repeated request of an idempotency key: it queues nothing.

        Args:
            caller: The sender of the request.
            request: The request, with its id.

        Raises:
            ApiError: 400 or 403 that names the parameter; 429 with the seconds until a retry.
        """
        if caller.key_id:  # without keys there is only one tenant
            require_own_inputs(caller.tenant, request, self._input_prefixes)
        _require_within(caller.bounds, request)
        if caller.bounds.waiting is not None:
            await self._require_room(caller.tenant, caller.bounds.waiting)
        # No await from here on: otherwise two requests could both pass the check.
        if caller.bounds.per_minute is not None:
            self._count(caller.key_id, caller.bounds.per_minute)
        if request.request_id is not None:
            self._ended.pop(request.request_id, None)
            self._note(self._admitted, request.request_id)

    def ended(self, request_id: str) -> None:
        """Stop counting a request: it has a terminal event, or could not be queued."""
        self._admitted.pop(request_id, None)
        self._note(self._ended, request_id)

    async def _require_room(self, tenant: Tenant, most: int) -> None:
        waiting = set(await self._unfinished(tenant))
        self._forget_old(self._admitted)
        self._forget_old(self._ended)
        waiting.update(id_ for id_ in self._admitted if tenant.owns(id_))
        waiting.difference_update(self._ended)
        if len(waiting) >= most:
            raise _too_many(
                f"{len(waiting)} requests wait or run already; this key may have {most}",
                "too_many_waiting",
                WAITING_RETRY_AFTER,
            )

    def _note(self, times: OrderedDict[str, float], request_id: str) -> None:
        self._forget_old(times)
        times[request_id] = self._now()
        times.move_to_end(request_id)

    def _forget_old(self, times: OrderedDict[str, float]) -> None:
        oldest = self._now() - VIEW_AGE
        while times and next(iter(times.values())) < oldest:
            times.popitem(last=False)

    def _count(self, key_id: str, most: int) -> None:
        times = self._minutes.setdefault(key_id, deque())
        now = self._now()
        while times and times[0] <= now - MINUTE:
            times.popleft()
        if len(times) >= most:
            raise _too_many(
                f"this key may send {most} requests a minute",
                "rate_limit_exceeded",
                math.ceil(times[len(times) - most] + MINUTE - now),
            )
        times.append(now)


def _too_many(message: str, code: str, retry_after: int) -> ApiError:
    return ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, code, retry_after=max(1, retry_after))


def _require_within(bounds: Bounds, request: Request) -> None:
    """Check the size of a request and of the following steps of its chain.

    Raises:
        ApiError: 400 that names the parameter.
    """
    for path, part in _parts(request):
        count_field = TASKS[Task(part.task)].count_field
        count: int = 0 if count_field is None else getattr(part, count_field)
        if bounds.images is not None and count > bounds.images:
            raise _too_large(f"{path}{count_field}", f"at most {bounds.images}")
        steps: int | None = getattr(part, "num_inference_steps", None)
        if bounds.steps is not None and steps is not None and steps > bounds.steps:
            raise _too_large(f"{path}num_inference_steps", f"at most {bounds.steps}")
        width: int | None = getattr(part, "width", None)
        height: int | None = getattr(part, "height", None)
        if bounds.pixels is None or (width is None and height is None):
            continue
        if width is None or height is None:
            # The gateway does not know the default of the other side, so it cannot check the size.
            missing = "width" if width is None else "height"
            raise _too_large(f"{path}{missing}", "needed with the other side")
        if width * height > bounds.pixels:
            bound = f"width times height at most {bounds.pixels} pixels"
            raise _too_large(f"{path}width", bound)


def _too_large(param: str, bound: str) -> ApiError:
    return invalid(f"{param}: {bound} with this key", param=param, code="bound_exceeded")


def _parts(request: Request) -> Iterator[tuple[str, Request | Step]]:
    """Yield a request and the steps of its chain, each after the path prefix of its fields."""
    yield "", request
    yield from ((f"then.{number}.", step) for number, step in enumerate(request.then))
