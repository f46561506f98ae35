"""How a Job ended, or what keeps it from going on, each in one sentence that says what to do.

In: a Job, its Pods and its events, as the API gives them, in JSON; a JobSet is read as the Job it stands for. Out: an
`Ending`, with its kind and whether a retry can help, or `Hindrance`s, with how long each is waited for.
Always: of several Pods that failed the cause is named, not what followed from it; nothing here talks to a cluster.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from valr_ops.exits import EXIT_AT_CHECKPOINT, EXIT_CONFIGURATION
from valr_ops.recipe.recipe import ClusterRecipe
from valr_ops.release.manifest import CONTAINER

_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "ImageInspectError")
_START_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_GOES_ON = "run the same again: training goes on from its last checkpoint, other stages begin again"


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
    "forbidden",
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


def as_job(jobset: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A JobSet as the Job it stands for.

    Args:
        jobset: as the API gives it, in JSON.
        jobs: those in it that are there; the one that failed says more about it than the JobSet does.
    """
    own = _conditions(jobset)
    conditions: list[Mapping[str, Any]] = []
    if "Completed" in own:
        conditions.append({"type": "Complete", "status": "True"})
    elif "Failed" in own:
        conditions.append(next((one["Failed"] for one in map(_conditions, jobs) if "Failed" in one), own["Failed"]))
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"] | {"suspend": jobset["spec"].get("suspend")}
    status = {"conditions": conditions, "restarts": jobset.get("status", {}).get("restarts", 0)}
    return {**jobset, "spec": spec, "status": status}


def _conditions(thing: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What is true of a Job or JobSet, by type."""
    return {one["type"]: one for one in thing.get("status", {}).get("conditions") or () if one["status"] == "True"}


def ending(job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]], cluster: ClusterRecipe) -> Ending | None:
    """How a Job ended, from its own state and its Pods'; None while it is under way.

    Args:
        job: as the API gives it, in JSON.
        pods: the Job's Pods that are still there.
        cluster: whose settings the sentence names.
    """
    name = job["metadata"]["name"]
    conditions = _conditions(job)
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
    causes = [cause for pod in pods if (cause := cause_of(pod, cluster))]
    said = _from_message(name, _joined(failed.get("reason"), failed.get("message")))
    # Of several Pods one failed first, and the others because of it. Which rule ended the Job is known; the Pod it was
    # may be gone. Else it is by the cause that is least like a consequence.
    same = [cause for cause in causes if said.kind in ("failed", cause.kind)]
    return min(same, key=lambda cause: _CAUSES.index(cause.kind)) if same else said


_CAUSES: tuple[Kind, ...] = ("evicted", "memory", "configuration", "killed", "failed", "resume")
"""The peers of a rank that was killed fail because they can't reach it; all that still ran were told to stop."""


def cause_of(pod: Mapping[str, Any], cluster: ClusterRecipe) -> Ending | None:
    """Why one Pod failed; None for one that did not."""
    name, status = pod["metadata"]["name"], pod.get("status", {})
    ended = ended_container(pod)
    if status.get("phase") != "Failed" and (ended is None or ended.get("exitCode") == 0):
        return None
    if (away := taken(pod)) is not None:
        return away
    if ended is None:
        said = _joined(status.get("reason"), status.get("message")) or "it does not say why"
        return Ending("failed", f"Pod {name} failed ({said}); see: kubectl describe pod {name}")
    return _by_exit_code(name, int(ended["exitCode"]), ended, cluster)


def taken(pod: Mapping[str, Any]) -> Ending | None:
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
    if code == EXIT_AT_CHECKPOINT:
        return Ending("resume", f"Pod {pod} stopped when it was told to; {_GOES_ON}")
    if code == 137 and said.startswith("rank "):
        return Ending(
            "killed",
            f"in Pod {pod} {said}, and the others ended with it; run the same again: training goes on from its last "
            "checkpoint. If it happens again raise cluster.memory: where memory runs out, one process is killed",
        )
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
    if code and int(code[1]) == EXIT_AT_CHECKPOINT:
        return Ending("resume", f"Job {name} stopped when it was told to; {_GOES_ON}")
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
    job: Mapping[str, Any],
    pods: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    cluster: ClusterRecipe,
    pace: Pace,
) -> Iterator[Hindrance]:
    """All that keeps a Job from going on at the moment: its state, its Pods' and, where one is missing, its events."""
    name, wait_seconds = job["metadata"]["name"], cluster.wait_hours * 3600
    if job["spec"].get("suspend"):
        yield Hindrance(
            "queue",
            name,
            f"Job {name} waits in the queue {cluster.queue} (suspended); it starts by itself when there is room. To "
            f"wait longer raise cluster.wait_hours={cluster.wait_hours:g} and run the same again",
            wait_seconds,
        )
    elif lacks_pod(job, pods):
        begun = max((pod["metadata"].get("creationTimestamp") or "" for pod in pods), default="")
        yield _without_pod(name, [one for one in events if seen_at(one) >= begun], cluster, pace)
    for pod in pods:
        yield from _pod_hindrances(pod, cluster, pace)


