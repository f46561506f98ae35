"""How a stage is carried out for Dagster: the same ``valr run`` verb in a process of its own or in a Kubernetes Job.

In: a stage and the recipe, whose section ``cluster`` says which of the two. Out: the materialization and the check
results that the stage reported, joined by Pipes: through a file, or through the messages that the Job's Pod leaves in
the bucket, which a restarted Dagster reads again from the first one.
Always: a failure is the stage's own sentence, or the one that says what became of its Job; a cancelled run stops its
Job, and any other end of this process leaves it running.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

# Dagster raises them and does not export them.
from dagster._core.errors import DagsterExecutionInterruptedError, DagsterPipesExecutionError

from valr_ops.exits import EXIT_AT_CHECKPOINT, EXIT_CONFIGURATION

if TYPE_CHECKING:
    from valr_ops.recipe.recipe import Recipe
    from valr_ops.release import endings, pod
    from valr_ops.stages import Stage

_MAX_MESSAGE_BYTES = 64 << 20


class StageRunner(dg.ConfigurableResource):
    """Runs ``python -m valr_ops run STAGE`` and streams its progress, checks and metadata into the materialization."""

    grace_seconds: float = 120.0
    """How long a cancelled stage on this machine may take to write its checkpoint; a Job's is cluster.grace_seconds."""
    poll_seconds: float = 5.0
    """How often a Job is asked how it is."""

    def materialize(self, context: dg.AssetExecutionContext, stage: str, root: Path) -> Sequence[Any]:
        """One stage, start to end: the materialization and the check results that the stage reported.

        Raises:
            Failure: the stage failed; the description is the stage's own sentence, ``exit_status`` among the metadata
                says of what kind it is.
        """
        # DVC and the recipe are those of the project that the working directory is in.
        with chdir(root):
            job = _Job.of(stage, root)
            return self._here(context, stage, root) if job is None else self._in_cluster(context, job)

    def _here(self, context: dg.AssetExecutionContext, stage: str, root: Path) -> Sequence[Any]:
        told = self._once(context, stage, root)
        if not any(isinstance(result, dg.MaterializeResult) for result in told):
            # What a stage tells while Dagster's database is away is lost. Now that it is made, it says it all again.
            told = self._once(context, stage, root)
        return told

    def _once(self, context: dg.AssetExecutionContext, stage: str, root: Path) -> Sequence[Any]:
        client = dg.PipesSubprocessClient(termination_timeout_seconds=self.grace_seconds)
        try:
            run = client.run(
                context=context,
                command=[sys.executable, "-m", "valr_ops", "run", stage],
                cwd=str(root),
                env={**os.environ, "VALR_DAGSTER_RUN_ID": context.run.run_id},
            )
        except DagsterPipesExecutionError as error:
            raise _failure(root, stage, str(error)) from None
        return run.get_results(implicit_materializations=False)

    def _in_cluster(self, context: dg.AssetExecutionContext, job: _Job) -> Sequence[Any]:
        from filelock import FileLock

        from valr_ops.release import dispatch, pod
        from valr_ops.store.objects import StorageError

        try:
            url = job.submit(context.log.info)
            messages = _StoredMessages(url)
            with dg.open_pipes_session(context, dg.PipesEnvContextInjector(), messages) as session:
                found = pod.result(url)
                if found is None:
                    variables = {**session.get_bootstrap_env_vars(), "VALR_DAGSTER_RUN_ID": context.run.run_id}
                    found = self._follow(context, job, url, variables, messages)
                else:
                    context.log.info(f"{url} has a result already; nothing is started")
                messages.take_rest()
                # Two runs of one asset share its Job; what it made is brought home once at a time.
                locks = job.root / ".valr" / "locks"
                locks.mkdir(parents=True, exist_ok=True)
                with FileLock(locks / f"{job.row.name}.lock"):
                    pod.collect(url, job.root)
                return _results(session, job.row.name, found)
        except (dispatch.ClusterError, pod.JobError, StorageError) as error:
            mendable = isinstance(error, StorageError | dispatch.ClusterAwayError)
            status = int(getattr(error, "exit_status", 1 if mendable else EXIT_CONFIGURATION))
            raise _ended_badly(str(error), job.row.name, status) from None

    def _follow(
        self,
        context: dg.AssetExecutionContext,
        job: _Job,
        url: str,
        variables: dict[str, str],
        messages: _StoredMessages,
    ) -> pod.Result:
        """Start the Job or attach to it, and wait for its result."""
        from valr_ops.release import dispatch, manifest, pod

        cluster = dispatch.Cluster(job.recipe.cluster, context.log.info, dispatch.Pace(poll_seconds=self.poll_seconds))
        documents = manifest.documents(job.row, job.recipe, url, environment=variables)
        name = documents[-1]["metadata"]["name"]
        try:
            how = cluster.start(documents)
            context.log.info(f"{how} Job {name} in namespace {job.recipe.cluster.namespace}; what it tells is in {url}")
            ending = cluster.wait(documents[-1], _show_line(name), lambda: messages.take(context.log.info))
        except (DagsterExecutionInterruptedError, KeyboardInterrupt):
            # Before anything is logged: the interrupt may have come in the middle of writing to the event log.
            cluster.cancel(documents[-1])
            context.log.info(f"cancelled: Job {name} has written its checkpoint and is deleted")
            raise
        found = pod.result(url)
        if found is not None:
            return found
        if ending.kind == "succeeded":
            raise _ended_badly(
                f"Job {name} is complete but {url} has no result: was it deleted? Delete the Job too, then run the "
                f"same again: kubectl delete {documents[-1]['kind'].lower()} {name} -n {job.recipe.cluster.namespace}",
                job.row.name,
                EXIT_CONFIGURATION,
            )
        raise _of_ending(ending, job.row.name)


