"""Rules, dashboard and documentation use the metrics that a worker and a gateway export.

If promtool is on the PATH, it also checks the rules.
"""

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from consumer.app.metrics import Metrics
from consumer.app.probes import Health
from consumer.gateway.metrics import GatewayMetrics
from consumer.settings import Settings
from consumer.telemetry import JobReport
from generation_contracts import FailureCode, ModelInfo, Task
from generation_contracts.base import DEFAULT_QUEUES
from tests.support.yaml_files import load_yaml

ROOT = Path(__file__).parents[2]
OBSERVABILITY = ROOT / "infra/observability"
PAGE = ROOT / "docs/reference/observability.md"
PROMTOOL = shutil.which("promtool")

# The labels that Prometheus adds to each series.
ADDED = {"job", "instance"}
# Metrics of prometheus-nats-exporter, with some of their labels.
EXPORTER = {
    "jetstream_consumer_num_pending": {"stream_name", "consumer_name", "is_consumer_leader"},
    "jetstream_consumer_num_ack_pending": {"stream_name", "consumer_name", "is_consumer_leader"},
    "jetstream_stream_total_messages": {"stream_name", "is_stream_leader"},
    "jetstream_stream_total_bytes": {"stream_name", "is_stream_leader"},
}
PROMETHEUS_OWN: dict[str, set[str]] = {"up": set()}
GATEWAY_CONDITIONS = ("bus", "keys", "gateway")


# -- exported metrics -----------------------------------------------------------------------------


def families() -> Iterator[Any]:
    """Yield all metric families of a worker."""
    metrics = Metrics(str(Task.TEXT_TO_IMAGE))
    for attempt, outcome in enumerate(("succeeded", *FailureCode), start=1):
        metrics.job_started()
        metrics.job_finished(
            JobReport(str(outcome), attempt, queued=1, inference=1, encode=1, upload=1)
        )
    metrics.device_busy(1)
    for code in FailureCode:
        metrics.call_refused(code)
        metrics.chain_broken(code)
    metrics.store_reachable(reachable=False)
    metrics.readiness(Health().conditions())
    metrics.model_loaded(
        ModelInfo(
            id="model",
            revision="main",
            family="F",
            dtype="float32",
            device="cpu",
            libraries=dict.fromkeys(("diffusers", "torch", "transformers"), "1"),
        )
    )
    yield from text_string_to_metric_families(generate_latest(metrics.registry).decode())


def gateway_families() -> Iterator[Any]:
    """Yield all metric families of a gateway."""
    metrics = GatewayMetrics()
    metrics.request_ended("POST", "/v1/jobs", 202, 0.1)
    metrics.refused("queue_full")
    conditions = dict.fromkeys(GATEWAY_CONDITIONS, "ok")
    text = metrics.exposition(requests=1, streams=1, event_bytes=1, conditions=conditions)
    yield from text_string_to_metric_families(text.decode())


@functools.cache
def exposed() -> dict[str, set[str]]:
    """Return the names of all samples, with their labels."""
    found: dict[str, set[str]] = {}
    for family in (*families(), *gateway_families()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


# -- names in PromQL ------------------------------------------------------------------------------

TOKEN = re.compile(
    r"""(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<range>\[[^\]]*\])
      | (?P<word>[A-Za-z_:$][A-Za-z0-9_:]*)
      | (?P<number>[0-9][0-9a-zA-Z_.]*)
      | (?P<sign>=~|!~|!=|[<>=]=|\S)""",
    re.VERBOSE,
)
WITH_LABELS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
WORDS = {"and", "or", "unless", "bool", "offset"}


def names_in(expr: str) -> tuple[dict[str, set[str]], set[str]]:
    """Return the metrics of an expression with their selector labels, and all other labels."""
    tokens = [(match.lastgroup, match.group()) for match in TOKEN.finditer(expr)]
    metrics: dict[str, set[str]] = {}
    others: set[str] = set()
    at = 0
    while at < len(tokens):
        kind, text = tokens[at]
        following = tokens[at + 1][1] if at + 1 < len(tokens) else ""
        at += 1
        if kind != "word" or text in WORDS:
            continue
        if text in WITH_LABELS:
            labels, at = _words_until(tokens, at, ")")
            others |= labels
        elif following == "{":
            labels, at = _words_until(tokens, at, "}")
            metrics.setdefault(text, set()).update(labels)
        elif following != "(" and tokens[at : at + 1] and following in WITH_LABELS:
            continue  # an aggregation, as in `sum by (task) (…)`
        elif following != "(":
            metrics.setdefault(text, set())
    return metrics, others


def _words_until(tokens: list[tuple[str | None, str]], at: int, end: str) -> tuple[set[str], int]:
    words = set()
    while tokens[at][1] != end:
        kind, text = tokens[at]
        if kind == "word":
            words.add(text)
        at += 1
    return words, at + 1


@pytest.mark.parametrize(
    ("expr", "metrics", "others"),
    [
        ("up == 0", {"up": set()}, set()),
        ('a_total{x="b",y=~"c|d{e}"}[5m]', {"a_total": {"x", "y"}}, set()),
        (
            "sum by (q, r) (rate(a[$__rate_interval])) / on (q) s:t:u",
            {"a": set(), "s:t:u": set()},
            {"q", "r"},
        ),
        ("sum(rate(a[5m])) by (q)", {"a": set()}, {"q"}),
        ("a and b or c unless a offset 5m > bool 1e3", {"a": set(), "b": set(), "c": set()}, set()),
        ("sum without (q) (a)", {"a": set()}, {"q"}),
    ],
)
def test_names_are_found_in_an_expression(
    expr: str, metrics: dict[str, set[str]], others: set[str]
) -> None:
    assert names_in(expr) == (metrics, others)


# -- the files ------------------------------------------------------------------------------------


def rules() -> list[dict[str, Any]]:
    """Return the rules of all groups."""
    loaded = load_yaml(OBSERVABILITY / "alerts.yaml")
    return [rule for group in loaded["groups"] for rule in group["rules"]]


ALERTS = [rule for rule in rules() if "alert" in rule]
DASHBOARD = json.loads((OBSERVABILITY / "grafana/dashboards/generation.json").read_text())


def panels() -> Iterator[dict[str, Any]]:
    """Yield all panels, including panels in collapsed rows."""
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", ())


def targets() -> Iterator[tuple[str, str]]:
    """Yield the titles and expressions of the dashboard."""
    for panel in panels():
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def expressions() -> list[tuple[str, str]]:
    """Return every expression with its rule name or panel title."""
    of_rules = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]
    return of_rules + list(targets())


