"""A stage as a Kubernetes Job: made, or found and attached to, and watched until it is known how it ended.

In: the manifests of a stage's work (`release.manifest`). Out: an `Ending` (`release.endings`), and meanwhile the lines
of its Pods' logs and sentences about what it waits for.
Always: who comes second attaches to the Job that is there; a Job that is under way is deleted only when the run is
cancelled, so an orchestrator that dies or gives up costs nothing; an API server that is away is waited for; waiting
ends, and says what it waited for. The Job is polled, never watched: a poll can't hang.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

from valr_ops.recipe.recipe import ClusterRecipe
from valr_ops.release.endings import (
    Ending,
    Pace,
    as_job,
    cause_of,
    ended_container,
    ending,
    has_started,
    hindrances,
    lacks_pod,
    seen_at,
    taken,
)
from valr_ops.release.manifest import CONTAINER, SPEC_DIGEST

if TYPE_CHECKING:
    from kubernetes.client import ApiException

_JOBS = ("batch", "v1", "jobs")
_LONGEST_LINE = 1 << 16


class ClusterError(RuntimeError):
    """The cluster can't be asked or refuses: what it said, and how to mend it."""


class ClusterAwayError(ClusterError):
    """The API server did not answer for longer than `Pace.away_seconds`; the Job goes on without us."""

    exit_status = 1