class _Job:
    """The work of one stage that is to be done in the cluster."""

    def __init__(self, row: Stage, recipe: Recipe, root: Path) -> None:
        self.row, self.recipe, self.root = row, recipe, root

    @classmethod
    def of(cls, name: str, root: Path) -> _Job | None:
        """The work, or None for what is done on this machine.

        That is a stage that wants no GPU, one that is up to date, and one whose inputs are not: the verb says so.
        """
        from valr_ops.recipe import recipes
        from valr_ops.stages import stage

        row, overrides = stage(name), json.loads(os.environ.get("VALR_SET", "{}"))
        try:
            cluster = recipes.load(root, overrides).cluster
        except ValueError:
            return None
        if cluster.dispatch == "local" or row.resources != "gpu":
            return None
        from valr_ops import runner
        from valr_ops.store.artifacts import Ledger

        runner.refresh_recipe(root, overrides)
        inputs = Ledger(root).states(row.inputs)
        if not all(state.up_to_date for state in inputs.values()) or not runner.out_of_date(root, (name,)):
            return None
        return cls(row, runner.read_recipe(root), root)

    def submit(self, say: Any) -> str:
        """Bring the inputs to the bucket as far as they are not there, write the request, and return its location.

        Raises:
            Failure: it may cost more than the recipe allows, or reads what no Pod has. StorageError: the bucket can't
                be written.
        """
        from valr_ops.recipe import price
        from valr_ops.release import manifest, pod
        from valr_ops.store.artifacts import folder
        from valr_ops.store.remote import Remote

        try:
            price.refuse(self.recipe, self.row.name, self.root)
            manifest.refuse_local_paths(self.row, self.recipe, self.root)
        except (price.PriceError, manifest.LocalPathError) as error:
            raise _ended_badly(str(error), self.row.name, EXIT_CONFIGURATION) from None
        request, remote = manifest.request(self.row, self.recipe, self.root), Remote(self.recipe.cluster.bucket)
        for name, digest in request.inputs.items():
            if not remote.holds(digest):
                say(f"copying {name} to {remote.location}")
                remote.push(folder(self.root, name))
        return pod.submit(request)