def recorded() -> dict[str, set[str]]:
    """Return the series of the recording rules, with their remaining labels."""
    return {rule["record"]: names_in(rule["expr"])[1] for rule in rules() if "record" in rule}


@pytest.mark.parametrize(("where", "expr"), expressions())
def test_expression_uses_existing_names_and_labels(where: str, expr: str) -> None:
    known = exposed() | EXPORTER | PROMETHEUS_OWN | recorded()
    metrics, others = names_in(expr)
    assert metrics, f"{where}: no metric in it"
    assert metrics.keys() <= known.keys(), where
    for name, labels in metrics.items():
        assert labels <= known[name] | ADDED, f"{where}: {name}"
    of_all = set().union(*(known[name] for name in metrics)) | ADDED
    if "label_replace" in expr:
        of_all.add("queue")
    assert others <= of_all, where


@pytest.mark.parametrize(("where", "expr"), expressions())
def test_only_one_group_needs_the_nats_exporter(where: str, expr: str) -> None:
    loaded = load_yaml(OBSERVABILITY / "alerts.yaml")
    its_own = next(one for one in loaded["groups"] if one["name"] == "generation-nats-exporter")
    (closed,) = [panel for panel in DASHBOARD["panels"] if panel.get("collapsed")]
    allowed = {rule.get("alert") or rule["record"] for rule in its_own["rules"]}
    allowed |= {panel["title"] for panel in closed["panels"]}
    used = names_in(expr)[0].keys()
    of_exporter = EXPORTER.keys() | {one["record"] for one in its_own["rules"] if "record" in one}
    assert where in allowed or not used & of_exporter


def test_recording_rule_is_used_more_than_once() -> None:
    used = [name for rule in rules() for name in names_in(rule["expr"])[0]]
    assert {name: used.count(name) >= 2 for name in recorded()} == dict.fromkeys(recorded(), True)


# -- alerts ---------------------------------------------------------------------------------------


