"""The model card of a release: what a person reads before using the model, with the front matter of the Hub.

In: `Facts`, everything that the bundle says about the model. Out: a page in Markdown.
Always: no number stands without its n and interval, and none is put beside the paper's that was not reached on the
published questions; a licence that is unknown is said first; what the model can't do follows from its scores, its data
and its size, not from a template.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from valr_ops.data.screening import license_allows
from valr_ops.evaluation.ablation import TITLES
from valr_ops.evaluation.paper_cells import DIFFERS, WITHIN_NOISE, PaperCell, paper_cells, signed
from valr_ops.evaluation.statistics import percent
from valr_ops.recipe.recipe import Recipe

CARD = "README.md"
PAPER = "https://arxiv.org/abs/2602.04476"

TOLERATED = 25
"""One answer in so many may be another one: the last bits of a product differ between processors."""
_TASK = "image-text-to-text"
_DRAWN = " †"
_FEW_ITEMS = 100
_OFTEN_CUT = 0.05
"""Share of answers that hit the token limit, from which the card says so."""


@dataclass(frozen=True)
class Facts:
    """Everything that the card tells, as the other files of the bundle have it."""

    name: str
    """For people, such as VaLR-M."""
    key: str
    """In tables, such as valr_m."""
    digest: str
    """Of the model's folder."""
    config: Mapping[str, Any]
    """`config.json` of the model."""
    recipe: Recipe
    scores: Mapping[str, Any]
    """`scores.json`."""
    rows: Sequence[Mapping[str, Any]]
    """Of `predictions.jsonl`."""
    data: Mapping[str, Any]
    teachers: Mapping[str, Any]
    cost: Mapping[str, Any]
    decision: Mapping[str, Any] | None
    questions: Sequence[Mapping[str, Any]]
    """That are packed, as `questions.jsonl` has them."""

    @property
    def trained(self) -> bool:
        """Whether this project trained it, and not only made or took it."""
        return "stage" in (self.config.get("valr") or {})

    @property
    def slots(self) -> int:
        """Fed in a latent segment; 0 for a model without latents."""
        return int(self.scores["budget"]["slots"])

    @property
    def licenses(self) -> dict[str, list[str]]:
        """By licence, what is under it: the base model, sources and teachers."""
        found: dict[str, list[str]] = {}

        def under(license: str, what: str) -> None:
            found.setdefault(license, []).append(what)

        under(self.data["base_model"]["license"], "the base model")
        for name, source in self.data["sources"].items():
            named = source["licenses"]
            for license in named if isinstance(named, Mapping) else [named]:
                under(license, f"the source {name}")
        for name, teacher in self.teachers.items():
            under(teacher["license"], f"the teacher {name}")
        return found

    @property
    def unknown_licenses(self) -> list[str]:
        """One sentence for everything whose licence nobody stated."""
        return [
            f"the licence of {what} is unknown: ask whoever owns it before you publish"
            for license, things in self.licenses.items()
            if license.lower() == "unknown"
            for what in things
        ]


def write_card(path: Path, facts: Facts) -> None:
    """Write the card of a release."""
    parts = [f"---\n{_front_matter(facts)}\n---\n", *(part for part in _sections(facts) if part)]
    path.write_text("\n".join(parts), encoding="utf-8")


def _front_matter(facts: Facts) -> str:
    """YAML as the Hub reads it; scores on drawn questions say so in the name of their data set."""
    licenses = sorted(facts.licenses)
    one = licenses[0].lower() if len(licenses) == 1 else "other"
    results = [
        EvalResult(
            task_type=_TASK,
            dataset_type=entry["format"],
            dataset_name=f"{TITLES.get(name, name)}{', drawn questions' if entry['drawn'] else ''}",
            metric_type="accuracy",
            metric_name=f"share of {entry['n']} items, {entry['profile']}",
            metric_value=round(100 * entry["accuracy"], 2),
        )
        for name, entry in _largest_first(facts)
    ]
    data = ModelCardData(
        license=one,
        license_name="as-listed-in-the-card" if one == "other" else None,
        language="en",
        library_name="valr_ops",
        pipeline_tag=_TASK,
        base_model=facts.data["base_model"]["hub_id"],
        tags=["valr", "latent-reasoning", "qwen2_5_vl", "arxiv:2602.04476"],
        model_name=facts.name,
        eval_results=results,
    )
    return str(data.to_yaml())


