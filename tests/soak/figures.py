"""What a soak tells about itself: counts, stalls and recovery times; pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tests.soak.chaos import Blow
from tests.soak.fates import Fate
from tests.soak.records import Records
from tests.soak.workload import LOST, Sending


@dataclass(frozen=True)
class Times:
    """Durations in seconds, of one kind."""

    seconds: Sequence[float]

    def __str__(self) -> str:
        if not self.seconds:
            return "nothing was waiting"
        middle, longest = median(self.seconds), max(self.seconds)
        return f"median {middle:.2f} s, longest {longest:.2f} s ({len(self.seconds)} times)"


@dataclass(frozen=True)
class Figures:
    """The figures of one soak.

    Attributes:
        outcomes: How the requests ended.
        executed_twice: Requests whose run was begun more than once, and had no fault of their own.
        after_result: Runs begun when the request's result was stored already.
        recovered: Requests whose terminal event is of a later attempt than the first.
        lost: Requests that ended as `worker_lost` because of the chaos.
        stall: Longest time without any terminal event while a request waited, in seconds.
        recovery: From a worker's blow, or a server's return, to the next terminal event.
        ends: Exit codes of the workers.
    """

    requests: int
    messages: int
    outcomes: Mapping[str, int]
    executed_twice: int
    after_result: int
    recovered: int
    lost: int
    stall: float
    recovery: Mapping[str, Times]
    ends: Mapping[int, int]

    def lines(self) -> list[str]:
        """For people."""
        outcomes = ", ".join(f"{count} {name}" for name, count in self.outcomes.items())
        ends = ", ".join(f"{count} x {code}" for code, count in sorted(self.ends.items()))
        return [
            f"requests          {self.requests}, in {self.messages} messages",
            f"ended             {outcomes}",
            f"executed twice    {self.executed_twice}; with a result stored: {self.after_result}",
            f"recovered         {self.recovered}",
            f"lost to the chaos {self.lost}",
            f"longest stall     {self.stall:.2f} s",
            *(f"{kind:<19} next result after: {times}" for kind, times in self.recovery.items()),
            f"workers ended     {ends}",
        ]


def figures(
    sendings: Sequence[Sending],
    records: Records,
    blows: Sequence[Blow],
    taken: Mapping[str, float],
) -> Figures:
    """Sum up a soak.

    Args:
        sendings: What was sent.
        records: What is left.
        blows: What was done to it.
        taken: When the stream confirmed each message, by message id; seconds since the epoch.
    """
    kinds = {sending.request_id: sending.kind for sending in sendings}
    done = {stored.request_id: stored.at for stored in records.results}
    waiting = _waiting(sendings, taken, done)
    runs = Counter(request_id for request_id, _ in records.begun)
    faultless = {request_id for request_id, kind in kinds.items() if _faultless(kind)}
    return Figures(
        requests=len(kinds),
        messages=len(sendings),
        outcomes=Counter(stored.outcome for stored in records.results),
        executed_twice=sum(1 for one, count in runs.items() if count > 1 and one in faultless),
        after_result=sum(1 for one, at in records.begun if at > done.get(one, at)),
        recovered=sum(1 for stored in records.results if stored.event.get("attempt", 1) > 1),
        lost=sum(
            1
            for stored in records.results
            if stored.outcome == LOST and kinds.get(stored.request_id) != Fate.KILLED
        ),
        stall=longest_stall(waiting),
        recovery={
            kind: Times(
                [after for blow in blows if blow.kind == kind for after in _next(blow, waiting)]
            )
            for kind in dict.fromkeys(blow.kind for blow in blows)
        },
        ends=Counter(records.ends),
    )


Waiting = Sequence[tuple[float, float]]  # when a request was taken, and when it was done; seconds


def longest_stall(waiting: Waiting) -> float:
    """The longest time in which something waited and nothing was done, in seconds."""
    moments = sorted([(taken, 1) for taken, _ in waiting] + [(done, -1) for _, done in waiting])
    longest, count, since = 0.0, 0, 0.0
    for at, change in moments:
        if count and change < 0:
            longest = max(longest, at - since)
        if change < 0 or not count:
            since = at
        count += change
    return longest


def _waiting(
    sendings: Sequence[Sending], taken: Mapping[str, float], done: Mapping[str, float]
) -> Waiting:
    first: dict[str, float] = {}
    for sending in sendings:
        at = taken.get(sending.message_id)
        if at is not None and sending.request_id in done:
            # A confirmation that was lost comes later, if need be after the result.
            known = first.get(sending.request_id, done[sending.request_id])
            first[sending.request_id] = min(known, at)
    return [(at, done[request_id]) for request_id, at in first.items()]


def _next(blow: Blow, waiting: Waiting) -> list[float]:
    afterwards = [done for taken, done in waiting if taken <= blow.back < done]
    return [min(afterwards) - blow.back] if afterwards else []


def _faultless(kind: str) -> bool:
    return not isinstance(kind, Fate) or kind in {Fate.PLAIN, Fate.SLOW, Fate.HOLDS_THE_GIL}
