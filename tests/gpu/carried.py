"""Packages for a machine without a network: `python -m tests.gpu.carried ARCHIVE.tar.xz`.

The GPU machine has Python, torch and the usual scientific packages. Everything else that the check
needs is installed into a folder by uv, in the versions of uv.lock and for that machine, and packed
into one archive of at most 60 MB. On the GPU machine, in the checkout:

    mkdir site && tar xf ARCHIVE.tar.xz -C site
    PATH=$PWD/site/bin:$PATH PYTHONPATH=$PWD:$PWD/contracts:$PWD/site python -m tests.gpu
"""

import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
LIMIT = 60.0  # MB
# A machine for machine learning has these, in versions that fit its torch.
THERE = frozenset(
    (
        *("torch", "torchvision", "triton", "numpy", "scipy", "pillow", "safetensors"),
        *("setuptools", "jinja2", "markupsafe", "mpmath", "sympy", "networkx", "fsspec"),
        *("filelock", "packaging", "pyyaml", "regex", "requests", "tqdm", "psutil", "hf-xet"),
        *("idna", "charset-normalizer", "protobuf", "sentencepiece", "pygments"),
    )
)
# Not needed for the check, or too large for the limit; `--with` adds them.
LEFT_OUT = frozenset(("av", "bitsandbytes", "textual-image"))
_NAME = re.compile(r"^([A-Za-z0-9._-]+)==")
_VENDORED = ("nvidia-", "cuda-")


def needed(
    requirements: Iterable[str], included: Iterable[str] = (), left_out: Iterable[str] = ()
) -> Iterator[str]:
    """Yield the requirements that the GPU machine lacks.

    Args:
        requirements: Lines of `uv export`, each with an exact version.
        included: Names of packages that are needed in spite of `THERE` and `LEFT_OUT`.
        left_out: Names of further packages that it has.
    """
    for line in requirements:
        found = _NAME.match(line)
        if found is None:
            continue
        name = found[1].lower()
        missing = name not in THERE | LEFT_OUT and not name.startswith(_VENDORED)
        if (missing or name in included) and name not in left_out:
            yield line


def _requirements() -> list[str]:
    command = ["uv", "export", "--locked", "--quiet", "--no-dev", "--no-emit-workspace"]
    command += ["--no-hashes", "--no-header", "--no-annotate"]
    command += ["--extra", "devstack", "--extra", "quantization"]
    exported = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return exported.stdout.splitlines()


def _install(requirements: Iterable[str], folder: Path, python: str, platform: str) -> None:
    file = folder.with_suffix(".txt")
    # The daemon reads its version from the metadata of its package.
    file.write_text("\n".join([*requirements, str(ROOT), str(ROOT / "contracts")]))
    command = ["uv", "pip", "install", "--quiet", "--no-deps", "--link-mode", "copy"]
    command += ["--target", str(folder), "--requirements", str(file)]
    command += ["--python-version", python, "--python-platform", platform]
    subprocess.run(command, cwd=ROOT, check=True)
    for package in ("consumer", "generation_contracts", "generation_client"):
        shutil.rmtree(folder / package)  # the checkout has the code


def _pack(folder: Path, archive: Path) -> float:
    """Write the archive; return its size in MB."""
    with tarfile.open(archive, "w:xz", preset=9) as packed:
        for entry in sorted(folder.iterdir()):
            packed.add(entry, entry.name)
    return archive.stat().st_size / 1e6


@click.command()
@click.argument("archive", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--python", default="3.12", show_default=True, help="Python of the GPU machine.")
@click.option("--platform", default="x86_64-manylinux_2_28", show_default=True)
@click.option("--with", "included", multiple=True, help="A package that is otherwise left out.")
@click.option("--without", multiple=True, help="A further package that the GPU machine has.")
@click.option("--limit", default=LIMIT, show_default=True, help="MB.")
def main(
    archive: Path,
    *,
    python: str,
    platform: str,
    included: tuple[str, ...],
    without: tuple[str, ...],
    limit: float,
) -> None:
    """Pack what the GPU machine lacks into ARCHIVE.

    Exits with 1 if the archive is larger than the limit.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "site"
        chosen = list(needed(_requirements(), included, without))
        _install(chosen, folder, python, platform)
        click.echo("\n".join(chosen))
        size = _pack(folder, archive)
    click.echo(f"{archive}: {size:.1f} MB")
    if size > limit:
        raise click.ClickException(f"more than {limit:g} MB")


if __name__ == "__main__":
    main()
