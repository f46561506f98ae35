"""Progress of a stage: a bar on a terminal, plain lines elsewhere, and the metrics of every step.

In: what a stage function says, counts and measures. Out: bars or lines on stderr, a status file that another process
may read at any moment, a file with the metrics of every step, and, where Dagster started the process, its event log.
`Progress` is what stage functions see and is quiet; `open_progress` gives the runner a `ShowingProgress` to hand
them; `watch` draws all stages at once from their status files; `reporting_to_dagster` opens the line to Dagster.
Always: stdout stays untouched, a status file is whole whenever it is read, a reader that went away (Dagster, the
terminal of the parent) never stops the work, and no secret is shown, stored or sent.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from valr_ops.recipe.secrets import redacted

if TYPE_CHECKING:
    from dagster_pipes import PipesContext

    from valr_ops.store.artifacts import Check, StageReport

T = TypeVar("T")
Made = Literal["hit", "restored", "made"]
_Raised = tuple[type[BaseException] | None, BaseException | None, TracebackType | None]
State = Literal["waiting", "running", "hit", "restored", "made", "failed", "stopped"]

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_WATCHED_LINES = 10.0
_SECONDS_BETWEEN_STATUS_FILES = 0.25
_SECONDS_BETWEEN_DAGSTER_LINES = 15.0
_SHOWN_METRICS = 3
# Event logs are rows of a database: Dagster reads every one of them to draw an asset's page.
_MAX_PLOT_BYTES = 150_000


class Progress:
    """Quiet by itself; the runner hands stages one that shows, stores and forwards what it is told."""

    def say(self, message: str) -> None:
        """One line for people."""

    def track(self, items: Iterable[T], description: str, total: int | None = None, done: int = 0) -> Iterator[T]:
        """Yield `items` while a bar counts them; `done` of them were finished by an earlier, killed run."""
        yield from items

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one step (an optimizer update, a shard), for the bar and for the tracking server."""


# ------------------------------------------------------------------------------------------------------------ status


@dataclass(frozen=True)
class Status:
    """What a stage is doing right now, as its status file says."""

    stage: str
    state: State = "waiting"
    description: str = ""
    """What is being counted, or the last line the stage said."""
    done: int = 0
    total: int | None = None
    eta_seconds: float | None = None
    """Seconds to the end of what is being counted, from this process's own rate."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The latest metrics the stage logged."""
    seconds: float = 0.0
    """Seconds that the stage took, or has been running."""
    message: str = ""
    """How the stage ended: its digest, or the sentence that says what went wrong."""


def read_status(path: Path) -> Status:
    """The status in `path`; state ``waiting`` where there is no file yet."""
    try:
        status = Status(**json.loads(path.read_text(encoding="utf-8")))
        silent_seconds = max(time.time() - path.stat().st_mtime, 0.0) if status.state == "running" else 0.0
    except FileNotFoundError:
        return Status(path.stem)
    return replace(status, seconds=status.seconds + silent_seconds)


def _write_status(path: Path, status: Status) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(asdict(status)), encoding="utf-8")
    partial.replace(path)


# ----------------------------------------------------------------------------------------------- the showing progress


class _Count:
    """One `track` that is under way."""

    def __init__(self, description: str, total: int | None, done: int) -> None:
        self.description, self.total, self.done = description, total, done
        self.started, self.done_at_start = monotonic(), done
        self.last_line, self.tenths_at_last_line = self.started, self.tenths()
        self.bar: TaskID | None = None

    def eta_seconds(self) -> float | None:
        done_here = self.done - self.done_at_start
        if self.total is None or done_here == 0:
            return None
        return (monotonic() - self.started) / done_here * max(self.total - self.done, 0)

    def wants_line(self) -> bool:
        """After 5 seconds, or after another tenth, but not more often than once a second; the end has its own line."""
        silent = monotonic() - self.last_line
        if self.done == self.total:
            return False
        return silent >= _SECONDS_BETWEEN_LINES or (silent >= 1.0 and self.tenths() > self.tenths_at_last_line)

    def tenths(self) -> int:
        return 10 * self.done // self.total if self.total else 0


