"""What is sent to the cluster for a stage: a Job, or for several nodes an Indexed Job and its Service, or a JobSet.

In: a stage, the recipe, and the location through which the Pod is told what to do (`release.pod`). Out: the manifests
as plain values; nothing here talks to a cluster.
Always: one Job for one piece of work, whose name says so; nothing that fails is repeated inside of the cluster but what
was taken away from it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from valr_ops.exits import EXIT_AT_CHECKPOINT, EXIT_CONFIGURATION
from valr_ops.recipe.cost_artifacts import FEATURES
from valr_ops.recipe.recipe import ClusterRecipe, Recipe
from valr_ops.stages import Stage

if TYPE_CHECKING:
    from pathlib import Path

    from valr_ops.release.pod import Request

CONTAINER = "stage"
SERVICE = "valr-stages"
"""The headless Service that gives the Pods of a Job on several nodes their names; one for all Jobs."""
SPEC_DIGEST = "valr/spec"
"""Annotation of a Job with the digest of its manifest."""
MEMBER = "n"
"""Name of the one Job in a JobSet. Short, as it is part of the Pods' names."""

DATA_FOLDER = "/mnt/valr-data"
"""Where a Pod has the claim `cluster.data_claim`; the job's project links to what is in it."""

_UID = 10001
_PORT = 29500


class LocalPathError(ValueError):
    """A stage that reads a file which its Pod would not have: the message names field, path and the ways out."""


def refuse_local_paths(row: Stage, recipe: Recipe, root: Path) -> None:
    """Raise `LocalPathError` for what the stage reads by a local path and its Pod would not find, before it has one."""
    claim = recipe.cluster.data_claim
    lost = {
        field: path
        for field, path in _local_paths(row, recipe, root).items()
        if claim is None or path.startswith(("/", "~")) or ".." in path.split("/")
    }
    if not lost:
        return
    (field, path), more = next(iter(lost.items())), f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    ways = [
        f"copy it to the claim {claim} and write its path from there, such as weights/NAME"
        if claim
        else "copy the folder to a claim and name that in cluster.data_claim (infra/README.md)"
    ]
    section = field.partition(".")[0]
    if section in ("teachers", "base"):
        ways.append(f"set {field.rpartition('.')[0]}.hub_id and revision instead")
    elif section == "data":
        ways.append("name an s3://bucket/prefix")
    raise LocalPathError(
        f"{row.name} is not dispatched: it reads {field}={path}{more}, and its Pod has the image, the bucket"
        f"{f' and the claim {claim}' if claim else ''} only; {', or '.join(ways)}"
    )


def _local_paths(row: Stage, recipe: Recipe, root: Path | None = None) -> dict[str, str]:
    """By field the local files and folders that the stage reads beside its artifacts.

    Args:
        root: project with the artifacts of teachers, which say whether training computes features itself; without one
            the recipe says whether it may.
    """
    found: dict[str, str | None] = {}
    if row.name == "base_model":
        found["base.path"] = recipe.base.path
    names = [row.name] if row.group == "teachers" else [one for one in row.inputs if one.startswith(FEATURES)]
    for name in (one.removeprefix(FEATURES) for one in names):
        if name in recipe.teachers and (row.group == "teachers" or _online(name, recipe, root)):
            found[f"teachers.{name}.weights"] = recipe.teachers[name].weights
    if "benchmarks" in row.inputs:
        found |= {f"evaluation.benchmarks.{name}.path": one.path for name, one in recipe.evaluation.benchmarks.items()}
    if "sources" in row.inputs:
        # Their test records are asked.
        own = {name: one for name, one in recipe.data.sources.items() if one.format == "jsonl"}
        found |= {f"data.sources.{name}.path": one.path for name, one in own.items()}
    return {field: path for field, path in found.items() if path is not None and not path.startswith("s3://")}


def _online(teacher: str, recipe: Recipe, root: Path | None) -> bool:
    index = root / "artifacts" / f"{FEATURES}{teacher}" / "index.json" if root is not None else None
    if index is not None and index.is_file():
        return bool(json.loads(index.read_text(encoding="utf-8"))["mode"] == "online")
    return recipe.teachers[teacher].features != "stored"


def request(row: Stage, recipe: Recipe, root: Path) -> Request:
    """What a Pod is asked to make, from the inputs that dvc.lock records; one that was not made yet has no digest."""
    from valr_ops.release.pod import Request
    from valr_ops.store.artifacts import Ledger

    ledger = Ledger(root)
    return Request(
        store=recipe.cluster.bucket,
        stage=row.name,
        recipe=recipe.model_dump(mode="json"),
        inputs={name: ledger.digest(name) or "" for name in row.inputs},
        code=row.code_digest(root),
        weights=_weights(row, recipe),
    )


