"""The settlement table of docs/operating.md, printed from the outcome classes.

`uv run python -m tests.support.settlement_table` prints it.
"""

from collections.abc import Iterator
from typing import Any

from consumer.jobs import outcomes
from consumer.jobs.outcomes import Outcome

HEADER = ("Outcome", "When", "Terminal event", "Failure code", "Dead letter", "Settlement", "Exit")


def every_outcome() -> list[type[Outcome]]:
    """Return the outcome classes that can be raised, in the order of the module."""

    def leaves(kind: type[Outcome]) -> Iterator[type[Outcome]]:
        if not kind.__subclasses__():
            yield kind
        for derived in kind.__subclasses__():
            yield from leaves(derived)

    order = list(vars(outcomes))
    return sorted(leaves(Outcome), key=lambda kind: order.index(kind.__name__))


def example(kind: type[Outcome], **values: Any) -> Outcome:
    """Make an outcome; values replace the example values of its arguments."""
    arguments: dict[type[Outcome], dict[str, Any]] = {
        outcomes.MalformedRequest: {"message": "m"},
        outcomes.ParameterRefused: {"message": "m", "parameter": "p"},
        outcomes.InputMissing: {"message": "m"},
        outcomes.MemoryExhausted: {"tried": ()},
        outcomes.ModelFailed: {"exception": "E"},
        outcomes.InternalError: {"exception": "E"},
    }
    return kind(**{**arguments.get(kind, {}), **values})


def markdown() -> str:
    """Return the table."""
    rows = [HEADER, tuple("---" for _ in HEADER), *map(_row, every_outcome())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _row(kind: type[Outcome]) -> tuple[str, ...]:
    settle = f"`{kind.settle.value}`"
    if kind.retryable:
        settle = f"`retry`; at the last attempt {settle}"
    if not kind.counts:
        settle += ", no attempt"
    return (
        f"`{kind.__name__}`",
        (kind.__doc__ or "").splitlines()[0].removesuffix("."),
        "" if kind.publish is outcomes.Publish.NONE else kind.publish.value,
        f"`{kind.code}`" if kind.code else "",
        "yes" if kind.dead_letter else "",
        settle,
        str(kind.exit_code or ""),
    )


if __name__ == "__main__":
    print(markdown(), end="")  # noqa: T201 - the output of the script
