"""A stage as a Kubernetes Job: its manifest, and watching it until it is known how it ended, in one sentence.

In: a stage, the recipe, and the location through which the Pod is told what to do (`release.pod`). Out: the manifest
as plain values, and an `Ending`: what happened, what to do, and whether a retry can help.
Always: one Job for one piece of work, whose name says so, and who comes second attaches to it; a Job that is under way
is deleted only when the run is cancelled, so an orchestrator that dies or gives up costs nothing; an API server that is
away is waited for; waiting ends, and says what it waited for. The Job is polled, never watched: a poll can't hang.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

from valr_ops.recipe.recipe import ClusterRecipe, Recipe
from valr_ops.stages import Stage
from valr_ops.training.stop import RESUME_EXIT_CODE

if TYPE_CHECKING:
    from pathlib import Path

    from kubernetes.client import ApiException

    from valr_ops.release.pod import Request

EXIT_CONFIGURATION = 42
"""Exit status of the verbs for what a retry can't mend; `__main__` says which there are."""
CONTAINER = "stage"
SERVICE = "valr-stages"
"""The headless Service that gives the Pods of a Job on several nodes their names; one for all Jobs."""
SPEC_DIGEST = "valr/spec"
"""Annotation of a Job with the digest of its manifest."""

_UID = 10001
_PORT = 29500
_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "ImageInspectError")
_START_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_LONGEST_LINE = 1 << 16


class ClusterError(RuntimeError):
    """The cluster can't be asked or refuses: what it said, and how to mend it."""


class ClusterAwayError(ClusterError):
    """The API server did not answer for longer than `Pace.away_seconds`; the Job goes on without us."""

    exit_status = 1


# ---------------------------------------------------------------------------------------------------------- manifest


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
    )


def job_name(stage: str, url: str) -> str:
    """The Job's name: the stage, and the key that ends the job's location. At most 63 characters, an index included."""
    words = re.sub(r"[^a-z0-9]+", "-", stage.lower()).strip("-")[:36].strip("-")
    return f"valr-{words}-{url.rstrip('/').rpartition('/')[2]}"


def gpus(row: Stage, recipe: Recipe) -> int:
    """GPUs of each Pod: one a process for what runs `runtime.processes`, else one; none where the recipe says cpu."""
    if row.resources != "gpu" or recipe.runtime.device == "cpu":
        return 0
    return recipe.runtime.processes // _nodes(row, recipe) if row.group in ("training", "teachers") else 1


def _nodes(row: Stage, recipe: Recipe) -> int:
    return recipe.cluster.nodes if row.group == "training" else 1


def stage_command(row: Stage, recipe: Recipe, url: str) -> list[str]:
    """What the container runs: the verb, under torchrun where several Pods are one training.

    In full, because the orchestrator does not know the image's entry point.
    """
    verb = ["-m", "valr_ops", "run", row.name, "--job", url]
    nodes = _nodes(row, recipe)
    if nodes == 1:
        return ["python3", *verb]
    return [
        *("python3", "-m", "torch.distributed.run", f"--nnodes={nodes}", "--node-rank=$(JOB_COMPLETION_INDEX)"),
        f"--nproc-per-node={recipe.runtime.processes // nodes}",
        *(f"--master-addr={job_name(row.name, url)}-0.{SERVICE}", f"--master-port={_PORT}"),
        # Pods start as their nodes pull the image; and ranks need the whole grace period to write a checkpoint.
        *("--rdzv-conf=timeout=1800", f"--shutdown-timeout={recipe.cluster.grace_seconds}"),
        *verb,
    ]