class ShowingProgress(Progress):
    """Shows a stage's progress on stderr and stores it for whoever asks later.

    Args:
        stage: name of the stage, in front of every plain line.
        status_file: JSON of a `Status`, replaced atomically about four times a second, for `watch`.
        metrics_file: JSON lines ``{"step", "time", "metrics"}``; appended to, so that a run that goes on after a kill
            keeps what was measured before it. A step that comes again takes back everything after it. Deleted by
            `finished`, because what it held has been handed on by then.
        console: where to show; stderr unless given, because stdout ends with the verb's JSON document.
        dagster: the session of `reporting_to_dagster`, which gets the lines, the checks and the materialization.

    The runner calls `checked` for each expectation, then either `finished` and `materialized`, or `failed`.
    """

    def __init__(
        self,
        stage: str,
        *,
        status_file: Path | None = None,
        metrics_file: Path | None = None,
        console: Console | None = None,
        dagster: PipesSession | None = None,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._dagster = dagster
        self._status_file = status_file
        self.metrics_file = metrics_file
        self._status = Status(stage, "running")
        self._counts: list[_Count] = []
        self._bars: Bars | None = None
        self._reported_checks: set[str] = set()
        self._began = monotonic()
        self._last_status_file = self._last_dagster_line = -math.inf
        if metrics_file is not None:
            metrics_file.parent.mkdir(parents=True, exist_ok=True)
            _end_torn_line(metrics_file)
        self._store_status(now=True)

    def say(self, message: str) -> None:
        """One line for people, on the console and in Dagster's event log."""
        message = redacted(message)
        self._line(message)
        if self._dagster is not None:
            self._dagster.log(message)
        if not self._counts:
            self._status = replace(self._status, description=message)
            self._store_status(now=True)

    def track(self, items: Iterable[T], description: str, total: int | None = None, done: int = 0) -> Iterator[T]:
        """Yield `items` while a bar counts them; an item counts as done when the next one is asked for.

        Args:
            items: what to yield.
            description: two or three words, shown before the bar.
            total: number of items including `done`; ``done + len(items)`` where that is known and nothing is given.
            done: items that an earlier, killed run finished and that are not among `items`.
        """
        if total is None and isinstance(items, Sized):
            total = done + len(items)
        count = _Count(description, total, done)
        self._open(count)
        try:
            for item in items:
                yield item
                count.done += 1
                self._advance(count)
            self._say_finished(count)
        finally:
            self._close(count)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one step: shown with the bar, kept in the metrics file for the tracking server."""
        values = {name: float(value) for name, value in metrics.items()}
        self._status = replace(self._status, metrics=values)
        if self.metrics_file is not None:
            with self.metrics_file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": step, "time": round(time.time(), 3), "metrics": values}) + "\n")
        if not self._counts:
            self._store_status()

    def checked(self, check: Check) -> None:
        """The outcome of one blocking expectation, said where it failed and recorded in Dagster."""
        self._reported_checks.add(check.name)
        if not check.passed:
            self._line(redacted(f"check {check.name} failed: {check.detail}"))
        if self._dagster is not None:
            metadata = {name: _value(value) for name, value in {"detail": check.detail, **check.metadata}.items()}
            self._dagster.report_check(check.name, check.passed, metadata=metadata)

    def finished(self, how: Made, digest: str) -> None:
        """The artifact stands under `digest`."""
        self._end(how, digest)
        if self.metrics_file is not None:
            self.metrics_file.unlink(missing_ok=True)

    def failed(self, message: str) -> None:
        """There is no new artifact; `message` says why."""
        self._end("failed", redacted(message))

    def materialized(
        self, report: StageReport, digest: str, artifact: Path, *, how: Made, tracking_url: str | None
    ) -> None:
        """Record in Dagster what the asset is now; without Dagster nothing happens.

        Args:
            report: what the stage returned; checks in it that `checked` was not told of are recorded first, because
                Dagster wants every check's outcome with every materialization.
            digest: the DVC digest, recorded as the asset's data version.
            artifact: folder of the published artifact, in which the report's plots and page are.
            how: whether it was made now, found up to date, or brought back from the cache.
            tracking_url: address of the MLflow run that made it.
        """
        if self._dagster is None:
            return
        for check in report.checks:
            if check.name not in self._reported_checks:
                self.checked(check)
        metadata = asset_metadata(
            summary=report.summary,
            timings=report.timings,
            tables=report.tables,
            plots=[artifact / plot for plot in report.plots],
            report=artifact / report.report if report.report else None,
            links={"MLflow run": tracking_url} if tracking_url else {},
        )
        self._dagster.report_materialization(
            {"how": _value(_WORDS[how]), "DVC digest": _value(digest), **metadata}, digest
        )

    def _end(self, state: State, message: str) -> None:
        for count in reversed(self._counts.copy()):
            self._close(count)
        self._status = replace(self._status, state=state, description="", message=message)
        self._store_status(now=True)
        line = f"{_ending(state, monotonic() - self._began)}: {message}"
        self._line(line)
        if self._dagster is not None:
            self._dagster.log(line, level="error" if state == "failed" else "info")

    def _open(self, count: _Count) -> None:
        self._counts.append(count)
        if _can_redraw(self._console):
            if self._bars is None:
                self._bars = Bars(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[metrics]}"),
                    console=self._console,
                )
                self._bars.start()
            count.bar = self._bars.add_task(
                escape(count.description), total=count.total, completed=count.done, metrics=""
            )
        self._store_status(now=True)

    def _advance(self, count: _Count) -> None:
        if self._bars is not None and count.bar is not None:
            self._bars.update(count.bar, completed=count.done, metrics=escape(_short(self._status.metrics)))
        elif count.wants_line():
            self._line(_counted(self._now(count)))
            count.last_line = monotonic()
            count.tenths_at_last_line = count.tenths()
        if (
            self._dagster is not None
            and count is self._counts[0]
            and monotonic() - max(self._last_dagster_line, count.started) >= _SECONDS_BETWEEN_DAGSTER_LINES
        ):
            self._last_dagster_line = monotonic()
            self._dagster.log(_counted(self._now(count)))
        self._store_status()

    def _say_finished(self, count: _Count) -> None:
        if count.bar is None and count is self._counts[0]:
            of = f"/{count.total}" if count.total is not None else ""
            took = _duration(monotonic() - count.started)
            done = f"{count.description} {count.done}{of} in {took}"
            self._line(" · ".join(filter(None, [done, _short(self._status.metrics)])))

    def _close(self, count: _Count) -> None:
        if count not in self._counts:
            return
        outermost = count is self._counts[0]
        self._counts.remove(count)
        if self._bars is not None and count.bar is not None:
            if outermost:
                self._bars.stop()
                self._bars = None
            else:
                self._bars.remove_task(count.bar)
        if not self._counts:
            # What was measured during one count says nothing about the next one.
            self._status = replace(self._status, done=0, total=None, eta_seconds=None, metrics={})
        self._store_status(now=not self._counts)

    def _now(self, count: _Count) -> Status:
        return replace(
            self._status,
            description=count.description,
            done=count.done,
            total=count.total,
            eta_seconds=count.eta_seconds(),
        )

    def _line(self, message: str) -> None:
        _print_line(self._console, self._status.stage, message)

    def _store_status(self, now: bool = False) -> None:
        if self._status_file is None or (
            not now and monotonic() - self._last_status_file < _SECONDS_BETWEEN_STATUS_FILES
        ):
            return
        self._last_status_file = monotonic()
        # Nested counts come and go; the outermost one knows when the work ends.
        status = self._now(self._counts[0]) if self._counts else self._status
        # On a full disk only its readers miss it, and how a stage failed must still be said.
        with suppress(OSError):
            _write_status(self._status_file, replace(status, seconds=round(monotonic() - self._began, 3)))


def open_progress(root: Path, stage: str) -> ShowingProgress:
    """The progress of `stage` in the project at `root`, joined to Dagster where `reporting_to_dagster` is open."""
    state = root / ".valr"
    return ShowingProgress(
        stage,
        status_file=state / "status" / f"{stage}.json",
        metrics_file=state / "metrics" / f"{stage}.jsonl",
        dagster=_dagster.get(),
    )


def _can_redraw(console: Console) -> bool:
    """Whether lines can be drawn over: a terminal, and not a log that merely wants colours (FORCE_COLOR)."""
    return console.is_interactive and console.file.isatty()


def _print_line(console: Console, stage: str, message: str) -> None:
    console.print(f"[bold]{escape(stage)}[/]  {escape(message)}", highlight=False, soft_wrap=True)


def _end_torn_line(path: Path) -> None:
    """A killed run may have left half a line; the next one must not be glued to it."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as lines:
            lines.write("\n")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _short(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in list(metrics.items())[:_SHOWN_METRICS])


def _counted(status: Status) -> str:
    """``latents 40 % (120/300) · 12.0 s left · loss 0.523``"""
    if status.total:
        done = f"{100 * status.done // status.total} % ({status.done}/{status.total})"
    else:
        done = str(status.done) if status.done else ""
    left = f"{_duration(status.eta_seconds)} left" if status.eta_seconds is not None else ""
    return " · ".join(filter(None, [f"{status.description} {done}".strip(), left, _short(status.metrics)]))


_WORDS: Mapping[State, str] = {
    "waiting": "waiting",
    "running": "running",
    "hit": "up to date",
    "restored": "brought back from the cache",
    "made": "made",
    "failed": "failed",
    "stopped": "stopped",
}


def _ending(state: State, seconds: float) -> str:
    return f"{_WORDS[state]} ({_duration(seconds)})"


# ------------------------------------------------------------------------------------------- many stages at one glance


def watch(
    stages: Sequence[str],
    status_dir: Path,
    is_running: Callable[[], bool],
    *,
    poll_seconds: float = 0.5,
    console: Console | None = None,
) -> dict[str, Status]:
    """Draw the progress of `stages` until `is_running` says no, and return how each of them ended.

    On a terminal one live row per stage: waiting, a bar with the time left, then its end. Elsewhere (logs of a CI) one
    line when a stage starts, one when it ends, and at most one every 10 seconds in between.

    Args:
        stages: names in the order in which they are shown.
        status_dir: folder with ``<stage>.json`` as `ShowingProgress` writes them; new for each run, or the ends of an
            earlier run are shown.
        is_running: whether the process that makes the stages is still alive.
        poll_seconds: seconds between two looks.
        console: where to show; stderr unless given.

    A stage that was running when the process ended comes back as ``stopped``.
    """
    console = console or Console(stderr=True)

    def look() -> dict[str, Status]:
        return {stage: read_status(status_dir / f"{stage}.json") for stage in stages}

    if _can_redraw(console):
        with Live(_rows({}), console=console, refresh_per_second=4) as live:
            while True:
                running = is_running()
                statuses = look() if running else _stopped(look())
                live.update(_rows(statuses), refresh=True)
                if not running:
                    return statuses
                time.sleep(poll_seconds)

    shown: dict[str, State] = dict.fromkeys(stages, "waiting")
    last_line: dict[str, float] = {}
    while True:
        running = is_running()
        statuses = look() if running else _stopped(look())
        for stage, status in statuses.items():
            line = None
            if status.state != shown[stage]:
                line = "started" if status.state == "running" else _ended(status)
            elif status.state == "running" and monotonic() - last_line[stage] >= _SECONDS_BETWEEN_WATCHED_LINES:
                line = _counted(status) or f"running for {_duration(status.seconds)}"
            if line is not None:
                _print_line(console, stage, line)
                shown[stage], last_line[stage] = status.state, monotonic()
        if not running:
            return statuses
        time.sleep(poll_seconds)


def _stopped(statuses: dict[str, Status]) -> dict[str, Status]:
    return {
        stage: replace(status, state="stopped") if status.state == "running" else status
        for stage, status in statuses.items()
    }


def _ended(status: Status) -> str:
    # A digest says little next to its stage; a failure says everything.
    why = f": {status.message}" if status.state == "failed" else ""
    return f"{_ending(status.state, status.seconds)}{why}"


_MARKS: Mapping[State, tuple[str, str]] = {
    "waiting": ("·", "dim"),
    "running": ("▶", "bold"),
    "hit": ("=", "green"),
    "restored": ("=", "green"),
    "made": ("✓", "green"),
    "failed": ("✗", "red"),
    "stopped": ("■", "red"),
}


def _rows(statuses: Mapping[str, Status]) -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(width=24, no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for stage, status in statuses.items():
        mark, style = _MARKS[status.state]
        bar: ProgressBar | Text = Text("")
        if status.state == "running":
            bar = ProgressBar(total=status.total, completed=status.done, pulse=not status.total, width=24)
            words = _counted(status) or f"running for {_duration(status.seconds)}"
        else:
            words = "waiting" if status.state == "waiting" else _ended(status)
        table.add_row(Text(mark, style), Text(stage, style), bar, Text(words, style))
    return table


# ------------------------------------------------------------------------------------------------------------ Dagster


class PipesSession:
    """The line to the Dagster run that started this process.

    Losing it (Dagster was killed, its folder is gone) costs the events, never the work: the first failure is said once
    on stderr and everything after it is dropped.
    """

    def __init__(self, context: PipesContext) -> None:
        self._context = context
        self._lost = False

    def log(self, message: str, level: Literal["info", "warning", "error"] = "info") -> None:
        """One line in the event log of the run."""
        self._send(getattr(self._context.log, level), message)

    def report_materialization(self, metadata: Mapping[str, Mapping[str, Any]], data_version: str) -> None:
        """Record that the asset was made: `metadata` as `asset_metadata` returns it, `data_version` its DVC digest."""
        self._send(self._context.report_asset_materialization, metadata=dict(metadata), data_version=data_version)

    def report_check(self, name: str, passed: bool, metadata: Mapping[str, Mapping[str, Any]]) -> None:
        """Record the outcome of one blocking expectation; one that failed is an error and stops what is downstream."""
        self._send(
            self._context.report_asset_check,
            check_name=name,
            passed=passed,
            severity="ERROR",
            metadata=dict(metadata),
        )

    def _send(self, message: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self._lost:
            return
        try:
            message(*args, **kwargs)
        except OSError as error:
            self._lost = True
            print(f"Dagster can't be reached any more ({error}); the stage goes on without it.", file=sys.stderr)


_dagster: ContextVar[PipesSession | None] = ContextVar("dagster", default=None)


@contextmanager
def reporting_to_dagster() -> Iterator[None]:
    """Join the Dagster run that started this process, if one did, for every `open_progress` inside the block.

    Only the first process of several (``RANK`` 0 under torchrun) speaks. An exception that leaves the block reaches
    Dagster with its traceback.
    """
    if "DAGSTER_PIPES_CONTEXT" not in os.environ or os.environ.get("RANK", "0") != "0":
        yield
        return
    from dagster_pipes import open_dagster_pipes

    context = open_dagster_pipes()
    token = _dagster.set(PipesSession(context))
    try:
        yield
    finally:
        _dagster.reset(token)
        try:
            context.__exit__(*_without_secrets(sys.exc_info()))
        except OSError as error:
            print(f"Dagster can't be reached any more ({error}); it will call this run failed.", file=sys.stderr)


def _without_secrets(raised: _Raised) -> _Raised:
    """The exception with which a stage ended, or one in its place if what it says is not for an event log."""
    _, error, where = raised
    # Pipes sends those that led to it as well, also where ``raise ... from None`` hides them from people.
    chain = [error]
    for one in chain:
        chain += [led for led in (one.__cause__, one.__context__) if led not in (None, *chain)] if one else []
    if error is None or all(redacted(str(one)) == str(one) for one in chain):
        return raised
    return RuntimeError, RuntimeError(redacted(f"{type(error).__name__}: {error}")), where


def asset_metadata(
    *,
    summary: Mapping[str, int | float | str],
    timings: Mapping[str, float],
    tables: Mapping[str, str],
    plots: Sequence[Path],
    report: Path | None,
    links: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """What an asset's page in Dagster shows, in the form that Pipes sends.

    Args:
        summary: counts, scores and words, by name.
        timings: seconds and rates, by name.
        tables: markdown tables, by title.
        plots: PNG files; shown inline, made smaller where they are above 150 kB.
        report: an HTML page on this machine.
        links: addresses, by title, e.g. of the MLflow run.
    """
    metadata = {name: _value(value) for name, value in {**summary, **timings}.items()}
    metadata |= {title: {"type": "url", "raw_value": address} for title, address in links.items()}
    metadata |= {title: {"type": "md", "raw_value": redacted(table)} for title, table in tables.items()}
    metadata |= {f"plot: {plot.stem}": {"type": "md", "raw_value": _inline(plot)} for plot in plots}
    if report is not None:
        metadata["report"] = {"type": "path", "raw_value": str(report.resolve())}
    return metadata


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"type": "bool", "raw_value": value}
    if isinstance(value, int):
        return {"type": "int", "raw_value": value}
    # JSON knows no infinity, and Dagster's pages fail on one.
    if isinstance(value, float) and math.isfinite(value):
        return {"type": "float", "raw_value": value}
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return {"type": "json", "raw_value": value}
    return {"type": "text", "raw_value": redacted(str(value))}


def _inline(plot: Path) -> str:
    """The PNG as a markdown image that carries its own bytes."""
    data = plot.read_bytes()
    if len(data) > _MAX_PLOT_BYTES:
        from PIL import Image

        with Image.open(plot) as image:
            picture = image.convert("RGB")
        side = 1200
        while len(data) > _MAX_PLOT_BYTES and side >= 100:
            picture.thumbnail((side, side))
            buffer = io.BytesIO()
            picture.quantize(64).save(buffer, format="PNG", optimize=True)
            data, side = buffer.getvalue(), side * 3 // 4
    return f"![{plot.stem}](data:image/png;base64,{base64.b64encode(data).decode()})"