def anchors() -> set[str]:
    """Return the anchors of the page, as GitHub generates them from headings."""
    headings = re.findall(r"^#+ (.+)$", PAGE.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("alert", ALERTS, ids=[alert["alert"] for alert in ALERTS])
def test_alert_has_a_description_and_a_runbook_link(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    assert alert["for"]
    assert all(alert["annotations"][name] for name in ("summary", "description"))
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert ROOT / page == PAGE
    assert anchor in anchors()
    assert alert["alert"] in PAGE.read_text()


def test_alert_names_are_unique_and_tested() -> None:
    names = [alert["alert"] for alert in ALERTS]
    assert len(names) == len(set(names))
    loaded = load_yaml(OBSERVABILITY / "alerts_test.yaml")
    tried = [one for test in loaded["tests"] for one in test["alert_rule_test"]]
    assert {one["alertname"] for one in tried if one["exp_alerts"]} == set(names)
    assert {one["alertname"] for one in loaded["tests"][0]["alert_rule_test"]} == set(names)


def test_queue_alert_fires_at_80_percent() -> None:
    (alert,) = [alert for alert in ALERTS if alert["alert"] == "GenerationQueueNearlyFull"]
    bounds = re.findall(r"/ (\d+) > 0\.8", alert["expr"])
    for task in DEFAULT_QUEUES:
        stream = ROOT / f"infra/nats/streams/GENERATION_REQUESTS_{task.upper()}.json"
        of = json.loads(stream.read_text())
        assert bounds == [str(of["max_msgs"]), str(of["max_bytes"])]


def test_results_alert_fires_at_70_percent() -> None:
    (alert,) = [alert for alert in ALERTS if alert["alert"] == "GenerationResultsNearlyFull"]
    (bound,) = re.findall(r"/ (\d+) > 0\.7", alert["expr"])
    stream = json.loads((ROOT / "infra/nats/streams/GENERATION_RESULTS.json").read_text())
    assert bound == str(stream["max_bytes"])


@pytest.mark.parametrize("condition", Health().conditions())
def test_failed_readiness_condition_has_an_alert(condition: str) -> None:
    """A separate alert or the general alert covers the condition."""
    text = " ".join(alert["expr"] for alert in ALERTS)
    (others,) = re.findall(r'condition!~"([^"]+)"', text)
    its_own = {"store": "generation_store_reachable == 0", "streams": 'condition="streams"} == 0'}
    assert set(others.split("|")) == set(its_own)
    assert condition not in its_own or its_own[condition] in text


# -- the dashboard --------------------------------------------------------------------------------


def test_panels_have_unique_ids_and_positions() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    occupied: dict[tuple[int, int], str] = {}
    for panel in panels():
        position = panel["gridPos"]
        assert position["x"] + position["w"] <= 24
        for x in range(position["x"], position["x"] + position["w"]):
            for y in range(position["y"], position["y"] + position["h"]):
                assert (x, y) not in occupied, f"{panel['title']} on {occupied[x, y]}"
                occupied[x, y] = panel["title"]


def test_every_panel_has_targets_and_a_description() -> None:
    for panel in panels():
        if panel["type"] == "row":
            continue
        assert panel["description"], panel["title"]
        assert panel["targets"], panel["title"]
        assert all(target["expr"] for target in panel["targets"]), panel["title"]


def test_dashboard_variables_exist_and_are_used() -> None:
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)\}?", json.dumps(DASHBOARD)))
    assert used - {"__rate_interval", "__all"} == variables


def sources_in(value: Any) -> Iterator[Any]:
    """Yield every data source in a nested value."""
    if isinstance(value, dict):
        if "datasource" in value:
            yield value["datasource"]
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from sources_in(one)


def test_dashboard_names_no_data_source() -> None:
    by_variable = {"type": "prometheus", "uid": "${datasource}"}
    sources = list(sources_in(DASHBOARD))
    assert sources == [by_variable] * len(sources)
    asking = [
        part for panel in panels() if panel["type"] != "row" for part in (panel, *panel["targets"])
    ]
    assert all(part["datasource"] == by_variable for part in asking)
    provisioned = load_yaml(OBSERVABILITY / "grafana/provisioning/datasources/prometheus.yaml")
    assert all("uid" not in source for source in provisioned["datasources"])


def test_dashboard_refreshes_automatically() -> None:
    assert DASHBOARD["refresh"]
    assert DASHBOARD["schemaVersion"] >= 42
    assert DASHBOARD["uid"]
    assert DASHBOARD["id"] is None  # Grafana assigns the id


# -- the configuration ----------------------------------------------------------------------------


def test_prometheus_scrapes_workers_and_gateway_and_loads_the_rules() -> None:
    config = load_yaml(OBSERVABILITY / "prometheus.yml")
    jobs = {
        job["job_name"]: [target for one in job["static_configs"] for target in one["targets"]]
        for job in config["scrape_configs"]
    }
    assert jobs["generation"] == [f"{task.replace('_', '-')}:8080" for task in DEFAULT_QUEUES]
    assert jobs["gateway"] == [f"gateway:{Settings.model_fields['gateway_port'].default}"]
    assert [OBSERVABILITY / name for name in config["rule_files"]] == [
        OBSERVABILITY / "alerts.yaml"
    ]
    used = set(re.findall(r'job="(\w+)"', " ".join(rule["expr"] for rule in rules())))
    assert used == jobs.keys()


# -- the documentation ----------------------------------------------------------------------------


def test_documentation_has_every_metric_with_type_and_labels() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \|", PAGE.read_text(), re.MULTILINE)
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    really = {}
    for family in (*families(), *gateway_families()):
        if family.name.endswith("_created"):  # prometheus_client adds it to each counter
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        really[name] = (family.type, labels)
    if not Path("/proc/self/stat").exists():  # then the client exports no process metrics
        documented = {
            name: what for name, what in documented.items() if not name.startswith("process_")
        }
    assert documented == really


# -- promtool -------------------------------------------------------------------------------------


@pytest.mark.skipif(
    PROMTOOL is None and "PROMTOOL_REQUIRED" not in os.environ,
    reason="promtool is not on the PATH",
)
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "alerts.yaml"),
        ("check", "config", "prometheus.yml"),
        ("test", "rules", "alerts_test.yaml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts_the_rules(arguments: tuple[str, ...]) -> None:
    run = subprocess.run(
        [str(PROMTOOL), *arguments], cwd=OBSERVABILITY, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