def manifest(
    row: Stage,
    recipe: Recipe,
    url: str,
    *,
    command: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The objects of one stage's work: a Job, and before it the Service that a Job on several nodes needs.

    Args:
        row: the stage.
        recipe: its section `cluster` says where and with what.
        url: the job's location, ``<bucket>/jobs/<key>``; equal for equal work.
        command: `stage_command` unless given.
        environment: more variables of the container; they are no part of what makes two manifests differ.
    """
    cluster, nodes, name = recipe.cluster, _nodes(row, recipe), job_name(row.name, url)
    command = list(command or stage_command(row, recipe, url))
    labels = {
        "app.kubernetes.io/name": "valr",
        "app.kubernetes.io/component": "stage",
        "valr/stage": row.name.replace("@", "."),
    }
    job: dict[str, Any] = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": cluster.namespace,
            "labels": labels | ({"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {}),
            "annotations": {"valr/location": url},
        },
        "spec": {
            # Kueue starts what waits in its queue; a Job that is made running would pass it by.
            "suspend": cluster.queue is not None,
            "completions": nodes,
            "parallelism": nodes,
            "completionMode": "Indexed" if nodes > 1 else "NonIndexed",
            # What counts as a failure ends the Job. Whether it is done again is decided outside, for all kinds alike.
            "backoffLimit": 0,
            "podFailurePolicy": {"rules": _failure_rules(nodes)},
            "podReplacementPolicy": "Failed",
            "activeDeadlineSeconds": round(cluster.deadline_hours * 3600),
            "ttlSecondsAfterFinished": round(cluster.keep_hours * 3600),
            "template": {
                "metadata": {"labels": labels},
                "spec": _pod(row, recipe, command, environment or {}),
            },
        },
    }
    job["metadata"]["annotations"][SPEC_DIGEST] = _digest(manifest_without(job, environment or {}))
    return [_service(cluster), job] if nodes > 1 else [job]


def manifest_without(job: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """A copy of a Job's manifest without some of its container's variables."""
    copy: dict[str, Any] = json.loads(json.dumps(job))
    container = copy["spec"]["template"]["spec"]["containers"][0]
    container["env"] = [variable for variable in container["env"] if variable["name"] not in environment]
    return copy


def _failure_rules(nodes: int) -> list[dict[str, Any]]:
    """In this order: a Pod that is taken away also ends with an exit status.

    A Pod alone is replaced by the Job and goes on from its checkpoint. One of several can't be: the others have failed
    with it by then, and all have to start together.
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
                "values": [EXIT_CONFIGURATION, RESUME_EXIT_CODE],
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
    if gpu:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if cluster.service_account:
        pod["serviceAccountName"] = cluster.service_account
    if cluster.priority_class:
        pod["priorityClassName"] = cluster.priority_class
    if nodes > 1:
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


# ------------------------------------------------------------------------------------------------------ how it ended

Kind = Literal[
    "succeeded",
    "configuration",
    "resume",
    "memory",
    "evicted",
    "killed",
    "failed",
    "deadline",
    "deleted",
    "image",
    "start",
    "unschedulable",
    "queue",
    "node_lost",
]
RETRIED: frozenset[Kind] = frozenset({"resume", "evicted", "killed", "failed", "node_lost"})
"""Kinds of ending after which the same again may go well."""


@dataclass(frozen=True)
class Ending:
    """How a Job ended, or why it is not waited for any longer."""

    kind: Kind
    sentence: str
    """What happened and what to do."""

    @property
    def can_be_retried(self) -> bool:
        return self.kind in RETRIED


def ending(job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]], cluster: ClusterRecipe) -> Ending | None:
    """How a Job ended, from its own state and its Pods'; None while it is under way.

    Args:
        job: as the API gives it, in JSON.
        pods: the Job's Pods that are still there.
        cluster: whose settings the sentence names.
    """
    name = job["metadata"]["name"]
    conditions = {one["type"]: one for one in job.get("status", {}).get("conditions") or () if one["status"] == "True"}
    if "Complete" in conditions:
        return Ending("succeeded", f"Job {name} is complete")
    failed = conditions.get("Failed")
    if failed is None:
        return None
    if failed.get("reason") == "DeadlineExceeded":
        return Ending(
            "deadline",
            f"Job {name} ran for longer than cluster.deadline_hours={cluster.deadline_hours:g} and was stopped; raise "
            "it and run the same again: training goes on from its last checkpoint",
        )
    causes = [cause for pod in pods if (cause := _cause(pod, cluster))]
    said = _from_message(name, _joined(failed.get("reason"), failed.get("message")))
    # Of several Pods one failed first, and the others because of it. Which rule ended the Job is known; the Pod it was
    # may be gone. Else it is by the cause that is least like a consequence.
    same = [cause for cause in causes if said.kind in ("failed", cause.kind)]
    return min(same, key=lambda cause: _CAUSES.index(cause.kind)) if same else said


_CAUSES: tuple[Kind, ...] = ("evicted", "memory", "configuration", "failed", "killed", "resume")