def _sections(facts: Facts) -> Iterator[str]:
    yield f"# {facts.name}\n\n{_what_it_is(facts)}\n"
    unknown = facts.unknown_licenses
    if unknown:
        yield "> **UNKNOWN LICENCE.** " + " ".join(f"{one[0].upper()}{one[1:]}." for one in unknown) + "\n"
    yield _asking(facts)
    yield _scored(facts)
    yield "## What it is not good for\n\n" + "\n".join(f"- {one}" for one in _limits(facts)) + "\n"
    yield _trained_on(facts)
    yield _taught_by(facts)
    yield _paid(facts)
    yield _decided(facts)
    yield _checking(facts)


def _what_it_is(facts: Facts) -> str:
    base = facts.data["base_model"]
    size = f" of {base['parameters']:,} parameters" if base["parameters"] else ""
    plain = facts.recipe.base.from_scratch and not facts.recipe.base.language_model
    made = f"made from scratch at scale {facts.recipe.scale}" if plain else base["origin"]
    trained = "trained to reason in steps before it answers" if facts.trained else "not trained any further"
    sentences = [f"A vision-language model: Qwen2.5-VL{size} ({made}), {trained}."]
    if facts.slots:
        sentences.append(
            f"Before a step it thinks in a latent segment: for {facts.slots} positions its own last hidden state is "
            f"fed back in place of a token ([VaLR]({PAPER}))."
        )
    if facts.teachers:
        names = ", ".join(facts.teachers)
        sentences.append(
            f"In training these states were aligned with the patch features of frozen vision encoders ({names}); "
            "**none of them is needed to use it**."
        )
    if facts.recipe.scale == "tiny":
        sentences.append("At this scale it shows that the whole pipeline works, and is good for nothing else.")
    return " ".join(sentences)


def _asking(facts: Facts) -> str:
    package = facts.data["code"]["package"]
    return f"""## Ask it

```sh
pip install --constraint constraints.txt PATH/TO/valr_ops    # {package}
valr generate --model model {_example(facts)}
valr serve --model model                                     # over HTTP, as OpenAI's API does
```

{_by_other_means(facts)}"""


def _example(facts: Facts) -> str:
    """A packed question that is short and about one picture, so that the line works as it stands."""
    about_one = [one for one in facts.questions if len(one["pictures"]) == 1]
    if not about_one:
        return "--image PICTURE.png --question 'What is in the picture?'"
    shortest = min(about_one, key=lambda one: len(one["question"]))
    question = " ".join(shortest["question"].split())
    return f"--image questions/{shortest['pictures'][0]} --question {shlex.quote(question)}"


def _by_other_means(facts: Facts) -> str:
    if not facts.slots:
        return "`model/` is a plain Qwen2.5-VL folder, which transformers opens as well.\n"
    return (
        "transformers opens `model/` too, as a plain Qwen2.5-VL, but does not feed latents back: its answers are not "
        "those that were scored.\n"
    )


def _scored(facts: Facts) -> str:
    budget, confidence = facts.scores["budget"], facts.scores["confidence"]
    lines = [
        "## Scores\n",
        f"| benchmark | n | score | {confidence:.0%} interval | always the same answer | the paper's |",
        "| --- | ---: | ---: | --- | ---: | --- |",
    ]
    beside = _papers(facts)
    for name, entry in _largest_first(facts):
        low, high = entry["interval"]
        lines.append(
            f"| {_title(name)}{_DRAWN if entry['drawn'] else ''} | {entry['n']:,} | {percent(entry['accuracy'])} "
            f"| {percent(low)} to {percent(high)} | {percent(entry['majority']['accuracy'])} "
            f"| {_beside(beside.get(name), entry)} |"
        )
    frames, seconds = budget["frames"], "" if budget["latent_settle"] is None else ", ended early where latents settle"
    latents = (
        f", at most {budget['max_segments']} segments of {budget['slots']} slots{seconds}" if budget["slots"] else ""
    )
    pixels = (
        f", pictures of {budget['min_pixels']:,} to {budget['max_pixels']:,} pixels" if budget["max_pixels"] else ""
    )
    lines.append(
        f"\nBudget: {budget['decoding']} decoding in {budget['precision']}, at most {budget['max_new_tokens']:,} "
        f"tokens of text{latents}{pixels}, {frames} frame{'s' * (frames != 1)} of a video, seed {budget['seed']}, "
        f"engine `{budget['engine']}`, answers read by rule `{budget['isolation']}`. A score is comparable only with "
        "one under the same budget."
    )
    if any(entry["drawn"] for entry in facts.scores["benchmarks"].values()):
        lines.append(
            "\n† Drawn questions: a generator made them in the layout of the benchmark, so no published score is "
            "comparable."
        )
    lines.append(
        "\nEvery answer is in `scores/predictions.jsonl`, with what was read out of it; totals of each benchmark's own "
        "rules are in `scores/scores.json`.\n"
    )
    return "\n".join(lines)