class _StoredMessages(dg.PipesMessageReader):
    """Reads what a Job's Pod tells, ``messages/NNNNNNNN.json`` below its location, from the first one on."""

    def __init__(self, url: str) -> None:
        from valr_ops.store.objects import S3Files

        self._stored, self._next = S3Files(f"{url}/messages"), 0
        self._handler: Any = None
        self._closed: Any = None
        self._away = False

    @contextmanager
    def read_messages(self, handler: Any) -> Iterator[dict[str, Any]]:
        self._handler = handler
        yield {}

    def take(self, say: Any) -> None:
        """Hand on what is new; a bucket that is away is said to be so, and asked again the next time."""
        from valr_ops.store.objects import StorageError

        try:
            self._take_all(self._stored.read)
        except StorageError as error:
            if not self._away:
                say(f"what the Pod tells can't be read at the moment ({error}); the Job goes on, and is heard later")
            self._away = True
        else:
            self._away = False

    def take_rest(self) -> None:
        """Hand on all that is left, and that the Pod has closed. Raises `StorageError`."""
        from valr_ops.store.objects import patiently

        self._take_all(lambda name, at_most: patiently(self._stored.read, name, at_most))
        if self._closed is not None:
            self._handler.handle_message(self._closed)

    def _take_all(self, read: Any) -> None:
        from valr_ops.store.objects import MissingError

        while True:
            try:
                message = json.loads(read(f"{self._next:08d}.json", _MAX_MESSAGE_BYTES))
            except MissingError:
                return
            self._next += 1
            # A Pod that is replaced closes the line, and the one after it opens it again.
            if message["method"] == "closed":
                self._closed = message
            elif message["method"] != "opened" or not self._handler.received_opened_message:
                self._handler.handle_message(message)

    def no_messages_debug_text(self) -> str:
        return f"Attempted to read messages from {self._stored.location}."


def _results(session: dg.PipesSession, stage: str, found: pod.Result) -> list[Any]:
    """What the Pod reported, each once: one that was killed at its very end is followed by one that reports it again.

    A Job that was made by hand reports to nobody: then what its result says.
    """
    reported = {
        getattr(result, "check_name", None): result for result in session.get_results(implicit_materializations=False)
    }
    for check in found.report.get("checks", ()):
        reported.setdefault(
            check["name"],
            dg.AssetCheckResult(
                check_name=check["name"], passed=check["passed"], metadata={"detail": check.get("detail", "")}
            ),
        )
    asset = dg.AssetKey(stage.partition("@")[0])
    reported.setdefault(
        None,
        dg.MaterializeResult(
            asset_key=asset, data_version=dg.DataVersion(found.digest), metadata=dict(found.report.get("summary", {}))
        ),
    )
    return list(reported.values())


def _show_line(job: str) -> Any:
    """Prints the log of a Job's Pods; of several, each line with the Pod's number."""

    from valr_ops.release.manifest import MEMBER

    def show(pod: str, line: str) -> None:
        number = re.fullmatch(rf"{re.escape(job)}-(?:{MEMBER}-0-)?(\d+)-\w+", pod)
        print(f"[{number[1]}] {line}" if number else line, flush=True)

    return show


def _of_ending(ending: endings.Ending, stage: str) -> dg.Failure:
    status = {"configuration": EXIT_CONFIGURATION, "resume": EXIT_AT_CHECKPOINT, "evicted": EXIT_AT_CHECKPOINT}
    otherwise = 1 if ending.can_be_retried else EXIT_CONFIGURATION
    return _ended_badly(ending.sentence, stage, status.get(ending.kind, otherwise), ending.kind)


def _ended_badly(sentence: str, stage: str, status: int, kind: str | None = None) -> dg.Failure:
    metadata: dict[str, Any] = {"stage": stage, "exit_status": status, **({"ending": kind} if kind else {})}
    return dg.Failure(description=sentence, metadata=metadata, allow_retries=status != EXIT_CONFIGURATION)


def _failure(root: Path, stage: str, otherwise: str) -> dg.Failure:
    """The stage's own sentence instead of an exit code; a retry is allowed only where it can help."""
    status = root / ".valr" / "status" / f"{stage}.json"
    said = json.loads(status.read_text(encoding="utf-8")) if status.is_file() else {}
    code = re.search(r"code (-?\d+)", otherwise)
    return _ended_badly(said.get("message") or otherwise, stage, int(code[1]) if code else 1)