def _cause(pod: Mapping[str, Any], cluster: ClusterRecipe) -> Ending | None:
    """Why one Pod failed; None for one that did not."""
    name, status = pod["metadata"]["name"], pod.get("status", {})
    ended = _ended_container(pod)
    if status.get("phase") != "Failed" and (ended is None or ended.get("exitCode") == 0):
        return None
    if (taken := _taken(pod)) is not None:
        return taken
    if ended is None:
        said = _joined(status.get("reason"), status.get("message")) or "it does not say why"
        return Ending("failed", f"Pod {name} failed ({said}); see: kubectl describe pod {name}")
    return _by_exit_code(name, int(ended["exitCode"]), ended, cluster)


def _taken(pod: Mapping[str, Any]) -> Ending | None:
    """That a Pod was or is being taken away, and by whom."""
    name, status = pod["metadata"]["name"], pod.get("status", {})
    condition = next((one for one in status.get("conditions") or () if _is_true(one, "DisruptionTarget")), None)
    why = condition or (status if status.get("reason") in ("Evicted", "Preempting") else None)
    if why is None:
        return None
    return Ending(
        "evicted",
        f"Pod {name} was taken from {pod.get('spec', {}).get('nodeName') or 'its node'} "
        f"({_joined(why.get('reason'), why.get('message'))}); run the same again: training goes on from its last "
        "checkpoint",
    )


def _by_exit_code(pod: str, code: int, ended: Mapping[str, Any], cluster: ClusterRecipe) -> Ending:
    said = _last_line(ended.get("message"))
    if ended.get("reason") == "OOMKilled":
        return Ending(
            "memory",
            f"Pod {pod} was killed because it needed more memory than cluster.memory={cluster.memory} (its files in "
            "/dev/shm count); raise cluster.memory, or lower micro_batch or cluster.shared_memory",
        )
    if code == EXIT_CONFIGURATION:
        return Ending("configuration", said or f"Pod {pod} ended with status 42: its log says what has to be mended")
    if code == RESUME_EXIT_CODE:
        return Ending("resume", f"Pod {pod} stopped at a checkpoint; run the same again and it goes on from there")
    if code == 137:
        return Ending(
            "killed",
            f"Pod {pod} was killed (SIGKILL); where it had been asked to stop, cluster.grace_seconds="
            f"{cluster.grace_seconds} was too short, else its node ran out of memory. Run the same again",
        )
    return Ending("failed", f"Pod {pod} ended with status {code}{f': {said}' if said else '; its log says why'}")


def _from_message(name: str, message: str) -> Ending:
    """The ending of a Job whose Pods are gone already, from what its condition says."""
    code = re.search(r"exit code (\d+)", message)
    if code and int(code[1]) == EXIT_CONFIGURATION:
        return Ending("configuration", f"Job {name} ended with status 42; the log of its run says what to mend")
    if code and int(code[1]) == RESUME_EXIT_CODE:
        return Ending("resume", f"Job {name} stopped at a checkpoint; run the same again and it goes on from there")
    if "DisruptionTarget" in message:
        return Ending(
            "evicted", f"a Pod of Job {name} was taken away; run the same again: it goes on from its checkpoint"
        )
    return Ending("failed", f"Job {name} failed and its Pods are gone ({message}); run the same again")


@dataclass(frozen=True)
class Hindrance:
    """What keeps a Job from going on."""

    kind: Kind
    about: str
    """The Pod or the Job."""
    sentence: str
    seconds: float
    """How long it is waited for."""


def hindrances(
    job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]], cluster: ClusterRecipe, pace: Pace
) -> Iterator[Hindrance]:
    """All that keeps a Job from going on at the moment, as its state and its Pods' tell."""
    name, wait_seconds = job["metadata"]["name"], cluster.wait_hours * 3600
    if job["spec"].get("suspend"):
        yield Hindrance(
            "queue",
            name,
            f"Job {name} waits in the queue {cluster.queue} (suspended); it starts by itself when there is room. To "
            f"wait longer raise cluster.wait_hours={cluster.wait_hours:g} and run the same again",
            wait_seconds,
        )
        return
    if not pods:
        yield Hindrance(
            "start",
            name,
            f"Job {name} has no Pod yet; a quota, PodSecurity or a missing service account may forbid it: kubectl "
            f"describe job {name} -n {cluster.namespace}",
            pace.start_seconds,
        )
    for pod in pods:
        yield from _pod_hindrances(pod, cluster, pace)


