"""Asking outside of the graph: any model, any benchmark folder, into a run folder; and scoring what is in there.

In: a model (a folder, a stage, a pinned hub revision or an endpoint) and folders of benchmarks.
Out: `run.json` (who was asked what, under which budget) and `answers.jsonl` (appended, a line an answer); scoring adds
`predictions.jsonl`, `scores.json` and the examples, as in the artifact of a stage `scores_*`.
Always: the two steps are apart, and the second one needs no model; a run that was interrupted goes on; a run folder
holds answers of one model under one budget, and nothing else is mixed in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from valr_ops.data.sources import located, read
from valr_ops.evaluation.models import Answerer, AnswererError, Budget, open_answerer, open_endpoint_model
from valr_ops.evaluation.questions import Benchmark, Showing, benchmark_of_records, open_benchmark
from valr_ops.evaluation.run import (
    PredictionsError,
    answers_so_far,
    ask,
    read_scores,
    require_answers,
    scores_markdown,
    write_scores,
)
from valr_ops.evaluation.scoring import Judge
from valr_ops.recipe.recipe import Recipe, SourceRecipe
from valr_ops.store.artifacts import model_folder
from valr_ops.store.progress import Progress

RUN = "run.json"
ANSWERS = "answers.jsonl"
RECORDS = "records"
"""Says that a folder holds records in the project's own format; its test records are asked, as the stages do."""
_HUB = "hub:"
_PACKAGES = ("torch", "transformers", "numpy", "pillow", "av")


@dataclass(frozen=True)
class Asked:
    """A benchmark that was, or is to be, asked."""

    name: str
    format: str
    folder: str
    profile: str | None = None
    limit: int | None = None
    whole: bool = True
    """Whether the folder has to hold the whole published data set."""

    @classmethod
    def parse(cls, text: str, limit: int | None, whole: bool) -> Asked:
        """``vsi_bench=FOLDER``, or ``mine:jsonl=FOLDER`` for another name than the format's (``mine:records=FOLDER``).

        Raises:
            AnswererError: it is written in another way.
        """
        name, equals, folder = text.partition("=")
        name, _, format = name.partition(":")
        if not (equals and name and folder):
            raise AnswererError(f"--benchmark {text}: write NAME=FOLDER, or NAME:FORMAT=FOLDER")
        return cls(name, format or name, str(Path(folder).resolve()), None, limit, whole)

    def open(self, recipe: Recipe, cache: Path) -> Benchmark:
        """Read its items.

        Raises:
            BenchmarkError: a benchmark that is not whole, or has nothing to ask.
            SourceError: no records there.
        """
        showing = Showing.of_recipe(recipe, cache)
        if self.format == RECORDS:
            reading = located(self.name, self.folder, recipe.data, SourceRecipe(format="jsonl"))
            records = (one.item for one in read(reading, splits=("test",)))
            return benchmark_of_records(self.name, records, showing, self.limit, profile=self.profile)
        return open_benchmark(
            self.name, Path(self.folder), showing, self.format, self.profile, self.limit, whole=self.whole
        )


def open_model(
    model: str, recipe: Recipe, served_as: str | None = None, name: str | None = None, engine: str | None = None
) -> Answerer:
    """The model that the user names: ``https://HOST/v1``, ``hub:ID@COMMIT``, a folder or a stage.

    Args:
        engine: ``transformers`` decodes a Qwen2.5-VL by its own class, without latents; None as `open_answerer`.
        served_as: the model's name at the endpoint.
        name: what to call it in scores; the last part of its address without one.

    Raises:
        AnswererError: an endpoint without a model's name, or a hub id without a revision.
        ArtifactError: no such folder or stage.
    """
    if model.startswith(("http://", "https://")):
        if not served_as:
            raise AnswererError(f"--model {model} is an endpoint; add --served-as NAME, the model's name there")
        return open_endpoint_model(name or served_as, model, served_as, recipe)
    if model.startswith(_HUB):
        hub_id, at, revision = model.removeprefix(_HUB).partition("@")
        if not at or not revision:
            raise AnswererError(
                f"--model {model}: pin a revision, {_HUB}{hub_id}@COMMIT, so that scores can be repeated"
            )
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
        return open_answerer(name or hub_id.rpartition("/")[2], folder, recipe, engine)
    folder = model_folder(model)
    return open_answerer(name or folder.name, folder, recipe, engine)


