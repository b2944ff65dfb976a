"""`python -m tests.soak`: kill processes and send requests at random, then check the results."""

import asyncio
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

import click

from tests.soak.scenes import Options
from tests.soak.soaking import soak


@click.command()
@click.option("--requests", default=300, show_default=True, help="Distinct request ids.")
@click.option("--workers", default=2, show_default=True, help="Daemon processes.")
@click.option("--minutes", default=3.0, show_default=True, help="How long the chaos lasts.")
@click.option("--seed", type=int, help="Repeats what is sent and what is killed.")
@click.option("--hostile", is_flag=True, help="One of the senders is an attacker.")
@click.option("--attack", "attacks", multiple=True, help="Pattern of the attacks; default: all.")
@click.option("--chaos/--no-chaos", default=True, show_default=True, help="Kill processes.")
@click.option("--keep", is_flag=True, help="Keep the folder of a clean soak too.")
def main(
    requests: int,
    workers: int,
    minutes: float,
    seed: int | None,
    attacks: tuple[str, ...],
    *,
    hostile: bool,
    chaos: bool,
    keep: bool,
) -> None:
    """Kill processes at random, then check every guarantee. Exit with 1 after a violation."""
    seed = secrets.randbelow(2**32) if seed is None else seed
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    click.echo(f"seed {seed}, logs in {folder}")
    options = Options(
        requests=requests,
        workers=workers,
        seconds=minutes * 60,
        seed=seed,
        hostile=hostile,
        attacks=attacks or ("*",),
        chaos=chaos,
    )
    violations = asyncio.run(_soak(options, folder, keep=keep))
    if violations:
        click.echo(f"{len(violations)} problems (seed {seed}, everything is kept in {folder}):")
        click.echo("\n".join(violations))
        sys.exit(1)
    if not keep:
        shutil.rmtree(folder)
    click.echo("clean")


async def _soak(options: Options, folder: Path, *, keep: bool) -> list[str]:
    async with soak(options, folder) as soaked:
        click.echo("\n".join(soaked.figures()))
        violations = soaked.problems()
        if violations or keep:
            soaked.save()
        return violations


if __name__ == "__main__":
    main()
