"""Statistics of a soak: counts, stalls and recovery times. No I/O."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tests.soak.chaos import Fault
from tests.soak.fates import Fate
from tests.soak.records import Records
from tests.soak.workload import LOST, Sending


@dataclass(frozen=True)
class Times:
    """Durations of one kind, in seconds."""

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
        outcomes: Number of requests by outcome.
        executed_twice: Requests without an injected model fault that ran more than once.
        after_result: Runs that started after the result of the request was stored.
        recovered: Requests whose terminal event has an attempt above 1.
        lost: Requests that failed with `worker_lost` because of killed processes.
        stall: Longest time in seconds without a terminal event while a request waited.
        recovery: Time from a worker's fault or a server's recovery to the next terminal event.
        exit_codes: Exit codes of the workers, with their counts.
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
    exit_codes: Mapping[int, int]

    def lines(self) -> list[str]:
        """Return the lines of the report."""
        outcomes = ", ".join(f"{count} {name}" for name, count in self.outcomes.items())
        codes = ", ".join(f"{count} x {code}" for code, count in sorted(self.exit_codes.items()))
        return [
            f"requests          {self.requests}, in {self.messages} messages",
            f"ended             {outcomes}",
            f"executed twice    {self.executed_twice}; with a result stored: {self.after_result}",
            f"recovered         {self.recovered}",
            f"lost to the chaos {self.lost}",
            f"longest stall     {self.stall:.2f} s",
            *(f"{kind:<19} next result after: {times}" for kind, times in self.recovery.items()),
            f"workers ended     {codes}",
        ]


def figures(
    sendings: Sequence[Sending],
    records: Records,
    faults: Sequence[Fault],
    confirmed_at: Mapping[str, float],
) -> Figures:
    """Compute the statistics of a soak.

    Args:
        sendings: The sent messages.
        records: The state after the soak.
        faults: The injected faults.
        confirmed_at: Time of each publish acknowledgement by message id; seconds since the epoch.
    """
    kinds = {sending.request_id: sending.kind for sending in sendings}
    done = {stored.request_id: stored.at for stored in records.results}
    waiting = _waiting(sendings, confirmed_at, done)
    runs = Counter(request_id for request_id, _ in records.run_starts)
    faultless = {request_id for request_id, kind in kinds.items() if _faultless(kind)}
    return Figures(
        requests=len(kinds),
        messages=len(sendings),
        outcomes=Counter(stored.outcome for stored in records.results),
        executed_twice=sum(1 for one, count in runs.items() if count > 1 and one in faultless),
        after_result=sum(1 for one, at in records.run_starts if at > done.get(one, at)),
        recovered=sum(1 for stored in records.results if stored.event.get("attempt", 1) > 1),
        lost=sum(
            1
            for stored in records.results
            if stored.outcome == LOST and kinds.get(stored.request_id) != Fate.KILLED
        ),
        stall=longest_stall(waiting),
        recovery={
            kind: Times(
                [after for fault in faults if fault.kind == kind for after in _next(fault, waiting)]
            )
            for kind in dict.fromkeys(fault.kind for fault in faults)
        },
        exit_codes=Counter(records.exit_codes),
    )


Waiting = Sequence[tuple[float, float]]  # of each request: confirmed at, done at; seconds


def longest_stall(waiting: Waiting) -> float:
    """Return the longest time in seconds in which a request waited and none ended."""
    moments = sorted(
        [(confirmed, 1) for confirmed, _ in waiting] + [(done, -1) for _, done in waiting]
    )
    longest, count, since = 0.0, 0, 0.0
    for at, change in moments:
        if count and change < 0:
            longest = max(longest, at - since)
        if change < 0 or not count:
            since = at
        count += change
    return longest


def _waiting(
    sendings: Sequence[Sending], confirmed_at: Mapping[str, float], done: Mapping[str, float]
) -> Waiting:
    first: dict[str, float] = {}
    for sending in sendings:
        at = confirmed_at.get(sending.message_id)
        if at is not None and sending.request_id in done:
            # After a lost acknowledgement, a retry may be confirmed later than the result.
            earliest = first.get(sending.request_id, done[sending.request_id])
            first[sending.request_id] = min(earliest, at)
    return [(at, done[request_id]) for request_id, at in first.items()]


def _next(fault: Fault, waiting: Waiting) -> list[float]:
    afterwards = [done for confirmed, done in waiting if confirmed <= fault.recovered_at < done]
    return [min(afterwards) - fault.recovered_at] if afterwards else []


def _faultless(kind: str) -> bool:
    return not isinstance(kind, Fate) or kind in {Fate.PLAIN, Fate.SLOW, Fate.HOLDS_THE_GIL}