def _weights(row: Stage, recipe: Recipe) -> str | None:
    """`Request.weights`."""
    name = row.name.removeprefix(FEATURES)
    if row.group != "teachers" or name not in recipe.teachers:
        return None
    from valr_ops.teachers.weights import TeacherError, weights_sample

    try:
        return weights_sample(name, recipe.teachers[name])
    except TeacherError:
        # They are on the claim only; what is wrong with them the stage says.
        return None


def job_name(stage: str, url: str) -> str:
    """The Job's name: the stage, and the key that ends the job's location.

    At most 50 characters: the longest that is made from it, of a Pod in a JobSet, may have 63.
    """
    words = re.sub(r"[^a-z0-9]+", "-", stage.lower()).strip("-")[:28].strip("-")
    return f"valr-{words}-{url.rstrip('/').rpartition('/')[2]}"


def gpus(row: Stage, recipe: Recipe) -> int:
    """GPUs of each Pod: one a process of its node in training and extraction, else one; none where the recipe says cpu.

    Extraction is one Pod even where training is several, and has the GPUs of one node.
    """
    if row.resources != "gpu" or recipe.runtime.device == "cpu":
        return 0
    return recipe.processes_of_a_node if row.group in ("training", "teachers") else 1


def _nodes(row: Stage, recipe: Recipe) -> int:
    return recipe.cluster.nodes if row.group == "training" else 1


def _is_set(row: Stage, recipe: Recipe) -> bool:
    return _nodes(row, recipe) > 1 and recipe.cluster.gang == "jobset"


def stage_command(row: Stage, recipe: Recipe, url: str) -> list[str]:
    """What the container runs: the verb, under torchrun where several Pods are one training.

    In full, because the orchestrator does not know the image's entry point.
    """
    verb = ["-m", "valr_ops", "run", row.name, "--job", url]
    nodes, name = _nodes(row, recipe), job_name(row.name, url)
    if nodes == 1:
        return ["python3", *verb]
    first = f"{name}-{MEMBER}-0-0.{name}" if _is_set(row, recipe) else f"{name}-0.{SERVICE}"
    return [
        *("python3", "-m", "valr_ops.release.ranks", f"--nnodes={nodes}", "--node-rank=$(JOB_COMPLETION_INDEX)"),
        f"--nproc-per-node={recipe.processes_of_a_node}",
        *(f"--master-addr={first}", f"--master-port={_PORT}"),
        # Pods start as their nodes pull the image; and ranks need the whole grace period to write a checkpoint.
        *("--rdzv-conf=timeout=1800", f"--shutdown-timeout={recipe.cluster.grace_seconds}"),
        *verb,
    ]