def _pod_hindrances(pod: Mapping[str, Any], cluster: ClusterRecipe, pace: Pace) -> Iterator[Hindrance]:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    if status.get("phase") in ("Succeeded", "Failed"):
        return
    if pod["metadata"].get("deletionTimestamp"):
        node = pod.get("spec", {}).get("nodeName") or "NODE"
        yield Hindrance(
            "node_lost",
            name,
            f"Pod {name} does not end though it was told to: its node {node} is lost. The Job waits until the node is "
            f"back or given up: kubectl taint nodes {node} node.kubernetes.io/out-of-service=nodeshutdown:NoExecute; "
            "then run the same again",
            cluster.grace_seconds + pace.lost_seconds,
        )
        return
    scheduled: Mapping[str, Any] = next(
        (one for one in status.get("conditions") or () if one["type"] == "PodScheduled"), {}
    )
    if scheduled.get("status") == "False":
        yield Hindrance(
            "unschedulable",
            name,
            f"Pod {name} finds no node ({scheduled.get('message') or scheduled.get('reason')}); it starts by itself "
            "when one is free. If none can ever hold it, lower cluster.cpu, cluster.memory or cluster.scratch, or add "
            "nodes with GPUs",
            cluster.wait_hours * 3600,
        )
    for container in status.get("containerStatuses") or ():
        waiting = container.get("state", {}).get("waiting") or {}
        reason, said = waiting.get("reason", ""), _joined(waiting.get("reason"), waiting.get("message"))
        if reason in _IMAGE_REASONS:
            yield Hindrance(
                "image",
                name,
                f"Pod {name} can't get its image {cluster.image} ({said}); correct cluster.image, push the image, or "
                "give the nodes access to the registry",
                0.0 if reason == "InvalidImageName" else pace.start_seconds,
            )
        elif reason in _START_REASONS:
            yield Hindrance(
                "start",
                name,
                f"Pod {name} can't start ({said}); correct cluster.secrets or the image, then run the same again",
                pace.start_seconds,
            )