def _papers(facts: Facts) -> dict[str, PaperCell]:
    """The cell of the paper's main tables about this very model, by our name of the benchmark."""
    cells = paper_cells({facts.key: (facts.scores, facts.rows)}, facts.scores["confidence"])
    found: dict[str, PaperCell] = {}
    for name, entry in facts.scores["benchmarks"].items():
        columns = ("avg", "vsi_bench") if entry["format"] == "vsi_bench" else (entry["format"],)
        about = [one for one in cells if one.model == facts.key and one.column in columns and one.table in ("1", "2")]
        found |= {name: about[0]} if about else {}
    return found


def _beside(cell: PaperCell | None, entry: Mapping[str, Any]) -> str:
    if cell is None:
        return "none of this model"
    if entry["drawn"]:
        return "not comparable"
    if cell.verdict not in (DIFFERS, WITHIN_NOISE) or cell.difference is None:
        return f"{cell.paper:.1f}, not comparable: {cell.verdict}"
    return f"{cell.paper:.1f} ({signed(cell.difference)}, {cell.verdict})"


def _limits(facts: Facts) -> Iterator[str]:
    """What follows from scores, data, size and licences."""
    scored = facts.scores["benchmarks"]
    if facts.data["sources"] and all(not one["origin"].startswith("given") for one in facts.data["sources"].values()):
        yield "**Photographs, text in pictures, the world**: it has seen nothing but pictures that a generator drew."
    guessing = [name for name, entry in scored.items() if entry["interval"][0] <= entry["majority"]["accuracy"]]
    if guessing:
        yield (
            f"**Answering {_some(guessing, scored)}**: one constant answer may do as well, so nothing shows that it "
            "looks at the pictures there."
        )
    cut = [name for name, entry in scored.items() if entry["cut_off"] > _OFTEN_CUT * entry["n"]]
    if cut:
        yield f"**Long answers**: on {_some(cut, scored)} over one in twenty was cut off by the limit, which is wrong."
    few = [name for name, entry in scored.items() if entry["n"] < _FEW_ITEMS]
    if few:
        yield f"**Fine comparisons on {_some(few, scored)}**: below {_FEW_ITEMS} questions only large differences show."
    frames = facts.scores["budget"]["frames"]
    yield f"**Long videos and sound**: of a video it is shown {frames} frame{'s' * (frames != 1)}, and hears nothing."
    if facts.slots:
        silent = [name for name, entry in scored.items() if entry["latent_trigger_rate"] < 0.5]
        if silent:
            yield f"**Latent reasoning on {_some(silent, scored)}**: in most answers there it opens no latent segment."
        yield "**Explaining itself**: latents are no text, and the words around them need not say what they hold."
    binding = [
        f"{license} ({', '.join(things)})"
        for license, things in sorted(facts.licenses.items())
        if not license_allows(license, "commercial")
    ]
    if binding:
        yield f"**Commercial use**, unless these licences allow it: {'; '.join(binding)}."
    yield "**Decisions about people**, medicine or safety, and other languages than English: none of that was measured."