def documents(
    row: Stage,
    recipe: Recipe,
    url: str,
    *,
    command: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The objects of one stage's work: a Job or a JobSet, and before a Job on several nodes the Service that it needs.

    Args:
        row: the stage.
        recipe: its section `cluster` says where and with what.
        url: the job's location, ``<bucket>/jobs/<key>``; equal for equal work.
        command: `stage_command` unless given.
        environment: more variables of the container; they are no part of what makes two manifests differ.
    """
    command = list(command or stage_command(row, recipe, url))
    work = _work(row, recipe, url, command, environment or {})
    work["metadata"]["annotations"][SPEC_DIGEST] = _digest(_work(row, recipe, url, command, {}))
    return [_service(recipe.cluster), work] if _nodes(row, recipe) > 1 and not _is_set(row, recipe) else [work]


def _work(row: Stage, recipe: Recipe, url: str, command: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    cluster, name = recipe.cluster, job_name(row.name, url)
    labels = {
        "app.kubernetes.io/name": "valr",
        "app.kubernetes.io/component": "stage",
        "valr/stage": row.name.replace("@", "."),
    }
    metadata = {
        "name": name,
        "namespace": cluster.namespace,
        "labels": labels | ({"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {}),
        "annotations": {"valr/location": url},
    }
    whole = {
        # Kueue starts what waits in its queue; a Job that is made running would pass it by.
        "suspend": cluster.queue is not None,
        "ttlSecondsAfterFinished": round(cluster.keep_hours * 3600),
    }
    job = _job(row, recipe, labels, command, environment)
    if _is_set(row, recipe):
        spec = whole | _set(name, {"metadata": {"labels": labels}, "spec": job})
        return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": whole | job}


def _job(
    row: Stage, recipe: Recipe, labels: Mapping[str, str], command: list[str], environment: Mapping[str, str]
) -> dict[str, Any]:
    nodes = _nodes(row, recipe)
    return {
        "completions": nodes,
        "parallelism": nodes,
        "completionMode": "Indexed" if nodes > 1 else "NonIndexed",
        # What counts as a failure ends the Job. Whether it is done again is decided outside, for all kinds alike.
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": _failure_rules(nodes)},
        "podReplacementPolicy": "Failed",
        "activeDeadlineSeconds": round(recipe.cluster.deadline_hours * 3600),
        "template": {
            "metadata": {"labels": dict(labels)},
            "spec": _pod(row, recipe, command, environment),
        },
    }


def _set(name: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """A JobSet of one Job: all of its Pods are started again together when one was taken away."""
    return {
        "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
        # Of what fails, the reason is the same for a Pod that was taken away and for an exit status: the words differ.
        "failurePolicy": {
            "maxRestarts": 0,
            "rules": [
                {
                    "name": "takenAway",
                    "action": "RestartJobSetAndIgnoreMaxRestarts",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                    "onJobFailureMessagePatterns": [".*condition DisruptionTarget.*"],
                },
                {
                    "name": "endedByItself",
                    "action": "FailJobSet",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                    "onJobFailureMessagePatterns": [f".*exit code ({EXIT_CONFIGURATION}|{EXIT_AT_CHECKPOINT}) .*"],
                },
            ],
        },
        "replicatedJobs": [{"name": MEMBER, "replicas": 1, "template": dict(job)}],
    }


def _failure_rules(nodes: int) -> list[dict[str, Any]]:
    """In this order: a Pod that is taken away also ends with an exit status.

    A Pod alone is replaced by the Job and goes on from its checkpoint. One of several can't be: the others have failed
    with it by then, and all have to start together; a JobSet starts them again by itself.
    """
    return [
        {
            "action": "Ignore" if nodes == 1 else "FailJob",
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        },
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": CONTAINER,
                "operator": "In",
                "values": [EXIT_CONFIGURATION, EXIT_AT_CHECKPOINT],
            },
        },
    ]


def _pod(row: Stage, recipe: Recipe, command: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    cluster, nodes, gpu = recipe.cluster, _nodes(row, recipe), gpus(row, recipe)
    amounts = {"cpu": cluster.cpu, "memory": cluster.memory, "ephemeral-storage": cluster.scratch}
    if gpu:
        # Requests and limits of a device have to be equal, and a quantity is a string.
        amounts["nvidia.com/gpu"] = str(gpu)
    variables = {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(recipe.runtime.threads),
        **({"NCCL_DEBUG": "WARN", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"} if gpu else {}),
        # The root file system can't be written, and /tmp is for small things.
        "TMPDIR": "/workspace",
        **environment,
    }
    pod: dict[str, Any] = {
        # podFailurePolicy wants it.
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": cluster.grace_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _UID,
            "runAsGroup": _UID,
            "fsGroup": _UID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": CONTAINER,
                "image": cluster.image,
                "command": command,
                "env": [{"name": name, "value": value} for name, value in variables.items()],
                "envFrom": [{"secretRef": {"name": secret}} for secret in cluster.secrets],
                # No limit for the CPU: it would throttle where cores are free.
                "resources": {
                    "requests": amounts,
                    "limits": {name: amount for name, amount in amounts.items() if name != "cpu"},
                },
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                # Its last lines are then part of the Pod's status, and outlive the log.
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "volumeMounts": [
                    {"name": "workspace", "mountPath": "/workspace"},
                    {"name": "tmp", "mountPath": "/tmp"},
                    {"name": "shared-memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "workspace", "emptyDir": {"sizeLimit": cluster.scratch}},
            {"name": "tmp", "emptyDir": {"sizeLimit": cluster.scratch}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shared_memory}},
        ],
    }
    if cluster.data_claim and _local_paths(row, recipe):
        pod["volumes"].append(
            {"name": "data", "persistentVolumeClaim": {"claimName": cluster.data_claim, "readOnly": True}}
        )
        pod["containers"][0]["volumeMounts"].append({"name": "data", "mountPath": DATA_FOLDER, "readOnly": True})
    if gpu:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if cluster.service_account:
        pod["serviceAccountName"] = cluster.service_account
    if cluster.priority_class:
        pod["priorityClassName"] = cluster.priority_class
    if nodes > 1 and not _is_set(row, recipe):
        pod["subdomain"] = SERVICE
    return pod


def _service(cluster: ClusterRecipe) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": SERVICE, "namespace": cluster.namespace},
        "spec": {
            "clusterIP": "None",
            # Ranks look for each other while they start.
            "publishNotReadyAddresses": True,
            "selector": {"app.kubernetes.io/component": "stage"},
        },
    }


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