def lacks_pod(job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]) -> bool:
    """Whether fewer Pods run or have run well than the Job wants, which is not suspended."""
    well = sum(pod.get("status", {}).get("phase") != "Failed" for pod in pods)
    return not job["spec"].get("suspend") and well < job["spec"]["parallelism"]


def _without_pod(name: str, events: Sequence[Mapping[str, Any]], cluster: ClusterRecipe, pace: Pace) -> Hindrance:
    """Why a Job lacks a Pod: of one that is refused the Job's event is the only trace."""
    said = next((one.get("message", "") for one in reversed(events) if one.get("reason") == "FailedCreate"), None)
    if said is None:
        return Hindrance(
            "start",
            name,
            f"Job {name} lacks a Pod, and no event says why; is the Job controller of the cluster at work? See: "
            f"kubectl describe job {name} -n {cluster.namespace}",
            pace.start_seconds,
        )
    # Each attempt has a name of its own, and would be told again.
    words = re.sub(r'pods "[^"]*"', "a Pod", said.strip().rstrip("."))
    if "exceeded quota" in said:
        return Hindrance(
            "forbidden",
            name,
            f"Job {name} lacks a Pod: {words}. It starts by itself when others have ended and made room; if it is more "
            f"than the whole quota, raise the quota of namespace {cluster.namespace}, or lower what it names in the "
            "recipe's cluster section",
            cluster.wait_hours * 3600,
        )
    if "PodSecurity" in said:
        mend = (
            f"something in the cluster alters the Pods, whose manifest keeps to the level restricted, or namespace "
            f"{cluster.namespace} demands another one: compare with valr plan --manifest STAGE"
        )
    elif "service account" in said or "serviceaccount" in said:
        mend = f"create the account in namespace {cluster.namespace}, or correct cluster.service_account"
    elif "PriorityClass" in said:
        mend = "create that PriorityClass, or correct cluster.priority_class"
    else:
        mend = "correct the recipe's cluster section, or the rule of the cluster that refuses it"
    return Hindrance(
        "forbidden", name, f"Job {name} lacks a Pod: {words}; {mend}. Then run the same again", pace.start_seconds
    )


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


def seen_at(event: Mapping[str, Any]) -> str:
    """When an event was seen last; as text, which sorts."""
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")


def ended_container(pod: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for container in pod.get("status", {}).get("containerStatuses") or ():
        if container["name"] == CONTAINER:
            found: Mapping[str, Any] | None = container.get("state", {}).get("terminated")
            return found
    return None


def has_started(pod: Mapping[str, Any]) -> bool:
    states = [one.get("state", {}) for one in pod.get("status", {}).get("containerStatuses") or ()]
    return any("running" in state or "terminated" in state for state in states)


def _is_true(condition: Mapping[str, Any], type: str) -> bool:
    return condition["type"] == type and condition["status"] == "True"


def _joined(*words: str | None) -> str:
    return ": ".join(word.strip() for word in words if word)


def _last_line(message: str | None) -> str:
    """The sentence with which a verb complained; where none did, the last line of the log that is no JSON."""
    lines = [line.strip() for line in (message or "").splitlines() if line.strip()]
    spoken = [line for line in lines if not line.startswith("{")]
    # torchrun has a word of its own after the ranks'.
    spoken = [line for line in spoken if line.startswith("valr: ")] or spoken
    return spoken[-1].removeprefix("valr: ")[:500] if spoken else ""
