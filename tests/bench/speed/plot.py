"""Plot of the device utilization of each system."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.bench.speed.figures import Figures
from tests.bench.speed.rows import Row
from tests.bench.speed.systems import Which

Results = Mapping[Row, Mapping[Which, Figures]]

_SIZE = (12, 5)  # inches: room for ten systems and four rows
_DOTS = 120  # an inch
_GROUP = 0.84  # of the distance between two groups
_DAEMON, _PEERS = "Greens", "Greys"  # colour maps


def draw(results: Results, file: Path) -> bool:
    """Plot the rows of the largest PNG with a sleeping device; return False without such rows."""
    # Imported here because the import takes a second and only `--write` needs it.
    from matplotlib import colormaps  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    rows = _rows(results)
    if not rows:
        return False
    measured = dict.fromkeys(which for row in rows for which in results[row])
    systems = [which for which in measured if which.kind != "device"]
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    width = _GROUP / len(systems)
    for number, which in enumerate(systems):
        positions = [group - _GROUP / 2 + (number + 0.5) * width for group in range(len(rows))]
        busy = [results[row][which].busy if which in results[row] else 0.0 for row in rows]
        colours = colormaps[_DAEMON if which.kind == "consumer" else _PEERS]
        bars = axes.bar(positions, busy, width, label=str(which), color=colours(_shade(which)))
        axes.bar_label(bars, fmt="%.2f", fontsize=6)
    axes.axhline(1.0, color="lightgrey", linewidth=0.8, zorder=0)  # the device alone
    axes.set_xticks(range(len(rows)), [f"{row.milliseconds} ms" for row in rows])
    axes.set_ylabel("part of the time in which the device works")
    axes.set_title(f"{rows[0].side}x{rows[0].side} {rows[0].file_format.upper()}")
    axes.set_ylim(0, 1.08)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(file, dpi=_DOTS, metadata={"Software": None})
    return True


def _rows(results: Results) -> Sequence[Row]:
    side = max(row.side for row in results)
    candidates = [
        row
        for row in results
        # A device that takes no time has no utilization.
        if row.device == "sleeps" and row.file_format == "png" and row.milliseconds
    ]
    return sorted((row for row in candidates if row.side == side), key=lambda row: row.milliseconds)


def _shade(which: Which) -> float:
    """Return a shade; more deliveries in flight are darker."""
    if which.kind == "consumer":
        return 0.3 + 0.2 * which.at_once
    return {"serial": 0.3, "fastapi": 0.5, "faststream": 0.7}[which.kind] + 0.1 * which.fair