def _ended_container(pod: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for container in pod.get("status", {}).get("containerStatuses") or ():
        if container["name"] == CONTAINER:
            found: Mapping[str, Any] | None = container.get("state", {}).get("terminated")
            return found
    return None


def _has_started(pod: Mapping[str, Any]) -> bool:
    states = [one.get("state", {}) for one in pod.get("status", {}).get("containerStatuses") or ()]
    return any("running" in state or "terminated" in state for state in states)


def _is_true(condition: Mapping[str, Any], type: str) -> bool:
    return condition["type"] == type and condition["status"] == "True"


def _joined(*words: str | None) -> str:
    return ": ".join(word.strip() for word in words if word)


def _last_line(message: str | None) -> str:
    """The sentence with which a verb complained: the last line of its log that is no JSON."""
    lines = [line.strip() for line in (message or "").splitlines() if line.strip()]
    spoken = [line for line in lines if not line.startswith("{")]
    return spoken[-1].removeprefix("valr: ")[:500] if spoken else ""


# ------------------------------------------------------------------------------------------------------- the cluster


@dataclass(frozen=True)
class Pace:
    """Seconds: how often to look, and how long to wait for what ought to be quick."""

    poll_seconds: float = 5.0
    start_seconds: float = 600.0
    """For a Pod, its image and its Secrets."""
    lost_seconds: float = 600.0
    """For a Pod that was told to stop, beyond its grace period."""
    away_seconds: float = 3600.0
    """For the API server."""
    longest_pause_seconds: float = 30.0
    """Between two questions to an API server that is away."""


class Cluster:
    """The Jobs of one namespace.

    Args:
        settings: the recipe's section `cluster`.
        say: gets sentences for people: what the Job waits for, a Pod that was replaced, an API server that is away.
        pace: how often to look and how long to wait.

    Raises:
        ClusterError: there is neither a kubeconfig nor a service account.
    """

    def __init__(self, settings: ClusterRecipe, say: Callable[[str], None], pace: Pace | None = None) -> None:
        from kubernetes import client, config

        configuration = client.Configuration()
        try:
            if "KUBECONFIG" not in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=configuration)
            else:
                file = os.environ.get("KUBECONFIG", "~/.kube/config")
                config.load_kube_config(file, client_configuration=configuration)
        except (config.ConfigException, OSError) as error:
            raise ClusterError(
                f"no access to a cluster ({error}); set KUBECONFIG to the file that names yours, or set "
                "cluster.dispatch to local"
            ) from None
        # Ours waits longer, knows Retry-After for all verbs, and says what it waits for.
        configuration.retries = False
        self._client = client.ApiClient(configuration)
        self._jobs, self._pods = client.BatchV1Api(self._client), client.CoreV1Api(self._client)
        self._settings, self._say, self.pace = settings, say, pace or Pace()

    def start(self, documents: Sequence[Mapping[str, Any]]) -> Literal["started", "attached"]:
        """Make the Job, or attach to the one that does the same work already.

        A Job of that name which has failed, or which has not begun and was made from other settings, is replaced: its
        checkpoints are found by the new one.

        Raises:
            ClusterError: the cluster refuses it.
        """
        *services, job = documents
        name = job["metadata"]["name"]
        for service in services:
            self._make_service(service)
        while True:
            made = self._ask(
                self._jobs.create_namespaced_job, self._settings.namespace, job, field_validation="Strict", but=(409,)
            )
            if made is not None:
                return "started"
            there = self.job(name)
            if there is not None and not there["metadata"].get("deletionTimestamp"):
                why = self._why_replaced(there, job)
                if why is None:
                    return "attached"
                self._say(f"Job {name} is made again: {why}")
                self._delete(name, there["metadata"]["uid"])
            self._wait_until_gone(name, (there or {}).get("metadata", {}).get("uid"))

    def _why_replaced(self, there: Mapping[str, Any], job: Mapping[str, Any]) -> str | None:
        name, pods = there["metadata"]["name"], self.pods(there["metadata"]["name"])
        before = ending(there, pods, self._settings)
        if before is not None:
            return None if before.kind == "succeeded" else f"the one before ended ({before.sentence})"
        known = (there["metadata"].get("annotations") or {}).get(SPEC_DIGEST)
        if known == job["metadata"]["annotations"][SPEC_DIGEST]:
            return None
        if any(map(_has_started, pods)):
            self._say(f"Job {name} runs with the settings of an earlier recipe; it is left to finish")
            return None
        return "it has not begun, and the recipe's cluster section has changed"

    def wait(
        self,
        name: str,
        hear: Callable[[str, str], None],
        poll: Callable[[], None] = lambda: None,
    ) -> Ending:
        """Wait until the Job has ended, or until what it waits for has taken too long; the Job is left as it is.

        Args:
            name: of the Job.
            hear: gets each line of the Pods' logs, with the Pod's name; called from other threads.
            poll: called at each look.

        Raises:
            ClusterAwayError: the API server did not answer for `Pace.away_seconds`.
            ClusterError: it refuses to answer.
        """
        since: dict[tuple[str, str], float] = {}
        told: set[str] = set()
        with _Logs(self._pods, self._settings.namespace, hear, self.pace) as logs:
            while True:
                job = self.job(name)
                if job is None:
                    poll()
                    return Ending(
                        "deleted",
                        f"Job {name} was deleted by somebody while it was waited for; run the same again to go on from "
                        "the last checkpoint",
                    )
                pods = self.pods(name)
                logs.follow(pods)
                poll()
                ended = ending(job, pods, self._settings)
                if ended is None or ended.kind == "succeeded":
                    self._tell_replaced(pods, told)
                if ended is not None:
                    return ended
                hindering = {(one.kind, one.about): one for one in hindrances(job, pods, self._settings, self.pace)}
                since = {key: since.get(key, time.monotonic()) for key in hindering}
                for key, one in hindering.items():
                    if time.monotonic() - since[key] >= one.seconds:
                        return Ending(one.kind, one.sentence)
                    if one.kind not in ("start", "node_lost") and one.sentence not in told:
                        told.add(one.sentence)
                        self._say(one.sentence)
                time.sleep(self.pace.poll_seconds)

    def _tell_replaced(self, pods: Sequence[Mapping[str, Any]], told: set[str]) -> None:
        for pod in pods:
            # One that is evicted is gone soon after it has ended.
            cause = _cause(pod, self._settings) or _taken(pod)
            if cause is not None and pod["metadata"]["name"] not in told:
                told.add(pod["metadata"]["name"])
                self._say(f"{cause.sentence.partition(';')[0]}; the Job starts another one by itself")

    def cancel(self, name: str) -> None:
        """Delete the Job and wait until its Pods, which write their checkpoints first, are gone."""
        there = self.job(name)
        if there is not None:
            self._delete(name, there["metadata"]["uid"])
            self._wait_until_gone(name, there["metadata"]["uid"])

    def _wait_until_gone(self, name: str, uid: str | None) -> None:
        until = time.monotonic() + self._settings.grace_seconds + self.pace.lost_seconds
        while (there := self.job(name)) is not None and there["metadata"]["uid"] == uid:
            if time.monotonic() > until:
                raise ClusterError(
                    f"Job {name} is being deleted but its Pods do not end, so nothing is started beside them; see: "
                    f"kubectl get pods -l job-name={name} -n {self._settings.namespace}"
                )
            time.sleep(min(self.pace.poll_seconds, 1.0))

    def job(self, name: str) -> dict[str, Any] | None:
        """The Job as the API gives it, or None."""
        return self._ask(self._jobs.read_namespaced_job, name, self._settings.namespace, but=(404,))

    def pods(self, name: str) -> list[dict[str, Any]]:
        """The Pods of a Job, the oldest first."""
        found = self._ask(
            self._pods.list_namespaced_pod,
            self._settings.namespace,
            label_selector=f"batch.kubernetes.io/job-name={name}",
        )
        items: list[dict[str, Any]] = (found or {}).get("items", [])
        return sorted(items, key=lambda pod: (pod["metadata"].get("creationTimestamp", ""), pod["metadata"]["name"]))

    def _delete(self, name: str, uid: str) -> None:
        # Foreground: as long as a Pod is there, so is the Job, and none of the same name can start beside it. With its
        # uid: another orchestrator may have replaced it by now.
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        self._ask(self._jobs.delete_namespaced_job, name, self._settings.namespace, body=options, but=(404, 409))

    def _make_service(self, service: Mapping[str, Any]) -> None:
        """Where infra/k8s made it already, the orchestrator need not have the right to make one."""
        self._ask(self._pods.create_namespaced_service, self._settings.namespace, service, but=(403, 409))

    def _ask(self, call: Callable[..., Any], *arguments: Any, but: tuple[int, ...] = (), **options: Any) -> Any:
        """The answer as JSON values, or None for a status in `but`; asked again while the API server is away."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            for attempt in Retrying(
                retry=retry_if_exception(_passes),
                wait=self._pause,
                stop=stop_after_delay(self.pace.away_seconds),
                before_sleep=self._tell_away,
                reraise=True,
            ):
                with attempt:
                    return self._client.sanitize_for_serialization(
                        call(*arguments, **options, _request_timeout=(5.0, 30.0))
                    )
        except ApiException as error:
            if error.status in but:
                return None
            if _passes(error):
                raise self._away(error) from None
            raise self._refusal(error) from None
        except HTTPError as error:
            raise self._away(error) from None

    def _pause(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = (getattr(error, "headers", None) or {}).get("Retry-After", "")
        if asked.isdecimal():
            return min(float(asked), self.pace.away_seconds)
        longest = self.pace.longest_pause_seconds
        return wait_exponential_jitter(multiplier=min(0.5, longest), max=longest, jitter=min(1.0, longest))(state)

    def _tell_away(self, state: RetryCallState) -> None:
        if state.attempt_number == 2 and state.outcome:
            self._say(
                f"the API server does not answer ({_short(state.outcome.exception())}); the Job goes on, and is asked "
                "for again until it does"
            )

    def _away(self, error: BaseException) -> ClusterAwayError:
        return ClusterAwayError(
            f"the API server at {self._client.configuration.host} did not answer for {self.pace.away_seconds:g} s "
            f"({_short(error)}); what runs goes on. Run the same again when it is back: it attaches to its Job"
        )

    def _refusal(self, error: ApiException) -> ClusterError:
        said = _said(error)
        if error.status == 0:
            return ClusterError(f"the cluster's certificate is not trusted ({said}); correct the one in KUBECONFIG")
        if error.status == 401:
            return ClusterError(f"the cluster does not know who asks ({said}); renew the credentials in KUBECONFIG")
        if error.status == 403:
            return ClusterError(
                f"the cluster does not allow it ({said}); raise the quota it names, or bind the role in infra/k8s to "
                f"the account of the orchestrator in namespace {self._settings.namespace}"
            )
        if error.status == 404:
            return ClusterError(f"{said}; create the namespace {self._settings.namespace}, or set cluster.namespace")
        return ClusterError(f"the cluster refuses it ({error.status}: {said}); correct the recipe's cluster section")


def _passes(error: BaseException) -> bool:
    """Whether the same question may be answered later."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    if isinstance(error, ApiException):
        # 0 is what the client makes of a broken TLS connection, and of a certificate that it does not trust.
        broken = error.status == 0 and "CERTIFICATE_VERIFY_FAILED" not in str(error.reason)
        return broken or error.status in (429, 500, 502, 503, 504)
    return isinstance(error, HTTPError)


