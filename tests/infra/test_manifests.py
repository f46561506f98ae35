"""The Kubernetes manifests, rendered as a cluster would get them: schema, own rules, and agreement with the code."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tests.infra import manifests
from tests.infra.manifests import Objects, amount, containers, of_kind, pods
from tests.infra.tools import INFRA, PIP, output, tool
from valr_ops import workspace
from valr_ops.recipe import recipes
from valr_ops.recipe.recipe import Recipe
from valr_ops.release import manifest
from valr_ops.stages import STAGES

OVERLAYS = {name: INFRA / "k8s" / "overlays" / name for name in ("dev", "prod")}
VERSION = "1.36"


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@functools.cache
def _render(overlay: str) -> Objects:
    kubectl = tool("kubectl", PIP)
    return list(yaml.safe_load_all(output(kubectl, "kustomize", OVERLAYS[overlay])))


@pytest.fixture
def objects(overlay: str) -> Objects:
    return copy.deepcopy(_render(overlay))


@pytest.fixture(scope="module")
def recipe(overlay: str) -> Recipe:
    return recipes.load(OVERLAYS[overlay])


def test_every_object_is_what_the_api_server_takes(objects: Objects) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing; extra dev").validate
    for one in objects:
        validate(one, VERSION, strict=True)


@pytest.mark.parametrize("rule", manifests.RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Callable[[Objects], Any], objects: Objects) -> None:
    assert list(rule(objects)) == []


def _container(objects: Objects) -> dict[str, Any]:
    found: dict[str, Any] = pods(objects)["valr-mlflow"]["spec"]["containers"][0]
    return found


FAULTS: dict[str, tuple[Callable[[Objects], Any], Callable[[Objects], Any]]] = {
    "latest": (manifests.unpinned_images, lambda all: _container(all).update(image="registry:5000/valr-ops:latest")),
    "no tag": (manifests.unpinned_images, lambda all: _container(all).update(image="registry:5000/valr-ops")),
    "root": (
        manifests.unrestricted,
        lambda all: pods(all)["valr-mlflow"]["spec"]["securityContext"].pop("runAsNonRoot"),
    ),
    "writable": (manifests.unrestricted, lambda all: _container(all)["securityContext"].pop("readOnlyRootFilesystem")),
    "host path": (
        manifests.unrestricted,
        lambda all: pods(all)["valr-mlflow"]["spec"]["volumes"].append({"name": "h", "hostPath": {"path": "/"}}),
    ),
    "mount": (
        manifests.dangling,
        lambda all: _container(all)["volumeMounts"].append({"name": "no", "mountPath": "/x"}),
    ),
    "account": (manifests.dangling, lambda all: pods(all)["valr-mlflow"]["spec"].update(serviceAccountName="nobody")),
    "port": (manifests.dangling, lambda all: _container(all)["ports"][0].update(name="other")),
    "no probe": (manifests.unwatched, lambda all: _container(all).pop("readinessProbe")),
    "number": (manifests.unbounded, lambda all: _container(all)["resources"]["limits"].update(memory=3)),
    "unit": (manifests.unbounded, lambda all: _container(all)["resources"]["limits"].update(memory="3GB")),
    "request": (manifests.unbounded, lambda all: _container(all)["resources"]["requests"].update(memory="9Gi")),
    "secret": (manifests.written_secrets, lambda all: all.append({"kind": "Secret", "metadata": {"name": "s"}})),
    "password": (
        manifests.written_secrets,
        lambda all: _container(all)["env"].append({"name": "URL", "value": "postgresql://u:p@db/mlflow"}),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rule_sees_the_fault(fault: str) -> None:
    rule, plant = FAULTS[fault]
    faulty = copy.deepcopy(_render("prod"))
    plant(faulty)
    assert list(rule(faulty)) != []


def test_the_namespace_holds_every_pod_to_the_restricted_profile(objects: Objects, recipe: Recipe) -> None:
    (namespace,) = of_kind(objects, "Namespace").values()
    assert namespace["metadata"]["name"] == recipe.cluster.namespace
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    elsewhere = {
        one["metadata"].get("namespace") for one in objects if one["kind"] not in ("Namespace", "PriorityClass")
    }
    assert elsewhere == {recipe.cluster.namespace}


def test_only_the_code_location_has_rights_and_only_those_of_dispatch(objects: Objects) -> None:
    ((name, role),) = of_kind(objects, "Role").items()
    verbs = ["create", "get", "list", "watch", "delete"]
    assert role["rules"] == [
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": verbs},
        {"apiGroups": ["jobset.x-k8s.io"], "resources": ["jobsets"], "verbs": verbs},
        {"apiGroups": [""], "resources": ["pods"], "verbs": verbs},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["events"], "verbs": ["list"]},
    ]
    (binding,) = of_kind(objects, "RoleBinding").values()
    assert binding["roleRef"]["name"] == name
    assert [subject["name"] for subject in binding["subjects"]] == ["valr-orchestrator"]
    holders = {name: pod["spec"]["serviceAccountName"] for name, pod in pods(objects).items()}
    assert [name for name, account in holders.items() if account == "valr-orchestrator"] == ["valr-code-location"]
    tokens = [name for name, pod in pods(objects).items() if pod["spec"]["automountServiceAccountToken"]]
    assert tokens == ["valr-code-location"]
    assert {kind for kind in (one["kind"] for one in objects) if kind.startswith("Cluster")} == set()


def test_nobody_talks_to_anybody_but_these(objects: Objects) -> None:
    assert manifests.denied_by_default(objects)
    services = ("webserver", "daemon", "code-location", "mlflow")
    proxy = "valr/reaches-pages=true"
    assert manifests.conversations(objects) == {
        ("webserver", "code-location", 4000),
        ("daemon", "code-location", 4000),
        ("code-location", "mlflow", 5000),
        ("stage", "stage", "any"),
        (proxy, "webserver", 3000),
        (proxy, "mlflow", 5000),
        ("code-location", "anywhere", 6443),
        ("code-location", "anywhere", 587),
        *((one, "private addresses", 5432) for one in services),
        *((one, "internet", 443) for one in ("code-location", "mlflow", "stage")),
        *((one, "kubernetes.io/metadata.name=kube-system", 53) for one in (*services, "stage")),
    }


def test_pods_get_the_environment_that_the_project_needs(objects: Objects, tmp_path: Path) -> None:
    (environment,) = (one["data"] for name, one in of_kind(objects, "ConfigMap").items() if "environment" in name)
    here = workspace.environment(tmp_path)
    assert here.keys() <= environment.keys()
    placed = {"DAGSTER_HOME", "MLFLOW_TRACKING_URI"}
    assert {name: environment[name] for name in here.keys() - placed} == {
        name: here[name] for name in here.keys() - placed
    }
    assert environment["MLFLOW_TRACKING_URI"] == "http://valr-mlflow:5000"
    asked_as = {urlsplit(environment[name]).netloc for name in ("MLFLOW_TRACKING_URI", "VALR_MLFLOW_PAGES")}
    assert asked_as <= set(environment["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")), "MLflow refuses other names"
    mounts = {
        mount["mountPath"] for pod in pods(objects).values() for one in containers(pod) for mount in one["volumeMounts"]
    }
    assert environment["DAGSTER_HOME"] in mounts


def test_the_recipe_speaks_of_what_is_deployed(objects: Objects, recipe: Recipe, overlay: str) -> None:
    cluster = recipe.cluster
    assert cluster.dispatch == "kubernetes"
    assert {one["image"] for pod in pods(objects).values() for one in containers(pod)} == {cluster.image}
    assert cluster.service_account in of_kind(objects, "ServiceAccount")
    assert cluster.priority_class in of_kind(objects, "PriorityClass")
    (environment,) = (one["data"] for name, one in of_kind(objects, "ConfigMap").items() if "environment" in name)
    assert environment["VALR_REMOTE_URL"] == cluster.bucket
    assert environment["MLFLOW_ARTIFACTS_DESTINATION"] == f"{cluster.bucket}/mlflow"
    keys = {"valr-bucket"} if overlay == "dev" else set()
    assert set(cluster.secrets) == keys, "in prod a role gives access to the bucket"
    given = "eks.amazonaws.com/role-arn" in of_kind(objects, "ServiceAccount")["valr-stage"]["metadata"].get(
        "annotations", {}
    )
    assert given == (overlay == "prod")


def test_the_quota_has_room_for_the_services_and_the_largest_stage(objects: Objects, recipe: Recipe) -> None:
    (quota,) = (one["spec"]["hard"] for one in of_kind(objects, "ResourceQuota").values())
    asked = dict.fromkeys(("cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"), 0.0)
    for pod in pods(objects).values():
        for key in asked:
            asked[key] += sum(amount(one["resources"]["requests"].get(key, "0")) for one in pod["spec"]["containers"])
    training = next(row for row in STAGES if row.group == "training")
    job = manifest.documents(training, recipe, f"{recipe.cluster.bucket}/jobs/{'0' * 16}")[-1]["spec"]
    for key, quantity in job["template"]["spec"]["containers"][0]["resources"]["requests"].items():
        asked[key] += job["parallelism"] * amount(quantity)
    assert {key: f"{value:g} asked" for key, value in asked.items() if value > amount(quota[f"requests.{key}"])} == {}


def test_a_stage_passes_the_rules_of_the_services(objects: Objects, recipe: Recipe) -> None:
    training = next(row for row in STAGES if row.group == "training")
    job = manifest.documents(training, recipe, f"{recipe.cluster.bucket}/jobs/{'0' * 16}")[-1]
    template = job["spec"]["template"]
    assert template["metadata"]["labels"]["app.kubernetes.io/component"] == "stage", "the label of network.yaml"
    as_deployment = {"kind": "Deployment", "metadata": {"name": "stage"}, "spec": {"template": template}}
    others = [one for one in objects if one["kind"] not in ("Deployment", "Service")]
    for rule in (manifests.unpinned_images, manifests.unrestricted, manifests.dangling, manifests.unbounded):
        assert list(rule([*others, as_deployment])) == []


def test_pods_of_one_job_find_each_other_by_the_service_that_is_there(objects: Objects, recipe: Recipe) -> None:
    several = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"nodes": 2})})
    several = several.model_copy(update={"runtime": several.runtime.model_copy(update={"processes": 8})})
    training = next(row for row in STAGES if row.group == "training")
    made, _ = manifest.documents(training, several, f"{recipe.cluster.bucket}/jobs/{'0' * 16}")
    there = of_kind(objects, "Service")[manifest.SERVICE]
    assert there["spec"] == made["spec"]