def _trained_on(facts: Facts) -> str:
    base = facts.data["base_model"]
    lines = [
        "## Training data\n",
        "| source | records | licence | where from | digest (MD5) |",
        "| --- | ---: | --- | --- | --- |",
    ]
    for name, source in facts.data["sources"].items():
        records = f"{source['records']:,}" if source["records"] is not None else "?"
        shown = name if source["format"] == name else f"{name} ({source['format']})"
        lines.append(
            f"| {shown} | {records} | {_named(source['licenses'])} | {source['origin']} | `{source['md5'][:10]}` |"
        )
    lines.append(f"\nBase model: {base['origin']}, licence {_license(base['license'])}.")
    lines.append("Records count after curation; rejects, digests of all artifacts and the code are in `data.json`.\n")
    return "\n".join(lines)


def _taught_by(facts: Facts) -> str:
    if not facts.teachers:
        return ""
    lines = [
        "## Teachers, in training only\n",
        "| teacher | model | where from | licence | fingerprint |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, one in facts.teachers.items():
        lines.append(
            f"| {name} | {one['model']} | {one['origin']} | {_license(one['license'])} | `{one['fingerprint'][:10]}` |"
        )
    lines.append("\nNone of their weights are in here, and none are needed to ask the model.\n")
    return "\n".join(lines)


def _paid(facts: Facts) -> str:
    total = facts.cost["total"]
    measured = total["actual_seconds"] is not None
    lines = ["## Cost\n", "| stage | planned | took |", "| --- | --- | --- |"]
    for name, row in facts.cost["stages"].items():
        took = _duration(row["actual_seconds"]) if row["actual_seconds"] is not None else "not measured"
        lines.append(
            f"| {name} | {_span(row['planned']['hours']['total']) if row['planned'] else 'no formula'} | {took} |"
        )
    dollars = total["planned_dollars"]
    money = f"{dollars[0]:,.0f} to {dollars[1]:,.0f} dollars" if dollars[1] else "no GPU, so no money"
    took = f" It took {_duration(total['actual_seconds'])} where it was measured." if measured else ""
    lines.append(
        f"\nTogether planned: {_span(total['planned_hours'])}, {money}.{took} What a range assumes is in `cost.json`.\n"
    )
    return "\n".join(lines)


def _decided(facts: Facts) -> str:
    decision = facts.decision
    if decision is None:
        return ""
    said = ["The promotion gate let it through." if decision["passes"] else "The promotion gate refused it."]
    if decision["overruled"]:
        said.append(f"A person overruled that: {decision['overruled'].rstrip('.')}.")
    return "## The promotion gate\n\n" + " ".join([*said, "The evidence is in `decision/decision.md`."]) + "\n"


def _checking(facts: Facts) -> str:
    return f"""## Check it

```sh
valr release verify .
```

compares every file with `manifest.json` and the environment with `constraints.txt`, and asks the model the
{len(facts.questions)} packed questions again, under the budget of the scores. It needs nothing but this folder. At most
one answer in {TOLERATED} may be another one: bit-exact answers on another machine are not promised.

Model `{facts.digest}`, recipe in `recipe.yaml`, every choice that the paper leaves open in `assumptions.json`.
"""


def _largest_first(facts: Facts) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(facts.scores["benchmarks"].items(), key=lambda one: (-one[1]["n"], one[0]))


def _title(name: str) -> str:
    return TITLES.get(name, name).replace("*", r"\*")


def _some(names: Sequence[str], scored: Mapping[str, Any]) -> str:
    """Benchmarks in words; most of many by what is left over."""
    others = [name for name in scored if name not in names]
    if not others:
        return "every benchmark here"
    if len(names) > 2 * len(others):
        return f"every benchmark here but {_listed(others)}"
    return _listed(names)


def _listed(names: Sequence[str]) -> str:
    titles = [_title(name) for name in sorted(names)]
    return titles[0] if len(titles) == 1 else f"{', '.join(titles[:-1])} and {titles[-1]}"


def _license(license: str) -> str:
    return "**UNKNOWN**" if license.lower() == "unknown" else license


def _named(licenses: Mapping[str, int] | str) -> str:
    if isinstance(licenses, str):
        return _license(licenses)
    if len(licenses) == 1:
        return _license(next(iter(licenses)))
    return ", ".join(f"{_license(name)} ({records:,})" for name, records in licenses.items())


def _span(hours: Sequence[float]) -> str:
    low, high = (_duration(3600 * one) for one in hours)
    return low if low == high else f"{low} to {high}"


def _duration(seconds: float) -> str:
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"