def _said(error: ApiException) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)


def _short(error: BaseException | None) -> str:
    status = getattr(error, "status", None)
    return f"{status} {getattr(error, 'reason', '')}".strip() if status else type(error).__name__


# -------------------------------------------------------------------------------------------------------------- logs


class _Logs:
    """Follows the logs of Pods, each in a thread; a stream that breaks off is taken up where it stopped.

    A log is for people, and may have gaps: what counts arrives by the job's messages.
    """

    def __init__(self, pods: Any, namespace: str, hear: Callable[[str, str], None], pace: Pace) -> None:
        self._pods, self._namespace, self._hear, self._pace = pods, namespace, hear, pace
        self._threads: dict[str, threading.Thread] = {}
        self._ended: set[str] = set()
        self._left = threading.Event()

    def __enter__(self) -> _Logs:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            # What has ended is heard to its end; the log of a node that is lost has none.
            until = time.monotonic() + 10.0
            for name in self._ended & self._threads.keys():
                self._threads[name].join(max(0.0, until - time.monotonic()))
        self._left.set()

    def follow(self, pods: Sequence[Mapping[str, Any]]) -> None:
        """Begin with those that have begun to speak since the last call."""
        for pod in pods:
            name = pod["metadata"]["name"]
            if _ended_container(pod) is not None:
                self._ended.add(name)
            if name not in self._threads and _has_started(pod):
                thread = threading.Thread(target=self._follow, args=(name,), daemon=True, name=f"log of {name}")
                self._threads[name] = thread
                thread.start()

    def _follow(self, pod: str) -> None:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        last, heard = "", time.monotonic()
        while not self._left.is_set():
            ended = pod in self._ended
            try:
                for stamp, line in self._lines(pod, time.monotonic() - heard + 5.0 if last else None):
                    if self._left.is_set():
                        return
                    heard = time.monotonic()
                    if stamp > last:
                        last = stamp
                        self._hear(pod, line)
            except ApiException as error:
                ended = ended or error.status == 404
            except (HTTPError, OSError):
                # Asked again, from the line at which it broke off.
                ended = False
            if ended:
                return
            self._left.wait(self._pace.poll_seconds)

    def _lines(self, pod: str, seconds: float | None) -> Iterator[tuple[str, str]]:
        """Pairs of time and line, of the last `seconds` or of all; times of equal length, so that they sort as text."""
        options = {} if seconds is None else {"since_seconds": max(1, round(seconds))}
        stream = self._pods.read_namespaced_pod_log(
            *(pod, self._namespace),
            container=CONTAINER,
            follow=True,
            timestamps=True,
            _preload_content=False,
            _request_timeout=(5.0, 60.0),
            **options,
        )
        try:
            rest = b""
            for block in stream.stream(4096):
                *lines, rest = (rest + block).split(b"\n")
                yield from map(_stamped, lines)
                if len(rest) > _LONGEST_LINE:
                    yield _stamped(rest)
                    rest = b""
            if rest:
                yield _stamped(rest)
        finally:
            stream.close()


def _stamped(line: bytes) -> tuple[str, str]:
    stamp, _, text = line.decode("utf-8", "replace").partition(" ")
    seconds, _, fraction = stamp.rstrip("Z").partition(".")
    return f"{seconds}.{fraction:0<9}", text.rstrip("\r")
