"""The manifests against the schemas and readers of their tools, without a cluster."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import segment, train
from pipeline.bulk.settings import BulkSettings as BulkSettings
from pipeline.cli.arguments import parse
from tests.cluster.custom_resources import schemas
from tests.cluster.rendering import Resource, render

FOLDER = Path(__file__).parents[2] / "cluster" / "kubernetes"
OVERLAYS = ("cloud", "on-premises")
CUSTOM = ("RayCluster", "RayJob")


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> list[Resource]:
    return render(FOLDER / request.param)


def _named(manifests: list[Resource], kind: str, name: str) -> Resource:
    [found] = [
        each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, name)
    ]
    return found


def _pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod template below `value`."""
    if isinstance(value, dict):
        if isinstance(value.get("spec"), dict) and "containers" in value["spec"]:
            yield value
        for each in value.values():
            yield from _pods(each)
    elif isinstance(value, list):
        for each in value:
            yield from _pods(each)


def _clusters(manifests: list[Resource]) -> dict[str, dict[str, Any]]:
    """Name -> spec of every Ray cluster, a job's own included."""
    found = {}
    for each in manifests:
        if each["kind"] == "RayCluster":
            found[f"cluster {each['metadata']['name']}"] = each["spec"]
        if each["kind"] == "RayJob":
            found[f"job {each['metadata']['name']}"] = each["spec"]["rayClusterSpec"]
    return found


