"""A stub of a Kubernetes cluster, in this process: the few endpoints that dispatch uses, over real HTTP.

It is no Kubernetes: no API package ships a control plane, so this imitates what facts about Jobs and JobSets are relied
on. A Pod's command runs as a local process of its own session; policies on failures, suspension, deadlines, eviction,
deletion in the foreground and grace periods are carried out, and the names of a Job's Pods mean this machine. Faults
are its methods: `away`, `busy`, `evict`, `out_of_memory`, `lose_node`, `hold`, `forbid` and `admit`.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psutil
import yaml

NODE = "node-1"
_SET = "jobset.sigs.k8s.io/jobset-name"


class StubCluster:
    """One namespace's Jobs and Pods, behind a server on loopback.

    Args:
        cwd: where the Pods' commands run, as the image's working directory.
        disk: each Pod gets a folder below it for temporary files, as its emptyDir.
    """

    def __init__(self, cwd: Path | None = None, disk: Path | None = None) -> None:
        self.cwd, self.disk = cwd, disk
        self.lock = threading.RLock()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.sets: dict[str, dict[str, Any]] = {}
        self.has_jobsets = True
        """Whether somebody installed them."""
        self.events: list[dict[str, Any]] = []
        self.pods: dict[str, _Pod] = {}
        self.services: list[str] = []
        self.created: list[str] = []
        """Names of the Jobs and JobSets that a client made, in order."""
        self.removed: list[str] = []
        self.refused = 0
        """Requests that found nobody at home."""
        self.asked_at: list[float] = []
        self.followed = False
        """Whether somebody reads the log of a Pod."""
        self._numbers = itertools.count()
        self._held: tuple[str, str] | None = None
        self._forbidden: str | None = None
        self._busy = 0
        self._away = False
        self._cut_logs = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def kubeconfig(self, path: Path) -> Path:
        """A file for KUBECONFIG."""
        address = f"http://127.0.0.1:{self._server.server_address[1]}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "stub", "cluster": {"server": address}}],
            "users": [{"name": "stub", "user": {"token": "none"}}],
            "contexts": [{"name": "stub", "context": {"cluster": "stub", "user": "stub"}}],
            "current-context": "stub",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def close(self) -> None:
        """Stop the server and every process that still runs."""
        for pod in list(self.pods.values()):
            pod.end(signal.SIGKILL)
        self._server.shutdown()
        self._server.server_close()

    # ------------------------------------------------------------------------------------------------------- faults

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Connections are closed without an answer, as while an API server restarts."""
        self._away = True
        try:
            yield
        finally:
            self._away = False

    def busy(self, times: int) -> None:
        """The next requests are answered with 429 and Retry-After: 1."""
        self._busy = times

    def cut_logs(self, times: int) -> None:
        """So many log streams break off after their first line."""
        self._cut_logs = times

    def hold(self, reason: str | None, message: str = "") -> None:
        """New Pods don't start: Unschedulable, or a reason for which a container waits. None lets them go."""
        self._held = (reason, message) if reason else None

    def forbid(self, message: str | None) -> None:
        """New Pods are refused, of which the Job's event is the only trace. None lets them be made."""
        with self.lock:
            self._forbidden = message
            if message is None:
                for job in [one for one in self.jobs.values() if not self._of(one) and not one["spec"].get("suspend")]:
                    self._make_pods(job)

    def admit(self, name: str) -> None:
        """What Kueue does when there is room."""
        with self.lock:
            (self.sets if name in self.sets else self.jobs)[name]["spec"]["suspend"] = False
            self._start_set(name) if name in self.sets else self._start(name)

    def evict(self, pod: str, reason: str = "EvictionByEvictionAPI", message: str = "Eviction API: evicting") -> None:
        """Take a Pod away, as a drain, a preemption or a node under pressure does."""
        with self.lock:
            self.pods[pod].disrupt(reason, message)
        self.pods[pod].end(signal.SIGTERM)

    def out_of_memory(self, pod: str) -> None:
        """The kernel kills the container."""
        self.pods[pod].reason = "OOMKilled"
        self.pods[pod].end(signal.SIGKILL)

    def lose_node(self, pod: str) -> None:
        """The node is gone: the Pod is told to go and nobody says that it went."""
        with self.lock:
            self.pods[pod].lost = True
            self.pods[pod].values["metadata"]["deletionTimestamp"] = _now()

    def running(self) -> list[str]:
        """Names of the Pods whose process runs."""
        return [name for name, pod in self.pods.items() if pod.process is not None and pod.process.poll() is None]

    # ------------------------------------------------------------------------------------------------- controller

    def create(self, kind: str, thing: dict[str, Any]) -> bool:
        """Make a Job or a JobSet, unless there is one of its name."""
        with self.lock:
            there, name = self._all(kind), thing["metadata"]["name"]
            if name in there:
                return False
            thing["metadata"] |= {"uid": f"uid-{next(self._numbers)}", "creationTimestamp": _now()}
            thing["status"] = {}
            there[name] = thing
            if _SET not in thing["metadata"].get("labels", {}):
                self.created.append(name)
            if not thing["spec"].get("suspend"):
                self._start_set(name) if kind == "jobsets" else self._start(name)
            return True

    def _all(self, kind: str) -> dict[str, dict[str, Any]]:
        return self.sets if kind == "jobsets" else self.jobs

    def _start_set(self, name: str) -> None:
        """Make the one Job of a JobSet."""
        made = self.sets[name]["spec"]["replicatedJobs"][0]
        job = {"apiVersion": "batch/v1", "kind": "Job", **copy.deepcopy(made["template"])}
        job["metadata"] |= {"name": f"{name}-{made['name']}-0", "labels": job["metadata"]["labels"] | {_SET: name}}
        template = job["spec"]["template"]
        template["metadata"]["labels"] |= {_SET: name}
        template["spec"]["subdomain"] = self.sets[name]["spec"]["network"]["subdomain"]
        self.create("jobs", job)

    def _ended_job(self, job: dict[str, Any]) -> None:
        """A Job has its last condition: what the JobSet controller does then."""
        jobset = self.sets.get(job["metadata"].get("labels", {}).get(_SET, ""))
        if jobset is None:
            return
        (ended,) = job["status"]["conditions"]
        if ended["type"] == "Complete":
            jobset["status"]["conditions"] = [{"type": "Completed", "status": "True", "reason": "AllJobsCompleted"}]
            return
        for rule in jobset["spec"]["failurePolicy"]["rules"]:
            patterns = rule["onJobFailureMessagePatterns"]
            if ended["reason"] in rule["onJobFailureReasons"] and any(
                re.search(one, ended["message"]) for one in patterns
            ):
                break
        else:
            rule = {"action": "RestartJobSet"}
        if rule["action"] == "RestartJobSetAndIgnoreMaxRestarts":
            jobset["status"]["restarts"] = jobset["status"].get("restarts", 0) + 1
            self.delete("jobs", job["metadata"]["name"])
            self._start_set(jobset["metadata"]["name"])
        else:
            assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 0
            said = f"jobset failed (first failed job: {job['metadata']['name']})"
            jobset["status"]["conditions"] = [{"type": "Failed", "status": "True", "reason": "Any", "message": said}]

    def _start(self, name: str) -> None:
        job = self.jobs[name]
        job["status"]["startTime"] = _now()
        job["port"] = _free_port()
        self._make_pods(job)
        timer = threading.Timer(job["spec"]["activeDeadlineSeconds"], self._deadline, (name, job["metadata"]["uid"]))
        timer.daemon = True
        timer.start()

    def _make_pods(self, job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        if self._forbidden is not None:
            about = {"kind": "Job", "name": name}
            said = {"type": "Warning", "reason": "FailedCreate", "message": f"Error creating: {self._forbidden}"}
            self.events.append(
                {"metadata": {"name": f"{name}.1"}, "involvedObject": about, "lastTimestamp": _now(), **said}
            )
            return
        for index in range(job["spec"]["completions"]):
            self._add_pod(name, index)

    def _add_pod(self, name: str, index: int) -> None:
        job, number = self.jobs[name], next(self._numbers)
        numbered = job["spec"]["completionMode"] == "Indexed"
        pod = _Pod(self, job, f"{name}-{f'{index}-' if numbered else ''}p{number:04d}", index)
        self.pods[pod.values["metadata"]["name"]] = pod
        threading.Thread(target=pod.run, daemon=True).start()

    def _deadline(self, name: str, uid: str) -> None:
        with self.lock:
            job = self.jobs.get(name)
            if job is not None and job["metadata"]["uid"] == uid:
                self._fail(job, "DeadlineExceeded", "Job was active longer than specified deadline")

    def _fail(self, job: dict[str, Any], reason: str, message: str) -> None:
        """The Job is going to be Failed, as soon as all of its Pods have ended."""
        if "failing" not in job:
            job["failing"] = {"type": "Failed", "status": "True", "reason": reason, "message": message}
        live = [pod for pod in self._of(job) if pod.is_live()]
        for pod in live:
            pod.values["metadata"].setdefault("deletionTimestamp", _now())
            threading.Thread(target=pod.end, args=(signal.SIGTERM,), daemon=True).start()
        if not live and not job["status"].get("conditions"):
            job["status"]["conditions"] = [job["failing"]]
            self._ended_job(job)

    def _of(self, job: dict[str, Any]) -> list[_Pod]:
        return [pod for pod in self.pods.values() if pod.job is job]

    def ended(self, pod: _Pod) -> None:
        """A Pod's process has ended: what the Job controller does then."""
        with self.lock:
            job, spec, name = pod.job, pod.job["spec"], pod.values["metadata"]["name"]
            if job["metadata"].get("deletionTimestamp"):
                self.pods.pop(name, None)
                self._remove_if_empty(job)
                return
            if "failing" in job:
                # It was told to stop because the Job has failed.
                self.pods.pop(name, None)
                self._fail(job, "", "")
                return
            if pod.exit_code == 0:
                done = sum(one.exit_code == 0 for one in self._of(job))
                if done == spec["completions"]:
                    job["status"]["conditions"] = [{"type": "Complete", "status": "True"}]
                    self._ended_job(job)
                return
            action, message = self._policy(spec, pod)
            if action == "Ignore":
                self._add_pod(job["metadata"]["name"], pod.index)
            elif action == "FailJob":
                self._fail(job, "PodFailurePolicy", message)
            else:
                self._fail(job, "BackoffLimitExceeded", "Job has reached the specified backoff limit")

    def _policy(self, spec: dict[str, Any], pod: _Pod) -> tuple[str, str]:
        name = pod.values["metadata"]["name"]
        for rule in spec["podFailurePolicy"]["rules"]:
            if rule.get("onPodConditions") and pod.values["status"].get("conditions"):
                return rule[
                    "action"
                ], f"Pod default/{name} has condition DisruptionTarget matching {rule['action']} rule"
            codes = rule.get("onExitCodes")
            if codes and pod.exit_code in codes["values"]:
                said = (
                    f"Container {codes['containerName']} for pod default/{name} failed with exit code {pod.exit_code}"
                )
                return rule["action"], f"{said} matching {rule['action']} rule"
        return "Count", ""

    def delete(self, kind: str, name: str) -> bool:
        """In the foreground: what belongs to it goes first."""
        with self.lock:
            job = self._all(kind).get(name)
            if job is None:
                return False
            if kind == "jobsets":
                job["metadata"].setdefault("deletionTimestamp", _now())
                for one in self._in_set(name):
                    self.delete("jobs", one)
                self._remove_set_if_empty(name)
                return True
            job["metadata"].setdefault("deletionTimestamp", _now())
            for pod in self._of(job):
                pod.values["metadata"].setdefault("deletionTimestamp", _now())
                if pod.is_live():
                    threading.Thread(target=pod.end, args=(signal.SIGTERM,), daemon=True).start()
                else:
                    self.pods.pop(pod.values["metadata"]["name"], None)
            self._remove_if_empty(job)
            return True

    def _remove_if_empty(self, job: dict[str, Any]) -> None:
        if not self._of(job):
            self.jobs.pop(job["metadata"]["name"], None)
            self.removed.append(job["metadata"]["name"])
            self._remove_set_if_empty(job["metadata"].get("labels", {}).get(_SET, ""))

    def _in_set(self, name: str) -> list[str]:
        return [one for one, job in self.jobs.items() if job["metadata"].get("labels", {}).get(_SET) == name]

    def _remove_set_if_empty(self, name: str) -> None:
        if self.sets.get(name, {}).get("metadata", {}).get("deletionTimestamp") and not self._in_set(name):
            del self.sets[name]
            self.removed.append(name)

    # ------------------------------------------------------------------------------------------------------ requests

    def trouble(self) -> str | None:
        """What is wrong with the server at the moment."""
        self.asked_at.append(time.monotonic())
        if self._away:
            self.refused += 1
            return "away"
        if self._busy:
            self._busy -= 1
            return "busy"
        return None

    def held(self) -> tuple[str, str] | None:
        return self._held

    def cut_this_log(self) -> bool:
        self._cut_logs -= 1
        return self._cut_logs >= 0


class _Pod:
    """A Pod, and the local process that stands for its container."""

    def __init__(self, cluster: StubCluster, job: dict[str, Any], name: str, index: int) -> None:
        self.cluster, self.job, self.index = cluster, job, index
        self.process: subprocess.Popen[bytes] | None = None
        self.exit_code: int | None = None
        self.reason = "Error"
        self.lost = False
        self.lines: list[tuple[float, bytes]] = []
        self._told_to_end: signal.Signals | None = None
        template = job["spec"]["template"]
        labels = template["metadata"]["labels"] | {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
        self.values: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": labels, "creationTimestamp": _now()},
            "spec": {**template["spec"], "nodeName": NODE},
            "status": {"phase": "Pending"},
        }

    def is_live(self) -> bool:
        return self.exit_code is None

    def run(self) -> None:
        """The whole life of the Pod."""
        while (held := self.cluster.held()) and self._told_to_end is None:
            self._wait_for(*held)
            time.sleep(0.02)
        if self._told_to_end is None:
            self._run_command()
        else:
            self.exit_code = 143
        if self.lost:
            return
        code = self.exit_code or 0
        code = 128 - code if code < 0 else code
        with self.cluster.lock:
            self.exit_code = code
            message = b"".join(line for _, line in self.lines[-80:]).decode("utf-8", "replace")[-2048:]
            reason = "Completed" if code == 0 else self.reason
            ended = {"exitCode": code, "reason": reason, "finishedAt": _now(), "message": message if code else None}
            self.values["status"] |= {"phase": "Failed" if code else "Succeeded"}
            self._container({"terminated": ended})
        self.cluster.ended(self)

    def _wait_for(self, reason: str, message: str) -> None:
        if reason == "Unschedulable":
            said = {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
            self.values["status"]["conditions"] = [said]
            self.values["spec"].pop("nodeName", None)
        else:
            self._container({"waiting": {"reason": reason, "message": message}})

    def _container(self, state: dict[str, Any]) -> None:
        self.values["status"]["containerStatuses"] = [
            {"name": "stage", "image": "none", "imageID": "", "ready": False, "restartCount": 0, "state": state}
        ]

    def _run_command(self) -> None:
        container = self.values["spec"]["containers"][0]
        own = {one["name"]: one["value"] for one in container["env"]} | {"JOB_COMPLETION_INDEX": str(self.index)}
        # Where the manifest's paths are mounts, a local process has folders of its own.
        own.pop("TMPDIR", None)
        if self.cluster.disk is not None:
            own["TMPDIR"] = str(self.cluster.disk / self.values["metadata"]["name"])
            Path(own["TMPDIR"]).mkdir(parents=True)
        command = [
            self._here(re.sub(r"\$\((\w+)\)", lambda found: own.get(found[1], found[0]), word))
            for word in container["command"]
        ]
        with self.cluster.lock:
            self.values["status"] = {"phase": "Running"}
            self._container({"running": {"startedAt": _now()}})
            self.process = subprocess.Popen(
                command,
                cwd=self.cluster.cwd,
                env={**os.environ, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.time(), line))
        self.exit_code = self.process.wait()

    def _here(self, word: str) -> str:
        """Names of the Job's Pods are this machine's, as far as its DNS and its ports can tell them apart."""
        for index in range(self.job["spec"]["completions"]):
            word = word.replace(
                f"{self.job['metadata']['name']}-{index}.{self.values['spec'].get('subdomain')}", "127.0.0.1"
            )
        return re.sub(r"(?<=--master-port=)\d+", str(self.job["port"]), word)

    def disrupt(self, reason: str, message: str) -> None:
        condition = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}
        self.values["status"]["conditions"] = [condition]
        self.values["metadata"]["deletionTimestamp"] = _now()

    def end(self, how: signal.Signals) -> None:
        """A signal, and SIGKILL when the grace period is over."""
        self._told_to_end = how
        process = self.process
        if process is None or process.poll() is not None:
            return
        everything = [process, *_below(process.pid)]
        if how != signal.SIGKILL:
            # The container's first process alone is told; with it all others end.
            process.send_signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.values["spec"]["terminationGracePeriodSeconds"])
        for one in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def _below(process: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _shown(thing: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in thing.items() if key not in ("failing", "port")}


def _selected(things: Iterator[dict[str, Any]], query: dict[str, str]) -> list[dict[str, Any]]:
    """Those with the label that is asked for."""
    key, _, value = query["labelSelector"].partition("=")
    return [one for one in things if one["metadata"].get("labels", {}).get(key) == value]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _handler(cluster: StubCluster) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """A test's output is its own."""

        def _route(self) -> tuple[str, str, dict[str, str]] | None:
            trouble = cluster.trouble()
            if trouble == "away":
                self.close_connection = True
                return None
            if trouble == "busy":
                self._answer(429, {"message": "too many requests"}, {"Retry-After": "1"})
                return None
            parts = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            _, _, rest = parts.path.partition("/namespaces/")
            _, _, rest = rest.partition("/")
            kind, _, name = rest.partition("/")
            return kind, name, query

        def do_GET(self) -> None:
            route = self._route()
            if route is None:
                return
            kind, name, query = route
            with cluster.lock:
                if kind in ("jobs", "jobsets") and name:
                    found = cluster._all(kind).get(name)
                    self._answer(200, _shown(found)) if found else self._missing(f'{kind} "{name}" not found')
                    return
                if kind == "events":
                    about = query["fieldSelector"].rpartition("involvedObject.name=")[2]
                    self._list("EventList", [one for one in cluster.events if one["involvedObject"]["name"] == about])
                    return
                if kind == "jobs":
                    self._list("JobList", [_shown(job) for job in _selected(iter(cluster.jobs.values()), query)])
                    return
                if kind == "pods" and not name:
                    self._list("PodList", _selected((pod.values for pod in cluster.pods.values()), query))
                    return
                pod = cluster.pods.get(name.removesuffix("/log"))
            if pod is None:
                self._missing(f'pods "{name}" not found')
            else:
                # Who reads may go away, as a client does after a minute of silence.
                with contextlib.suppress(ConnectionError):
                    self._log(pod, query)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            route = self._route()
            if route is None:
                return
            kind, name, _ = route
            if kind == "services":
                cluster.services.append(body["metadata"]["name"])
                self._answer(201, body)
            elif kind == "jobsets" and not cluster.has_jobsets:
                self._answer(404, "404 page not found")
            elif kind in ("jobs", "jobsets"):
                made = cluster.create(kind, body)
                name = body["metadata"]["name"]
                self._answer(201, _shown(body)) if made else self._answer(409, {"message": f'{kind} "{name}" exists'})
            else:
                cluster.evict(name.removesuffix("/eviction"))
                self._answer(201, {"status": "Success"})

        def do_DELETE(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            route = self._route()
            if route is None:
                return
            uid = body.get("preconditions", {}).get("uid")
            there = cluster._all(route[0]).get(route[1])
            if there is not None and uid not in (None, there["metadata"]["uid"]):
                self._answer(409, {"message": "the UID in the precondition does not match the UID in record"})
            elif cluster.delete(route[0], route[1]):
                self._answer(200, {"kind": "Status", "status": "Success"})
            else:
                self._missing(f'{route[0]} "{route[1]}" not found')

        def _log(self, pod: _Pod, query: dict[str, str]) -> None:
            since = time.time() - float(query["sinceSeconds"]) if "sinceSeconds" in query else 0.0
            cut = cluster.cut_this_log()
            cluster.followed = True
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            sent = 0
            while True:
                ended = not pod.is_live()
                for at, line in pod.lines[sent:]:
                    sent += 1
                    if at >= since:
                        stamp = datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds")
                        self._chunk(stamp.replace("+00:00", "Z").encode() + b" " + line)
                        if cut:
                            self.close_connection = True
                            return
                if ended:
                    self._chunk(b"")
                    return
                time.sleep(0.02)

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

        def _list(self, kind: str, items: list[dict[str, Any]]) -> None:
            self._answer(200, {"apiVersion": "v1", "kind": kind, "metadata": {}, "items": items})

        def _missing(self, message: str) -> None:
            self._answer(404, {"message": message})

        def _answer(self, status: int, values: Any, headers: dict[str, str] | None = None) -> None:
            data = json.dumps(values).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler
