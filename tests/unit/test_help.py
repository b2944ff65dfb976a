"""The help pages of the `consumer` command."""

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from consumer.app.cli import cli


def groups(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of each command that has commands of its own."""
    yield path
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from groups(command, (*path, name))


@pytest.mark.parametrize(
    "words", list(groups(cli)), ids=lambda words: " ".join(words) or "consumer"
)
def test_no_line_of_a_list_of_commands_is_cut_at_80_columns(words: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(cli, [*words, "--help"], terminal_width=80).output
    commands = shown.partition("Commands:\n")[2].splitlines()
    assert commands
    assert [line for line in commands if line.endswith("...")] == []
