"""The manifests under infra/k8s, as written and as built by kustomize.

kubernetes-validate checks the manifests against the schemas of Kubernetes. The schemas in
`schemas/` are for the resources of KEDA and the Prometheus Operator. The tests compare the settings
with the daemon.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import jsonschema
import kubernetes_validate
import pytest
import yaml
from fastapi.routing import APIRoute

from consumer.app.composition import make_topology
from consumer.app.daemon import FORCED_STOP_TIMEOUT
from consumer.app.metrics import Metrics
from consumer.app.probes import SHUTDOWN_TIMEOUT, Probes, Telemetry
from consumer.app.tracing import FLUSH_TIMEOUT_MS
from consumer.bus.connection import CLOSE_TIMEOUT, connect
from consumer.endpoints.worker_service import DRAIN_TIMEOUT
from consumer.gateway import health
from consumer.gateway.app import CONNECT_WITHIN, ROUTERS
from consumer.gateway.in_flight import ALWAYS_ANSWERED, END_WITHIN
from consumer.gateway.jobs import CLOSE_WITHIN
from consumer.gateway.serve import require_keys_if_reachable
from consumer.inference.monitor import DRAIN_STEP_TIMEOUT
from consumer.settings import Settings
from generation_contracts import Task
from generation_contracts.base import DEFAULT_QUEUES
from tests.support.yaml_files import load_yaml, load_yaml_documents

ROOT = Path(__file__).parents[2]
K8S = ROOT / "infra/k8s"
NATS = ROOT / "infra/nats"
SCHEMAS = Path(__file__).parent / "schemas"
BUILDS = ("base", "overlays/cpu", "overlays/production")
KUBERNETES = ("1.29", "1.37")  # the oldest that has every field, and the newest known

# Environment variables of libraries, in addition to the daemon's settings.
OF_LIBRARIES = {"HOME", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"}

Manifest = dict[str, Any]


# -- reading --------------------------------------------------------------------------------------


def written() -> list[Manifest]:
    """Return every manifest as written."""
    found = []
    for file in sorted(K8S.rglob("*.yaml")):
        if file.name != "kustomization.yaml":
            found += load_yaml_documents(file)
    return found


@cache
def built(overlay: str) -> str:
    """Return the output of kustomize for an overlay."""
    if shutil.which("kustomize"):
        command = ["kustomize", "build"]
    elif shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    elif os.environ.get("KUSTOMIZE_REQUIRED"):
        pytest.fail("neither kustomize nor kubectl is on the PATH")
    else:
        pytest.skip("neither kustomize nor kubectl is on the PATH: nothing was built")
    ended = subprocess.run([*command, K8S / overlay], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "deprecated" not in ended.stderr
    return ended.stdout


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest) -> list[Manifest]:
    """The manifests of one overlay."""
    return list(yaml.safe_load_all(built(request.param)))


@pytest.fixture
def production() -> list[Manifest]:
    return list(yaml.safe_load_all(built("overlays/production")))


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [each for each in manifests if each["kind"] in kinds]


def workers(manifests: list[Manifest]) -> list[Manifest]:
    """The Deployments of `consumer run`."""
    return [
        each
        for each in of_kind(manifests, "Deployment")
        if pod_labels(each)["app.kubernetes.io/name"] == "generation-consumer"
    ]


def gateways(manifests: list[Manifest]) -> list[Manifest]:
    """The Deployments of `consumer gateway`."""
    found = of_kind(manifests, "Deployment")
    return [each for each in found if each not in workers(manifests)]


def with_pods(manifests: list[Manifest]) -> list[Manifest]:
    found = of_kind(manifests, "Deployment", "Job")
    assert found
    return found


def pod(manifest: Manifest) -> Manifest:
    return manifest["spec"]["template"]["spec"]


def container(manifest: Manifest) -> Manifest:
    (only,) = pod(manifest)["containers"]
    assert "initContainers" not in pod(manifest)
    return only


def pod_labels(manifest: Manifest) -> dict[str, str]:
    return manifest["spec"]["template"]["metadata"]["labels"]


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    matching = all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())
    for each in selector.get("matchExpressions", []):
        assert each["operator"] == "In"
        matching = matching and labels.get(each["key"]) in each["values"]
    return matching


def config_map(manifests: list[Manifest]) -> dict[str, str]:
    (only,) = of_kind(manifests, "ConfigMap")
    return only["data"]


def environment(manifest: Manifest, manifests: list[Manifest]) -> dict[str, str]:
    """Return the environment of a container."""
    found: dict[str, str] = {}
    for source in container(manifest).get("envFrom", []):
        (settings,) = of_kind(manifests, "ConfigMap")
        assert source == {"configMapRef": {"name": settings["metadata"]["name"]}}
        found |= settings["data"]
    return found | {each["name"]: each["value"] for each in container(manifest).get("env", [])}


def literals(overlay: str) -> dict[str, str]:
    """Return the settings that an overlay changes."""
    kustomization = load_yaml(K8S / overlay / "kustomization.yaml")
    (generator,) = kustomization["configMapGenerator"]
    return dict(each.split("=", 1) for each in generator["literals"])


def base_settings() -> dict[str, str]:
    lines = (K8S / "base/settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def settings_of(
    manifest: Manifest,
    manifests: list[Manifest],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Settings:
    """Return the settings that the daemon reads in a container."""
    for name in list(os.environ):
        if name.lower() in Settings.model_fields:
            monkeypatch.delenv(name)
    for name, value in environment(manifest, manifests).items():
        if name not in OF_LIBRARIES:
            monkeypatch.setenv(name, value)
    file = tmp_path / "s3.toml"
    file.write_text('[s3]\naccess_key = "a"\nsecret_key = "b"\n')
    return Settings.load(file)


# -- schemas --------------------------------------------------------------------------------------


def validate(manifest: Manifest) -> None:
    """Raise if an API server would refuse the manifest or drop a field."""
    schemas = {"ScaledObject": "scaledobject.json", "PodMonitor": "podmonitor.json"}
    if manifest["kind"] not in schemas:
        for version in KUBERNETES:
            kubernetes_validate.validate(manifest, version, strict=True)
        return
    schema = json.loads((SCHEMAS / schemas[manifest["kind"]]).read_text())
    jsonschema.Draft202012Validator(schema).validate(manifest)
    triggers = json.loads((SCHEMAS / "nats-jetstream.json").read_text())
    for trigger in manifest["spec"].get("triggers", []):
        assert trigger["type"] == "nats-jetstream"
        jsonschema.Draft202012Validator(triggers).validate(trigger["metadata"])


def test_written_manifest_is_valid() -> None:
    assert {each["kind"] for each in written()} >= {"Deployment", "ScaledObject", "PodMonitor"}
    for manifest in written():
        validate(manifest)


def test_built_manifest_is_valid(build: list[Manifest]) -> None:
    for manifest in build:
        validate(manifest)
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "generation"
    names = [(each["kind"], each["metadata"]["name"]) for each in build]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("Deployment", lambda spec: spec.update(replica=1)),
        ("PodMonitor", lambda spec: spec["podMetricsEndpoints"][0].update(paths="/metrics")),
        ("ScaledObject", lambda spec: spec.update(maxReplicas=1)),
        ("ScaledObject", lambda spec: spec["triggers"][0]["metadata"].update(lag="1")),
        ("ScaledObject", lambda spec: spec["triggers"][0]["metadata"].pop("stream")),
        ("ScaledObject", lambda spec: spec["triggers"][0]["metadata"].update(lagThreshold=1)),
    ],
)
def test_invalid_field_is_detected(kind: str, spoil: Callable[[Manifest], None]) -> None:
    manifest = of_kind(written(), kind)[0]
    spoil(manifest["spec"])
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(manifest)


# -- references -----------------------------------------------------------------------------------


def test_referenced_names_exist(build: list[Manifest]) -> None:
    def names(kind: str) -> set[str]:
        return {each["metadata"]["name"] for each in of_kind(build, kind)}

    for manifest in with_pods(build):
        assert pod(manifest)["serviceAccountName"] in names("ServiceAccount")
        volumes = {each["name"]: each for each in pod(manifest)["volumes"]}
        mounts = [each["name"] for each in container(manifest)["volumeMounts"]]
        assert sorted(mounts) == sorted(volumes)
        for volume in volumes.values():
            assert len(volume) == 2, volume  # a name and one source: a merge can leave two
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in names("PersistentVolumeClaim")
    for scaled in of_kind(build, "ScaledObject"):
        assert scaled["spec"]["scaleTargetRef"]["name"] in names("Deployment")


def test_selectors_match_their_pods(build: list[Manifest]) -> None:
    assert len(workers(build)) == len(DEFAULT_QUEUES)
    budgets = of_kind(build, "PodDisruptionBudget")
    for deployment in of_kind(build, "Deployment"):
        selectors = [
            deployment["spec"]["selector"],
            *(each["labelSelector"] for each in pod(deployment)["topologySpreadConstraints"]),
        ]
        selectors += [
            each["spec"]["selector"]
            for each in budgets
            if each["metadata"]["name"] == deployment["metadata"]["name"]
        ]
        assert len(selectors) == 4
        for selector in selectors:
            # Each selector must match only the pods of its Deployment.
            chosen = [each for each in with_pods(build) if selects(selector, pod_labels(each))]
            assert chosen == [deployment]
    for monitor in of_kind(build, "PodMonitor"):
        chosen = [
            d for d in with_pods(build) if selects(monitor["spec"]["selector"], pod_labels(d))
        ]
        assert chosen in (workers(build), gateways(build))
        prometheus = load_yaml(ROOT / "infra/observability/prometheus.yml")
        jobs = {pod_labels(each)[monitor["spec"]["jobLabel"]] for each in chosen}
        number = 0 if chosen == workers(build) else 1
        # The labels that the alerts use.
        assert jobs == {prometheus["scrape_configs"][number]["job_name"]}


# -- settings -------------------------------------------------------------------------------------


def test_every_setting_exists() -> None:
    names = set(base_settings()) | set(literals("overlays/cpu"))
    names |= set(literals("overlays/production"))
    for manifest in with_pods(written()):
        names |= {each["name"] for each in container(manifest).get("env", [])}
    for file in K8S.rglob("kustomization.yaml"):
        for patch in load_yaml(file).get("patches", []):
            names |= set(re.findall(r"^\s*name: ([A-Z][A-Z0-9_]+)$", patch["patch"], re.MULTILINE))
    assert {"MODEL_TYPE", "MODEL_ID", "NATS_URL"} <= names
    assert names - OF_LIBRARIES <= {name.upper() for name in Settings.model_fields}


def test_daemon_settings_are_valid(
    build: list[Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tasks = set()
    for deployment in workers(build):
        settings = settings_of(deployment, build, monkeypatch, tmp_path)
        tasks.add(settings.task)
        label = deployment["metadata"]["labels"]["app.kubernetes.io/component"]
        assert label == str(settings.task).replace("_", "-")
        (port,) = container(deployment)["ports"]
        assert port["containerPort"] == settings.consumer_probes_port
        assert settings.consumer_probes_host == "0.0.0.0"  # noqa: S104 - the kubelet connects from outside
        assert "command" not in container(deployment)  # the image's, with tini as process 1
        assert container(deployment)["args"] == ["run", "--config", "/etc/generation/s3/s3.toml"]
    assert tasks == set(DEFAULT_QUEUES)


def test_apply_serves_both_tasks(
    build: list[Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (job,) = (each for each in of_kind(build, "Job") if "apply" in each["metadata"]["name"])
    settings = settings_of(job, build, monkeypatch, tmp_path)
    assert settings.model_type is None
    assert settings.consumer_name is None
    assert container(job)["args"] == ["apply", "--config", "/etc/generation/s3/s3.toml"]


def test_max_ack_pending_covers_all_workers(build: list[Manifest]) -> None:
    """CONSUMER_MAX_ACK_PENDING is the largest number of workers times their requests in flight."""
    most = 1
    for scaled in of_kind(build, "ScaledObject"):
        most = max(most, scaled["spec"]["maxReplicaCount"])
    for deployment in workers(build):
        most = max(most, deployment["spec"].get("replicas", 1))
    settings = config_map(build)
    each = int(settings["CONSUMER_JOBS_IN_FLIGHT"])
    assert int(settings["CONSUMER_MAX_ACK_PENDING"]) == most * each


def test_workers_may_publish_to_the_reply_prefixes() -> None:
    users = (NATS / "users.conf").read_text()
    settings = base_settings()
    inboxes = {
        "WORKER": settings["NATS_INBOX_PREFIX"],
        "ENDPOINTS": settings["NATS_ENDPOINTS_INBOX_PREFIX"],
    }
    for role, inbox in inboxes.items():
        publish, subscribe = permissions(users, role)
        for prefix in settings["CONSUMER_REPLY_PREFIXES"].split(","):
            assert f'"{prefix}>"' in publish
        assert f'"{inbox}.>"' in subscribe


def permissions(users: str, role: str) -> tuple[str, str]:
    """Return the publish and subscribe permissions of a user in users.conf."""
    user = users.split(f"nkey: $GENERATION_{role}_NKEY")[1].split("nkey: $", maxsplit=1)[0]
    publish, subscribe = user.split("subscribe {")
    return publish, subscribe


# -- secrets --------------------------------------------------------------------------------------


def secret_mounts(manifest: Manifest) -> dict[str, str]:
    """Return the mount paths of the container and their Secrets."""
    secrets = {v["name"]: v["secret"] for v in pod(manifest)["volumes"] if "secret" in v}
    mounts = {m["name"]: m for m in container(manifest)["volumeMounts"]}
    for name, secret in secrets.items():
        assert mounts[name]["readOnly"]
        # A file of root, for the group that fsGroup makes its owner; octal in YAML 1.1.
        assert secret["defaultMode"] == 0o440
    assert pod(manifest)["securityContext"]["fsGroup"] > 0
    return {mounts[name]["mountPath"]: secret["secretName"] for name, secret in secrets.items()}


def test_secrets_are_mounted_files() -> None:
    assert not of_kind(written(), "Secret")
    assert "S3_SECRET_KEY" not in base_settings()
    seed, endpoints = (
        Path(base_settings()[name]) for name in ("NATS_NKEY_SEED", "NATS_ENDPOINTS_NKEY_SEED")
    )
    assert (seed.parent, seed.name) == (endpoints.parent, "seed")  # two keys of one Secret
    assert seed != endpoints
    for manifest in with_pods(written()):
        assert not [each for each in container(manifest).get("env", []) if "valueFrom" in each]
        secrets = secret_mounts(manifest)
        if "args" not in container(manifest):
            continue  # a Job that only fetches a model
        if manifest in gateways(written()):
            assert secrets[str(seed.parent)] == "generation-nats-gateway"
            continue  # it has no keys of S3
        whose = "worker" if manifest["kind"] == "Deployment" else "admin"
        assert secrets[str(seed.parent)] == f"generation-nats-{whose}"
        assert secrets[str(Path(container(manifest)["args"][-1]).parent)] == "generation-s3"


# -- probes, draining, rollouts -------------------------------------------------------------------


def worker_deployment() -> Manifest:
    (worker,) = workers(written())
    return worker


def probe_timeout(probe: Manifest) -> int:
    return probe["periodSeconds"] * probe["failureThreshold"]


def test_probes_use_the_port_and_paths_of_the_daemon() -> None:
    probes = Probes(Telemetry(Metrics("task")), host="127.0.0.1", port=0)
    paths = {route.resource.canonical for route in probes._runner.app.router.routes()}
    assert paths == {"/livez", "/readyz", "/metrics"}
    worker = container(worker_deployment())
    names = ("startup", "liveness", "readiness")
    probes = {name: worker[f"{name}Probe"]["httpGet"] for name in names}
    assert {name: each["path"] for name, each in probes.items()} == {
        "startup": "/readyz",
        "liveness": "/livez",
        "readiness": "/readyz",
    }
    (port,) = worker["ports"]
    assert {each["port"] for each in probes.values()} == {port["name"]}
    monitor = of_kind(written(), "PodMonitor")[0]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["path"] in paths
    assert endpoint["port"] == port["name"]


def test_probe_timeouts_allow_loading_and_stalls() -> None:
    worker = container(worker_deployment())
    assert probe_timeout(worker["startupProbe"]) >= 1800
    assert worker_deployment()["spec"]["progressDeadlineSeconds"] > probe_timeout(
        worker["startupProbe"]
    )
    stall = float(base_settings().get("CONSUMER_STALL_TIMEOUT", Settings().consumer_stall_timeout))
    assert probe_timeout(worker["livenessProbe"]) > stall


def test_pod_has_time_to_drain() -> None:
    closing = DRAIN_TIMEOUT + 2 * CLOSE_TIMEOUT + FLUSH_TIMEOUT_MS / 1000 + SHUTDOWN_TIMEOUT
    grace = float(base_settings()["CONSUMER_DRAIN_GRACE"])
    for overlay in ("overlays/cpu", "overlays/production"):
        assert "CONSUMER_DRAIN_GRACE" not in literals(overlay)
    needed = (
        max(grace, Settings().consumer_drain_grace)
        + DRAIN_STEP_TIMEOUT
        + FORCED_STOP_TIMEOUT
        + closing
    )
    margin = 10  # seconds, for a busy node
    assert pod(worker_deployment())["terminationGracePeriodSeconds"] >= needed + margin
    # A preStop hook would use up the grace period.
    assert "lifecycle" not in container(worker_deployment())


def test_rollout_needs_no_second_gpu() -> None:
    assert worker_deployment()["spec"]["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
    }


def test_only_the_scaler_sets_the_number_of_workers(production: list[Manifest]) -> None:
    """Otherwise each `kubectl apply` would stop busy workers."""
    deployments = of_kind(production, "Deployment")
    assert all("replicas" not in each["spec"] for each in deployments)

    def scaled(kind: str) -> set[str]:
        return {each["spec"]["scaleTargetRef"]["name"] for each in of_kind(production, kind)}

    assert scaled("ScaledObject") == {each["metadata"]["name"] for each in workers(production)}
    assert scaled("HorizontalPodAutoscaler") == {
        each["metadata"]["name"] for each in gateways(production)
    }


def test_gpu_overlays_request_gpus() -> None:
    for overlay, gpus in (("base", 1), ("overlays/cpu", None), ("overlays/production", 1)):
        for deployment in workers(list(yaml.safe_load_all(built(overlay)))):
            limits = container(deployment)["resources"]["limits"]
            assert limits.get("nvidia.com/gpu") == gpus
            tolerated = [each["key"] for each in pod(deployment).get("tolerations", [])]
            assert tolerated == ([] if gpus is None else ["nvidia.com/gpu"])


# -- security -------------------------------------------------------------------------------------


def require_restricted(manifest: Manifest) -> None:
    assert pod(manifest)["automountServiceAccountToken"] is False
    assert pod(manifest)["enableServiceLinks"] is False
    of_pod = pod(manifest)["securityContext"]
    assert of_pod["runAsNonRoot"] is True
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"--uid {of_pod['runAsUser']} " in dockerfile
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(manifest)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for volume in pod(manifest)["volumes"]:
        assert set(volume) - {"name"} <= {"emptyDir", "secret", "persistentVolumeClaim"}
    mounts = {each["mountPath"] for each in container(manifest)["volumeMounts"]}
    assert "/tmp" in mounts  # noqa: S108 - the only folder that can be written
    home = {each["name"]: each["value"] for each in container(manifest)["env"]}["HOME"]
    assert home in mounts


def test_written_containers_are_restricted() -> None:
    for manifest in with_pods(written()):
        require_restricted(manifest)
    (account,) = of_kind(written(), "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    (namespace,) = of_kind(written(), "Namespace")
    labels = namespace["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_built_containers_are_restricted(build: list[Manifest]) -> None:
    for manifest in with_pods(build):
        require_restricted(manifest)


def test_model_volume_is_at_the_path_of_the_image() -> None:
    (folder,) = re.findall(r"HF_HOME=(\S+)", (ROOT / "Dockerfile").read_text())
    for manifest in with_pods(written()):
        mounts = {m["name"]: m["mountPath"] for m in container(manifest)["volumeMounts"]}
        assert mounts.get("models", folder) == folder


# -- network --------------------------------------------------------------------------------------


def policies(manifests: list[Manifest], labels: dict[str, str]) -> list[Manifest]:
    found = of_kind(manifests, "NetworkPolicy")
    return [each["spec"] for each in found if selects(each["spec"]["podSelector"], labels)]


def ways_out(manifests: list[Manifest], labels: dict[str, str]) -> set[tuple[str, str, int]]:
    """Return the namespace (`*` for any), protocol and port of each allowed egress connection."""
    found = set()
    for policy in policies(manifests, labels):
        for rule in policy.get("egress", []):
            for peer in rule.get("to", [None]):
                where = "*"
                if peer is not None:
                    space = peer["namespaceSelector"]["matchLabels"]
                    where = space["kubernetes.io/metadata.name"]
                found |= {(where, each["protocol"], each["port"]) for each in rule["ports"]}
    return found


def used(settings: dict[str, str]) -> set[tuple[str, str, int]]:
    """Return the connections of a worker: NATS, the store and DNS."""
    found = {("kube-system", "UDP", 53), ("kube-system", "TCP", 53)}
    for url in (settings["NATS_URL"], settings["S3_ENDPOINT"]):
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        found.add((parts.hostname.split(".")[1], "TCP", parts.port))
    return found


def require_minimal_egress(manifests: list[Manifest], settings: dict[str, str]) -> None:
    everything = [each["spec"] for each in of_kind(manifests, "NetworkPolicy")]
    denied = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert denied in everything
    for manifest in with_pods(manifests):
        labels = pod_labels(manifest)
        ingress = [rule for each in policies(manifests, labels) for rule in each.get("ingress", [])]
        if labels["app.kubernetes.io/name"] == "generation-fetch":
            names = {each for each in used(settings) if each[2] == 53}
            assert ways_out(manifests, labels) == {("*", "TCP", 443), *names}
        else:
            assert ways_out(manifests, labels) == used(settings)
        if manifest["kind"] == "Deployment":
            (rule,) = ingress
            spaces = [peer["namespaceSelector"]["matchLabels"] for peer in rule["from"]]
            clients = ["ingress-nginx"] if manifest in gateways(manifests) else []
            assert [space["kubernetes.io/metadata.name"] for space in spaces] == [
                *clients,
                "monitoring",
            ]
            (port,) = container(manifest)["ports"]
            assert rule["ports"] == [{"protocol": "TCP", "port": port["name"]}]
        else:
            assert not ingress


def test_written_network_policies_allow_only_used_connections() -> None:
    require_minimal_egress(written(), base_settings())


def test_built_network_policies_allow_only_used_connections(build: list[Manifest]) -> None:
    require_minimal_egress(build, config_map(build))


# -- scaling --------------------------------------------------------------------------------------


def triggers() -> Iterator[tuple[Task, Manifest]]:
    """Yield each task with the trigger of its ScaledObject."""
    scaled = {each["metadata"]["name"]: each for each in of_kind(written(), "ScaledObject")}
    assert len(scaled) == len(DEFAULT_QUEUES)
    for task in DEFAULT_QUEUES:
        (trigger,) = scaled[str(task).replace("_", "-")]["spec"]["triggers"]
        yield task, trigger["metadata"]


def test_scaler_watches_the_streams_and_durables() -> None:
    users = (NATS / "users.conf").read_text()
    (account,) = re.findall(r"^accounts \{\s+(\w+) \{", users, re.MULTILINE)
    for task, watched in triggers():
        stream = json.loads((NATS / f"streams/{watched['stream']}.json").read_text())
        assert f"generation.request.{task}" in stream["subjects"]
        durable = json.loads((NATS / f"consumers/{task}.json").read_text())
        assert watched["consumer"] == durable["durable_name"]
        assert watched["account"] == account
        assert watched["activationLagThreshold"] == "0"
        # Otherwise a second worker would start before the first worker is fully used.
        assert int(watched["lagThreshold"]) >= int(base_settings()["CONSUMER_JOBS_IN_FLIGHT"])


async def test_scaler_counts_waiting_and_in_flight_requests(
    start_nats: Callable[..., Any],
) -> None:
    """Compute the number that KEDA reads from /jsz of a real server."""
    watched = dict(triggers())
    (account,) = {each["account"] for each in watched.values()}
    server = start_nats(
        f"accounts {{ {account} {{ jetstream: enabled, users: [{{user: any, password: x}}] }} }}\n"
        "no_auth_user: any"
    )
    unset = dict.fromkeys(("nats_creds", "nats_nkey_seed", "nats_ca", "nats_cert", "nats_key"))
    settings = Settings(nats_url=server.url, **unset)

    def lag(task: Task) -> int:
        metadata = watched[task]
        query = f"acc={quote(metadata['account'])}&consumers=true&config=true"
        address = f"{server.monitoring_url}/jsz?{query}"
        with urllib.request.urlopen(address) as answer:  # noqa: S310 - loopback
            (of_account,) = json.load(answer)["account_details"]
        assert of_account["name"] == metadata["account"]
        (stream,) = (s for s in of_account["stream_detail"] if s["name"] == metadata["stream"])
        (durable,) = (c for c in stream["consumer_detail"] if c["name"] == metadata["consumer"])
        return durable["num_pending"] + durable["num_ack_pending"]

    bus = await connect(settings, name="lag", within=10.0)
    try:
        await make_topology(settings, bus).apply(DEFAULT_QUEUES)
        for task in DEFAULT_QUEUES:
            assert lag(task) == 0
            for number in range(3):
                subject = settings.subjects.request(task, f"{number}")
                await bus.jetstream.publish(subject, b"{}")
            subscription = await bus.jetstream.pull_subscribe_bind(
                watched[task]["consumer"], watched[task]["stream"]
            )
            (delivery,) = await subscription.fetch(1)
            assert (
                lag(task) == 3
            )  # includes the request in flight, so its worker is not scaled down
            await delivery.ack_sync()
            assert lag(task) == 2
    finally:
        await bus.close()


# -- the gateway ----------------------------------------------------------------------------------


def gateway_deployment() -> Manifest:
    (gateway,) = gateways(written())
    return gateway


def gateway_settings(
    production: list[Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Settings:
    (gateway,) = gateways(production)
    return settings_of(gateway, production, monkeypatch, tmp_path)


def test_gateway_settings_are_valid(
    production: list[Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = gateway_settings(production, monkeypatch, tmp_path)
    require_keys_if_reachable(settings)
    gateway = container(gateway_deployment())
    assert gateway["args"] == ["gateway"]
    (port,) = gateway["ports"]
    assert port["containerPort"] == settings.gateway_port
    assert settings.gateway_keys is not None
    assert str(settings.gateway_keys.parent) in secret_mounts(gateway_deployment())
    _, subscribe = permissions((NATS / "users.conf").read_text(), "GATEWAY")
    assert f'"{settings.nats_inbox_prefix}.>"' in subscribe
    prefixes = base_settings()["CONSUMER_REPLY_PREFIXES"].split(",")
    assert f"{settings.nats_inbox_prefix}." in prefixes


def test_gateway_probes_use_its_port_and_paths() -> None:
    paths = {route.path for route in health.router.routes if isinstance(route, APIRoute)}
    gateway = container(gateway_deployment())
    probes = {name: gateway[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startup": "/healthz",
        "liveness": "/healthz",
        "readiness": "/readyz",
    }
    assert probe_timeout(probes["startup"]) > CONNECT_WITHIN
    (port,) = gateway["ports"]
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {port["name"]}
    monitors = of_kind(written(), "PodMonitor")
    (monitor,) = (
        each
        for each in monitors
        if selects(each["spec"]["selector"], pod_labels(gateway_deployment()))
    )
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == (port["name"], "/metrics")
    assert endpoint["path"] in paths


def test_gateway_has_time_to_drain(
    production: list[Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = gateway_settings(production, monkeypatch, tmp_path)
    program, wait = container(gateway_deployment())["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    ending = (END_WITHIN + 1) + CLOSE_WITHIN + CLOSE_TIMEOUT
    needed = float(wait) + settings.gateway_drain_grace + ending
    assert pod(gateway_deployment())["terminationGracePeriodSeconds"] >= needed + 10


def test_service_and_ingress_route_to_the_gateway() -> None:
    (service,) = of_kind(written(), "Service")
    (port,) = service["spec"]["ports"]
    assert selects({"matchLabels": service["spec"]["selector"]}, pod_labels(gateway_deployment()))
    assert port["targetPort"] == container(gateway_deployment())["ports"][0]["name"]
    (ingress,) = of_kind(written(), "Ingress")
    (rule,) = ingress["spec"]["rules"]
    shown = [(path["path"], path["pathType"]) for path in rule["http"]["paths"]]
    for path in rule["http"]["paths"]:
        assert path["backend"]["service"]["name"] == service["metadata"]["name"]
        assert path["backend"]["service"]["port"]["name"] == port["name"]

    def leads(path: str) -> bool:
        return any(
            path == to or (how == "Prefix" and path.startswith(f"{to}/")) for to, how in shown
        )

    private = set(ALWAYS_ANSWERED)
    routes = {route.path for router in ROUTERS for route in router.routes} | {"/openapi.json"}
    assert {path for path in routes if not leads(path)} == private
    options = ingress["metadata"]["annotations"]
    prefix = "nginx.ingress.kubernetes.io"
    size = Settings.model_fields["gateway_max_body"].default
    assert options[f"{prefix}/proxy-body-size"] == f"{size // 2**20}m"
    wait = Settings.model_fields["gateway_wait"].default
    assert int(options[f"{prefix}/proxy-read-timeout"]) > wait


# -- models ---------------------------------------------------------------------------------------


def test_fetched_models_are_the_loaded_models(production: list[Manifest]) -> None:
    ids: dict[str, set[str]] = {}
    for manifest in with_pods(production):
        component = pod_labels(manifest).get("app.kubernetes.io/component")
        if component is not None and manifest not in gateways(production):
            found = environment(manifest, production)
            ids.setdefault(component, set()).add(found["MODEL_ID"])
    assert {component: len(each) for component, each in ids.items()} == {
        "text-to-image": 1,
        "image-to-text": 1,
    }


def test_fetch_job_uses_functions_of_the_daemon() -> None:
    jobs = [each for each in of_kind(written(), "Job") if "command" in container(each)]
    assert len(jobs) == len(DEFAULT_QUEUES)
    for job in jobs:
        program, flag, script = container(job)["command"]
        assert (program, flag) == ("python", "-c")
        (imported,) = (n for n in ast.parse(script).body if isinstance(n, ast.ImportFrom))
        assert imported.module is not None
        assert job["metadata"]["name"].removesuffix("-fetch").replace("-", "_") in imported.module
        module = ast.parse((ROOT / f"{imported.module.replace('.', '/')}.py").read_text())
        functions = {n.name: n for n in module.body if isinstance(n, ast.FunctionDef)}
        (name,) = (each.name for each in imported.names)
        assert [each.arg for each in functions[name].args.args] == ["model_id", "revision"]


# -- the page -------------------------------------------------------------------------------------


def test_documentation_refers_to_existing_files() -> None:
    page = (ROOT / "docs/kubernetes.md").read_text()
    lines = page.replace("\\\n", " ").splitlines()
    applied = [line for line in lines if "kubectl apply -k" in line]
    assert applied
    for line in applied:
        words = shlex.split(line.strip("`$ "), comments=True)
        assert (ROOT / words[words.index("-k") + 1] / "kustomization.yaml").is_file()
    secrets = {name for m in with_pods(written()) for name in secret_mounts(m).values()}
    created = set(re.findall(r"create secret generic (\S+)", page))
    assert created == secrets
    jobs = {each["metadata"]["name"] for each in of_kind(written(), "Job")}
    deleted = re.findall(r"delete job (.+?) --ignore-not-found", page)
    assert {name for each in deleted for name in each.split()} == jobs