@pytest.mark.process
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_itself_renders_the_same(overlay: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl, which has kustomize in it, is not installed")
    command = [kubectl, "kustomize", str(FOLDER / overlay)]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [hashed] = set(re.findall(r"deeplab-nightly-[a-z0-9]{10}", rendered))
    theirs = yaml.safe_load_all(rendered.replace(hashed, "deeplab-nightly"))
    ours = {_key(each): each for each in render(FOLDER / overlay)}
    assert {_key(each): each for each in theirs} == ours


def _key(resource: Resource) -> tuple[str, str]:
    return resource["kind"], resource["metadata"]["name"]


def test_kuberay_has_every_field(manifests: list[Resource]) -> None:
    known = schemas()
    checked = [each for each in manifests if each["kind"] in CUSTOM]
    assert len(checked) == 3
    for each in checked:
        errors = known[each["kind"]].iter_errors(each)
        assert [f"{error.json_path}: {error.message[:200]}" for error in errors] == []


def test_a_misspelled_field_is_refused_at_any_depth(manifests: list[Resource]) -> None:
    known = schemas()
    cluster = _named(manifests, "RayCluster", "deeplab")
    for path in (["spec"], ["spec", "headGroupSpec", "template", "spec", "containers", 0]):
        broken = copy.deepcopy(cluster)
        place = broken
        for name in path:
            place = place[name]
        place["imagePullPolicies"] = "Always"
        [error] = known["RayCluster"].iter_errors(broken)
        assert "imagePullPolicies" in error.message


def test_kubernetes_has_every_field(manifests: list[Resource]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install -e '.[test]'")
    core = [each for each in manifests if each["kind"] not in CUSTOM]
    assert len(core) == 12
    for each in core:
        validator.validate(each, "1.37", strict=True)
    broken = copy.deepcopy(_named(manifests, "CronJob", "nightly"))
    broken["spec"]["concurencyPolicy"] = "Forbid"
    with pytest.raises(validator.ValidationError, match="concurencyPolicy"):
        validator.validate(broken, "1.37", strict=True)


def test_ray_pods_are_valid_kubernetes_pods(manifests: list[Resource]) -> None:
    """KubeRay's schemas leave out much of what core's say of a pod: resources, for one."""
    validator = pytest.importorskip("kubernetes_validate", reason="pip install -e '.[test]'")
    for spec in _clusters(manifests).values():
        for pod in _pods(spec):
            metadata = {"name": "checked", **pod["metadata"]}
            whole = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}
            validator.validate(whole, "1.37", strict=True)


def test_every_pod_meets_the_restricted_pod_security_standard(manifests: list[Resource]) -> None:
    """Source: Kubernetes' Pod Security Standards, restricted."""
    pods = list(_pods(manifests))
    assert len(pods) == 9  # three clusters of head and worker, two submitters, the night's
    for pod in pods:
        shared = pod["spec"]["securityContext"]
        assert shared["runAsNonRoot"] is True
        assert shared["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any("hostPath" in each for each in pod["spec"].get("volumes", []))
        for container in pod["spec"]["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
    for spec in _clusters(manifests).values():  # the sidecar, which KubeRay makes
        assert spec["autoscalerOptions"]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_every_reference_resolves(manifests: list[Resource]) -> None:
    there = {_key(each) for each in manifests}
    for pod in _pods(manifests):
        spec = pod["spec"]
        if "serviceAccountName" in spec:
            assert ("ServiceAccount", spec["serviceAccountName"]) in there
        for container in spec["containers"]:
            for source in container.get("envFrom", []):
                assert ("ConfigMap", source["configMapRef"]["name"]) in there
            mounted = {each["name"] for each in container.get("volumeMounts", [])}
            assert mounted <= {each["name"] for each in spec.get("volumes", [])}
            assert container["image"].endswith("/deeplab-pipeline:0.1.0")
        for volume in spec.get("volumes", []):
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there


def test_no_variable_or_runtime_environment_contains_a_secret(manifests: list[Resource]) -> None:
    text = yaml.safe_dump(manifests)
    assert "runtimeEnvYAML" not in text
    assert "secretKeyRef" not in text
    assert "SECRET_ACCESS_KEY" not in text
    assert not [each for each in manifests if each["kind"] == "Secret"]


def test_accounts_have_only_the_rights_they_use(manifests: list[Resource]) -> None:
    roles = [each for each in manifests if "Role" in each["kind"] and "rules" in each]
    [role] = roles  # KubeRay makes the autoscaler's
    rule = {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    assert role["rules"] == [rule]
    for spec in _clusters(manifests).values():
        for group in spec["workerGroupSpecs"]:
            assert group["template"]["spec"]["automountServiceAccountToken"] is False


def test_network_policies_cover_every_pod_in_both_directions(manifests: list[Resource]) -> None:
    policies = [each["spec"] for each in manifests if each["kind"] == "NetworkPolicy"]
    for pod in _pods(manifests):
        role = pod["metadata"]["labels"]["deeplab/role"]
        closed: set[str] = set()
        for policy in policies:
            [expression] = policy["podSelector"]["matchExpressions"]
            if role in expression["values"]:
                closed |= set(policy["policyTypes"])
        assert closed == {"Ingress", "Egress"}, role


def test_a_cluster_starts_without_gpus_scales_up_and_requires_its_token(
    manifests: list[Resource],
) -> None:
    for name, spec in _clusters(manifests).items():
        assert spec["authOptions"] == {"mode": "token"}, name
        assert spec["enableInTreeAutoscaling"] is True
        assert spec["autoscalerOptions"]["version"] == "v2"
        groups = spec["workerGroupSpecs"]
        assert [each["minReplicas"] for each in groups] == [0]
        templates = [each["template"] for each in (spec["headGroupSpec"], *groups)]
        # what autoscaler v2 asks for
        assert {each["spec"]["restartPolicy"] for each in templates} == {"Never"}
    kept = _named(manifests, "RayCluster", "deeplab")["spec"]
    assert kept["gcsFaultToleranceOptions"]["backend"] == "rocksdb"


def test_actors_fit_the_nodes_according_to_rays_autoscaler(manifests: list[Resource]) -> None:
    from ray.autoscaler._private.kuberay import autoscaling_config

    for name in ("segment", "train"):
        job = _named(manifests, "RayJob", name)["spec"]
        cluster = {
            "metadata": {"name": name, "namespace": "deeplab"},
            "spec": job["rayClusterSpec"],
        }
        found = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)
        nodes = found["available_node_types"]
        assert nodes["headgroup"]["resources"]["CPU"] == 0
        assert "GPU" not in nodes["headgroup"]["resources"]
        gpu = nodes["gpu"]
        flags = _flags(job["entrypoint"])
        worker = "actor" if name == "segment" else "worker"
        assert gpu["resources"]["GPU"] == int(flags[f"--gpus-per-{worker}"][0])
        # one CPU is left for Ray's own tasks: actors that take all of them hang a data set
        assert gpu["resources"]["CPU"] - 1 == int(flags[f"--cpus-per-{worker}"][0])
        most = int(flags["--actors" if name == "segment" else "--workers"][-1])
        assert most <= gpu["max_workers"]


def _flags(entrypoint: str) -> dict[str, list[str]]:
    flags: dict[str, list[str]] = {}
    for word in shlex.split(entrypoint):
        if word.startswith("--"):
            values = flags.setdefault(word, [])
        elif flags:
            values.append(word)
    return flags


def test_entrypoints_are_valid_job_commands(manifests: list[Resource]) -> None:
    words = shlex.split(_named(manifests, "RayJob", "segment")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.segment"]
    args = _named(manifests, "CronJob", "nightly")["spec"]["jobTemplate"]["spec"]["template"]
    args = args["spec"]["containers"][0]["args"]
    night = [*words[3:], "--run-id", "nightly-2026-11-22", *args[args.index("--") + 1 :]]
    settings = parse(BulkSettings, night, description=segment.__doc__)
    assert settings.only_new
    assert settings.run_id == "nightly-2026-11-22"
    words = shlex.split(_named(manifests, "RayJob", "train")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.train"]
    name, rest = train._split_recipe(words[3:])
    trained = train._settings(train._recipe(name, rest), rest)
    assert trained.workers == (2,)
    assert trained.gpus_per_worker == 1


def test_jobs_are_suspended_by_default(manifests: list[Resource]) -> None:
    for name in ("segment", "train"):
        job = _named(manifests, "RayJob", name)["spec"]
        assert job["suspend"] is True
        assert job["shutdownAfterJobFinishes"] is True  # KubeRay refuses a suspended job without
    night = _named(manifests, "CronJob", "nightly")["spec"]
    assert night["concurrencyPolicy"] == "Forbid"
