"""The GPU check: on a CPU as a whole, with sections that fail, and on a GPU where there is one."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.carried import needed
from tests.gpu.check import Row
from tests.gpu.report import Report, found
from tests.gpu.running import Ended, Section, run_sections
from tests.gpu.sections import SECTIONS

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["device"] == "cpu"
    assert {name: ended["problem"] for name, ended in report["sections"].items()} == {
        section.name: "" for section in SECTIONS
    }
    checked = {row["section"] for row in report["rows"] if row["ok"]}
    assert checked == {section.name for section in SECTIONS}
    page = (tmp_path / "report.md").read_text()
    assert "device cpu" in page
    assert all(f"## {section.title}" in page for section in SECTIONS)


def test_a_section_that_fails_keeps_its_rows_and_the_next_one_runs(tmp_path: Path) -> None:
    sections = [
        Section(name, name, limit, "tests.gpu.faulty_section")
        for name, limit in (("crashes", 30), ("hangs", 1), ("raises", 30), ("ends", 30))
    ]
    # Its process ends before the check starts the section.
    sections.insert(1, Section("missing", "missing", 30, "tests.gpu.no_such_section"))
    report = Report("cpu", "2026-01-01", sections)
    for section, ended in run_sections(
        sections, "cpu", seconds=120, on_start=lambda _: None, on_row=report.rows.append
    ):
        report.ended[section.name] = ended
        report.write(tmp_path)
    assert [row.section for row in report.rows if row.name == "before"] == [
        "crashes",
        "hangs",
        "raises",
        "ends",
    ]
    assert {name: ended.problem for name, ended in report.ended.items()} == {
        "crashes": "ended by SIGSEGV",
        "missing": "",
        "hangs": "stopped after 2 s, its limit",
        "raises": "",
        "ends": "",
    }
    missing = "ModuleNotFoundError: No module named 'tests.gpu.no_such_section'"
    assert report.failures == [
        f"missing: the section: failed {missing}",
        "raises: the section: failed ValueError: two lines",
        "crashes: ended by SIGSEGV",
        "hangs: stopped after 2 s, its limit",
    ]
    assert json.loads((tmp_path / "report.json").read_text())["sections"].keys() == {
        section.name for section in sections
    }


def test_a_section_without_time_left_is_not_started() -> None:
    section = Section("ends", "ends", 30, "tests.gpu.faulty_section")
    rows: list[Row] = []
    ((_, ended),) = run_sections(
        [section], "cpu", seconds=0, on_start=lambda _: None, on_row=rows.append
    )
    assert ended.problem == "not started: the time of the whole check is over"
    assert rows == []


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (Row("s", "n", 0.12345, "s"), "0.123 s"),
        (Row("s", "n", 1234.5, "ms"), "1234 ms"),
        (Row("s", "n", "yes"), "yes"),
        (Row("s", "n", 40), "40"),
    ],
    ids=["small", "large", "text", "no unit"],
)
def test_value_of_a_row(row: Row, text: str) -> None:
    assert found(row) == text


def test_a_bar_in_a_note_does_not_break_the_table() -> None:
    section = Section("s", "S", 1, "none")
    report = Report("cpu", "2026-01-01", [section], [Row("s", "n", note="a|b\nc")])
    report.ended["s"] = Ended(1.0)
    assert report.markdown().endswith("| n |  |  | a\\|b c |\n")


def test_packages_that_a_gpu_machine_lacks() -> None:
    exported = [
        "diffusers==0.42.1",
        "torch==2.15.0",
        "nvidia-cublas==13.1 ; sys_platform == 'linux'",
        "nkeys==0.2.1",
        "bitsandbytes==0.50.2",
        "./contracts",
        "# a comment",
    ]
    assert list(needed(exported)) == ["diffusers==0.42.1", "nkeys==0.2.1"]
    assert "bitsandbytes==0.50.2" in needed(exported, included=["bitsandbytes"])
    assert list(needed(exported, left_out=["diffusers"])) == ["nkeys==0.2.1"]


def test_models_have_the_sizes_of_the_published_ones() -> None:
    torch = importlib.import_module("torch")
    models = importlib.import_module("tests.gpu.models")
    device = importlib.import_module("consumer.runners.device")
    # Tensors on this device have a shape and no content.
    nowhere = device.Placement(torch.device("meta"), torch.bfloat16)

    def billions(module: object) -> float:
        return round(sum(one.numel() for one in module.parameters()) / 1e9, 1)  # type: ignore[attr-defined]

    pipe = models.flux(models.FLUX_DEV, nowhere)
    model, _ = models.qwen(models.QWEN_7B, nowhere)
    assert billions(pipe.transformer) == 11.9
    assert billions(pipe.text_encoder_2) == 4.8
    assert billions(model) == 8.3


@pytest.mark.gpu
@pytest.mark.timeout(400)
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_section_on_a_gpu(section: Section) -> None:
    report = Report("cuda", "", [section])
    for one, ended in run_sections(
        [section],
        "cuda",
        seconds=2 * section.limit,
        on_start=lambda _: None,
        on_row=report.rows.append,
    ):
        report.ended[one.name] = ended
    assert report.failures == []
    assert report.rows