def ask_run(
    answerer: Answerer, asked: Sequence[Asked], out: Path, recipe: Recipe, cache: Path, progress: Progress
) -> dict[str, Any]:
    """Ask everything that `out` does not have an answer to, and say what is there.

    Raises:
        PredictionsError: `out` holds the answers of another run; the message names what differs.
        UnansweredError: items got no answer.
    """
    benchmarks = [one.open(recipe, cache) for one in asked]
    run = {
        "name": answerer.name,
        "model": answerer.digest,
        "budget": asdict(answerer.budget),
        "batch_size": recipe.evaluation.batch_size,
        "benchmarks": [asdict(one) | {"revision": benchmark.revision} for one, benchmark in zip(asked, benchmarks)],
    }
    out.mkdir(parents=True, exist_ok=True)
    _require_same_run(out / RUN, run)
    _write_json(out / RUN, run | {"packages": {name: version(name) for name in _PACKAGES}})
    questions = [(benchmark, item) for benchmark in benchmarks for item in benchmark.items]
    journal = out / ANSWERS
    done = answers_so_far(journal, questions)
    predictions = ask(questions, done, answerer, journal, recipe.evaluation.batch_size, progress)
    require_answers(predictions)
    return {"out": str(out), "items": len(questions), "asked": len(questions) - len(done)}


def score_run(
    out: Path, recipe: Recipe, cache: Path, profile: str | None = None, judge: Judge | None = None
) -> tuple[dict[str, Any], str]:
    """Score the answers in a run folder, as often and by as many profiles as wanted, one after the other.

    Args:
        profile: of all its benchmarks; None for the default of each.
        judge: settles what a profile would ask a language model.

    Returns:
        The scores as `scores.json` holds them, and the same as a table in Markdown.

    Raises:
        PredictionsError: no run, or answers that are missing or belong to no item.
        BenchmarkError: the data is not there any more, is other data than was asked, or has no such profile.
    """
    try:
        run = json.loads((out / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PredictionsError(f"{out} holds no run ({error}); make one with `valr ask --out {out}`") from None
    budget = Budget(**run["budget"])
    recipe_of_run = recipe.model_copy(
        update={"evaluation": recipe.evaluation.model_copy(update={"frames": budget.frames})}
    )
    benchmarks = []
    for entry in run["benchmarks"]:
        revision = entry.pop("revision")
        benchmark = replace(Asked(**entry), profile=profile).open(recipe_of_run, cache)
        if benchmark.revision != revision:
            raise PredictionsError(
                f"the files of {benchmark.name} in {entry['folder']} are not those that were asked (revision "
                f"{benchmark.revision}, then {revision}); bring them back, or ask again into another folder"
            )
        benchmarks.append(benchmark)
    questions = [(benchmark, item) for benchmark in benchmarks for item in benchmark.items]
    predictions = list(answers_so_far(out / ANSWERS, questions).values())
    answerer = Answerer(run["name"], lambda prompts: (), budget, run["model"])
    write_scores(out, benchmarks, predictions, answerer, recipe.evaluation.confidence, judge)
    scores = read_scores(out)
    return scores, scores_markdown(scores)


def _require_same_run(file: Path, run: Mapping[str, Any]) -> None:
    if not file.exists():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    different = [name for name in run if run[name] != before.get(name)]
    if different:
        detail = "; ".join(f"{name}: {_differing(before.get(name), run[name])}" for name in different)
        raise PredictionsError(
            f"{file.parent} holds answers of another run ({detail}); give --out another folder, or the same settings"
        )


def _differing(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        return ", ".join(
            f"{key} {before.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        )
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return "; ".join(_differing(one, other) for one, other in zip(before, now) if one != other)
    return f"{before!r}, now {now!r}"[:300]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