class Cluster:
    """The Jobs and JobSets of one namespace. A Job is meant by its manifest, the last of `manifest.documents`.

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
        # Jobs and JobSets alike, as JSON: the client's own classes drop fields that they don't know.
        self._objects, self._core = client.CustomObjectsApi(self._client), client.CoreV1Api(self._client)
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
            create = self._objects.create_namespaced_custom_object
            made = self._ask(create, *self._place(job), job, field_validation="Strict", but=(409,))
            if made is not None:
                return "started"
            there = self.job(job)
            if there is not None and not there["metadata"].get("deletionTimestamp"):
                why = self._why_replaced(there, job)
                if why is None:
                    return "attached"
                self._say(f"Job {name} is made again: {why}")
                self._delete(job, there["metadata"]["uid"])
            self._wait_until_gone(job, (there or {}).get("metadata", {}).get("uid"))

    def _why_replaced(self, there: Mapping[str, Any], job: Mapping[str, Any]) -> str | None:
        name, pods = there["metadata"]["name"], self.pods(job)
        before = ending(there, pods, self._settings)
        if before is not None:
            return None if before.kind == "succeeded" else f"the one before ended ({before.sentence})"
        known = (there["metadata"].get("annotations") or {}).get(SPEC_DIGEST)
        if known == job["metadata"]["annotations"][SPEC_DIGEST]:
            return None
        if any(map(has_started, pods)):
            self._say(f"Job {name} runs with the settings of an earlier recipe; it is left to finish")
            return None
        return "it has not begun, and the recipe's cluster section has changed"

    def wait(
        self,
        job: Mapping[str, Any],
        hear: Callable[[str, str], None],
        poll: Callable[[], None] = lambda: None,
    ) -> Ending:
        """Wait until the Job has ended, or until what it waits for has taken too long; the Job is left as it is.

        Args:
            job: its manifest.
            hear: gets each line of the Pods' logs, with the Pod's name; called from other threads.
            poll: called at each look.

        Raises:
            ClusterAwayError: the API server did not answer for `Pace.away_seconds`.
            ClusterError: it refuses to answer.
        """
        name = job["metadata"]["name"]
        since: dict[tuple[str, str], float] = {}
        told: set[str] = set()
        with _Logs(self._core, self._settings.namespace, hear, self.pace) as logs:
            while True:
                there = self.job(job)
                if there is None:
                    poll()
                    return Ending(
                        "deleted",
                        f"Job {name} was deleted by somebody while it was waited for; run the same again to go on from "
                        "the last checkpoint",
                    )
                pods = self.pods(job)
                logs.follow(pods)
                poll()
                ended = ending(there, pods, self._settings)
                if ended is None or ended.kind == "succeeded":
                    self._tell_replaced(there, pods, told)
                if ended is not None:
                    return ended
                events = self._events(job) if lacks_pod(there, pods) else []
                hindering = {
                    (one.kind, one.about): one for one in hindrances(there, pods, events, self._settings, self.pace)
                }
                since = {key: since.get(key, time.monotonic()) for key in hindering}
                for key, one in hindering.items():
                    if time.monotonic() - since[key] >= one.seconds:
                        return Ending(one.kind, one.sentence)
                    if one.kind not in ("start", "node_lost") and one.sentence not in told:
                        told.add(one.sentence)
                        self._say(one.sentence)
                time.sleep(self.pace.poll_seconds)

    def _tell_replaced(self, job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]], told: set[str]) -> None:
        if restarts := job.get("status", {}).get("restarts"):
            # The Pods that were there before are gone with their Job.
            sentence = (
                f"a Pod of JobSet {job['metadata']['name']} was taken away; all of its Pods are started again "
                f"together, time {restarts}, and go on from the last checkpoint"
            )
            if sentence not in told:
                told.add(sentence)
                self._say(sentence)
            return
        for pod in pods:
            # One that is evicted is gone soon after it has ended.
            cause = cause_of(pod, self._settings) or taken(pod)
            if cause is not None and pod["metadata"]["name"] not in told:
                told.add(pod["metadata"]["name"])
                self._say(f"{cause.sentence.partition(';')[0]}; the Job starts another one by itself")

    def cancel(self, job: Mapping[str, Any]) -> None:
        """Delete the Job and wait until its Pods, which write their checkpoints first, are gone."""
        there = self.job(job)
        if there is not None:
            self._delete(job, there["metadata"]["uid"])
            self._wait_until_gone(job, there["metadata"]["uid"])

    def _wait_until_gone(self, job: Mapping[str, Any], uid: str | None) -> None:
        until = time.monotonic() + self._settings.grace_seconds + self.pace.lost_seconds
        while (there := self.job(job)) is not None and there["metadata"]["uid"] == uid:
            if time.monotonic() > until:
                raise ClusterError(
                    f"Job {job['metadata']['name']} is being deleted but its Pods do not end, so nothing is started "
                    f"beside them; see: kubectl get pods -l {_label(job)} -n {self._settings.namespace}"
                )
            time.sleep(min(self.pace.poll_seconds, 1.0))

    def job(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """The Job as the API gives it, or None; a JobSet as the Job that it stands for."""
        get, name = self._objects.get_namespaced_custom_object, job["metadata"]["name"]
        there: dict[str, Any] | None = self._ask(get, *self._place(job), name, but=(404,))
        if there is None or job["kind"] == "Job":
            return there
        return as_job(there, self._jobs_in(job))

    def _jobs_in(self, jobset: Mapping[str, Any]) -> list[dict[str, Any]]:
        group, version, plural = _JOBS
        listed = self._objects.list_namespaced_custom_object
        found = self._ask(listed, group, version, self._settings.namespace, plural, label_selector=_label(jobset))
        items: list[dict[str, Any]] = (found or {}).get("items", [])
        return items

    def pods(self, job: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The Pods of a Job, the oldest first."""
        found = self._ask(self._core.list_namespaced_pod, self._settings.namespace, label_selector=_label(job))
        items: list[dict[str, Any]] = (found or {}).get("items", [])
        return sorted(items, key=lambda pod: (pod["metadata"].get("creationTimestamp", ""), pod["metadata"]["name"]))

    def _events(self, job: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What was noted about a Job, in a JobSet about the one in it; nothing, where they may not be read."""
        jobs = [job] if job["kind"] == "Job" else self._jobs_in(job)
        found: list[dict[str, Any]] = []
        for one in jobs:
            selector = f"involvedObject.kind=Job,involvedObject.name={one['metadata']['name']}"
            listed = self._ask(
                self._core.list_namespaced_event, self._settings.namespace, field_selector=selector, but=(403,)
            )
            found += (listed or {}).get("items", [])
        return sorted(found, key=seen_at)

    def _delete(self, job: Mapping[str, Any], uid: str) -> None:
        # Foreground: as long as a Pod is there, so is the Job, and none of the same name can start beside it. With its
        # uid: another orchestrator may have replaced it by now.
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        delete, name = self._objects.delete_namespaced_custom_object, job["metadata"]["name"]
        self._ask(delete, *self._place(job), name, body=options, but=(404, 409))

    def _place(self, job: Mapping[str, Any]) -> tuple[str, str, str, str]:
        """Where the API keeps things of this kind: group, version, namespace, plural."""
        group, _, version = job["apiVersion"].partition("/")
        return group, version, self._settings.namespace, f"{job['kind'].lower()}s"

    def _make_service(self, service: Mapping[str, Any]) -> None:
        """Where infra/k8s made it already, the orchestrator need not have the right to make one."""
        self._ask(self._core.create_namespaced_service, self._settings.namespace, service, but=(403, 409))

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
        if error.status == 404 and self._settings.gang == "jobset" and "namespace" not in said:
            return ClusterError(
                "the cluster knows no JobSets; install JobSet (jobset.sigs.k8s.io), or set cluster.gang to indexed_job"
            )
        if error.status == 404:
            return ClusterError(f"{said}; create the namespace {self._settings.namespace}, or set cluster.namespace")
        return ClusterError(f"the cluster refuses it ({error.status}: {said}); correct the recipe's cluster section")


def _label(job: Mapping[str, Any]) -> str:
    """What all that belongs to a Job or JobSet has in common."""
    key = "batch.kubernetes.io/job-name" if job["kind"] == "Job" else "jobset.sigs.k8s.io/jobset-name"
    return f"{key}={job['metadata']['name']}"


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
            if ended_container(pod) is not None:
                self._ended.add(name)
            if name not in self._threads and has_started(pod):
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
