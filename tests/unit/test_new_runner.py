"""The files that `consumer new runner` writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from consumer.app.new_runner import NameTaken, write_runner
from consumer.runners import ModelConfig
from consumer.runners.custom.custom_model import load


def test_the_test_of_a_new_runner_passes(tmp_path: Path) -> None:
    runner, test = write_runner("my_model", tmp_path)
    assert (runner.name, test.name) == ("my_model.py", "test_my_model.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test.name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_a_new_runner_is_loaded_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_runner("blank", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = load(ModelConfig(runner="blank:Blank", device="cpu"))
    assert (model.description.info.id, model.description.info.revision) == ("blank", "0.1")


@pytest.mark.parametrize("existing", ["my_model.py", "test_my_model.py"])
def test_no_file_is_replaced(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("mine")
    with pytest.raises(NameTaken, match=existing):
        write_runner("my_model", tmp_path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]
