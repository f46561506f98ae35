"""The table of stages: one row per artifact, read by dvc.yaml, the Dagster assets and ``valr run``.

A stage is a function from artifacts to one artifact. Its row says which artifacts it reads, which parts of the recipe
it depends on, what it needs to run on, and where its function is. Importing this module imports nothing heavy; the
function's module is imported only by the process that does the work.
The other trained models of the paper's tables are one stage by cell, ``stage2_ablation@CELL``. They and the studies
have a dvc.yaml of their own, so that ``dvc repro`` trains none of them unasked.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

_PACKAGE = Path(__file__).resolve().parent

RECIPE_FILE = "artifacts/recipe/recipe.yaml"
"""The resolved recipe, relative to the project root; DVC reads the parameters of every other stage from it."""
REQUESTED_PIPELINE = "ablation/dvc.yaml"
"""The DVC pipeline, relative to the project root, of stages that are made on request; dvc.yaml has all others."""


@dataclass(frozen=True)
class Stage:
    """One row of the table."""

    name: str
    """Also the name of the DVC stage, of the Dagster asset and of the folder below ``artifacts/``."""
    group: Literal["recipe", "preparation", "teachers", "training", "evaluation", "studies"]
    """Arrows between groups go one way only, so that the folded graph reads from left to right."""
    summary: str
    """One sentence for people, shown in the graph."""
    function: str
    """Dotted module and name, ``valr_ops.data.curation:build_cot_corpus``; called with a `StageContext`."""
    inputs: tuple[str, ...] = ()
    """Names of the stages whose artifacts are read."""
    parameters: tuple[str, ...] = ()
    """Dotted recipe fields whose change makes the artifact out of date."""
    kinds: tuple[str, ...] = ()
    """Dagster kinds: up to three words shown on the asset."""
    resources: Literal["cpu", "gpu"] = "cpu"
    """What the stage wants at scales small and paper; at scales tiny and mini everything runs on the CPU."""
    variant: str | None = None
    """Name in ``recipe.variants`` that the stage trains or scores."""
    cell: str | None = None
    """For a stage that is made by cell: which one it is; also the last folder of its artifact."""
    external_inputs: str | None = None
    """Dotted function ``(recipe, artifact folder) -> str | None`` that says what changed outside of the project."""
    splits: bool = False
    """Whether several processes or machines can each do a part of it (``valr run STAGE --part I/N``)."""
    checks: tuple[str, ...] = ()
    """Names of the blocking expectations that run on the staged artifact before it is published."""
    on_request: bool = False
    """Whether only who asks for it by name gets it: `dvc repro` makes all that stands in dvc.yaml, this does not."""

    def load(self) -> Callable[..., Any]:
        """Import and return the function that does the work."""
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)

    @property
    def code(self) -> tuple[str, ...]:
        """Files whose change makes the artifact out of date: all that the function's module imports from this package.

        Found in the import statements, so that none can be forgotten. What only carries a stage (the recipe's types,
        the store, this table) is left out: it decides no number, and its change must not retrain a model.
        """
        return code_of(self.function.split(":")[0])

    def code_digest(self, root: Path) -> str:
        """Twelve hexadecimal digits over the content of `code` below `root`: Dagster's code version."""
        return digest_of(self.code, root)


def code_of(module: str) -> tuple[str, ...]:
    """The file of `module` and all that it imports from this package, as `Stage.code` has them."""
    found: set[Path] = set()

    def visit(module: str) -> None:
        for path in _files_of(module):
            if path not in found:
                found.add(path)
                for imported in _imports(path):
                    visit(imported)

    visit(module)
    carried = module.startswith(_CARRIERS)
    return tuple(
        sorted(
            path.relative_to(_PACKAGE.parent).as_posix()
            for path in found
            if carried or not _module_of(path).startswith(_CARRIERS)
        )
    )


def digest_of(files: Iterable[str], root: Path) -> str:
    """Twelve hexadecimal digits over the names and the content of `files` below `root`."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.encode() + b"\0" + (root / file).read_bytes())
    return digest.hexdigest()[:12]


_CARRIERS = ("valr_ops.recipe", "valr_ops.store", "valr_ops.stages", "valr_ops.torchvision_guard")


def _module_of(path: Path) -> str:
    return ".".join(path.relative_to(_PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def _files_of(module: str) -> tuple[Path, ...]:
    path = _PACKAGE.parent.joinpath(*module.split("."))
    if path.with_suffix(".py").is_file():
        return (path.with_suffix(".py"), *path.parent.glob(f"{path.name}.*.j2"))
    if (path / "__init__.py").is_file() and path != _PACKAGE and (path / "__init__.py").stat().st_size:
        return (path / "__init__.py",)
    return ()


# A syntax tree of every file would take half of the time in which Dagster loads the project.
_IMPORT = re.compile(r"^[ \t]*(?:from (valr_ops[\w.]*) import (\([^)]*\)|.*)|import (valr_ops.*))", re.MULTILINE)
_WORD = re.compile(r"\b(?!as\b)(?<!\bas )[\w.]+")


@functools.cache
def _imports(path: Path) -> tuple[str, ...]:
    """Modules of this package that `path` imports anywhere, also inside functions; packages on the way included."""
    if path.suffix != ".py":
        return ()
    names: set[str] = set()
    for module, given, modules in _IMPORT.findall(path.read_text(encoding="utf-8")):
        names |= {module, *(f"{module}.{name}" for name in _WORD.findall(given)), *_WORD.findall(modules)}
    inside = {name for name in names if name.startswith("valr_ops.")}
    parents = {name.rsplit(".", 1)[0] for name in inside if name.count(".") > 1}
    return tuple(sorted(inside | parents))


def _teacher_features(teacher: str, label: str, library: str = "timm", also_reads: tuple[str, ...] = ()) -> Stage:
    return Stage(
        name=f"teacher_features_{teacher}",
        group="teachers",
        summary=f"Patch features of the frozen {label} for the targets of the corpus, stored or left to training.",
        function="valr_ops.teachers.features:build_teacher_features",
        inputs=("cot_corpus", "latent_corpus", *also_reads),
        parameters=("seed", f"teachers.{teacher}", "runtime"),
        kinds=("torch", library, "safetensors"),
        resources="gpu",
        external_inputs="valr_ops.teachers.weights:changed_weights",
        splits=True,
        checks=("features_are_whole",),
    )


def _stage2(variant: str, label: str, teachers: tuple[str, ...]) -> Stage:
    return Stage(
        name=f"stage2_{variant}",
        group="training",
        summary=f"{label}: stage 1 continued with latent segments "
        + (f"aligned to {', '.join(teachers)}." if teachers else "that are aligned to nothing."),
        function="valr_ops.training.loop:build_stage2",
        inputs=(
            "cot_corpus",
            "base_model",
            "latent_corpus",
            "stage1_sft",
            *(f"teacher_features_{teacher}" for teacher in teachers),
        ),
        parameters=("seed", "latents", "alignment", "stage2", "runtime", f"variants.{variant}"),
        kinds=("torch", "deepspeed", "safetensors"),
        resources="gpu",
        variant=variant,
        checks=("losses_are_finite",),
    )


_SCORES = ("scores_base", "scores_sft", "scores_valr_s", "scores_valr_m")


def _method_study(name: str, summary: str) -> Stage:
    """A study of the method on drawn tiles, which needs nothing but the recipe."""
    return Stage(
        name=name,
        group="studies",
        summary=summary,
        function=f"valr_ops.studies.method:build_{name}",
        parameters=("study", "alignment", "runtime", "evaluation.confidence"),
        kinds=("torch", "parquet", "matplotlib"),
        resources="gpu",
        on_request=True,
    )


_ASKING = (
    "seed",
    "data.sources",
    "data.max_image_pixels",
    "data.min_image_side",
    "data.max_steps",
    "evaluation",
    "runtime",
)
"""What the answers to benchmarks depend on."""


def _scores(model: str, label: str, trained_by: str, variant: str | None = None) -> Stage:
    return Stage(
        name=f"scores_{model}",
        group="evaluation",
        summary=f"Answers and scores of {label} on every benchmark, one line per item.",
        function="valr_ops.evaluation.run:build_scores",
        inputs=("sources", "benchmarks", trained_by),
        parameters=_ASKING,
        kinds=("torch", "json"),
        resources="gpu",
        variant=variant,
        checks=("every_item_answered",),
    )


def _study(name: str, summary: str, function: str, inputs: tuple[str, ...], **changes: Any) -> Stage:
    """A study of VaLR-M: data as parquet, a plot, and a few sentences of result."""
    values = {"parameters": _ASKING, "kinds": ("torch", "parquet", "matplotlib"), "resources": "gpu"}
    return Stage(
        name=name,
        group="evaluation",
        summary=summary,
        function=f"valr_ops.evaluation.{function}",
        inputs=inputs,
        variant="valr_m",
        **(values | changes),
    )


STAGES: tuple[Stage, ...] = (
    Stage(
        name="recipe",
        group="recipe",
        summary="Everything the run is about, resolved from params.yaml, with the origin of every value.",
        function="valr_ops.store.assumptions:build_recipe",
        kinds=("yaml",),
    ),
    Stage(
        name="sources",
        group="preparation",
        summary="The raw sources: drawn by the generator, or an inventory with digests of folders given by the user.",
        function="valr_ops.data.inventory:build_sources",
        parameters=("seed", "data.sources", "data.synthetic", "data.benchmarks"),
        kinds=("parquet", "json"),
        external_inputs="valr_ops.data.inventory:changed_sources",
    ),
    Stage(
        name="cot_corpus",
        group="preparation",
        summary="One checked corpus of chain-of-thought records from all sources, images once each, with its rejects.",
        function="valr_ops.data.curation:build_cot_corpus",
        inputs=("sources",),
        parameters=("seed", "data"),
        kinds=("parquet", "great_expectations"),
        checks=("corpus_expectations", "corpus_drift", "no_benchmark_overlap"),
    ),
    Stage(
        name="base_model",
        group="preparation",
        summary="The Qwen2.5-VL that stage 1 starts from, with the control tokens in place.",
        function="valr_ops.model.qwen:build_base_model",
        inputs=("cot_corpus",),
        parameters=("seed", "base", "data.synthetic", "data.max_length", "alignment.block", "runtime"),
        kinds=("torch", "transformers", "safetensors"),
        resources="gpu",
    ),
    Stage(
        name="latent_corpus",
        group="preparation",
        summary="The corpus as token ids with latent segments before the steps, and each segment's target.",
        function="valr_ops.data.rewriting:build_latent_corpus",
        inputs=("cot_corpus", "base_model"),
        parameters=("data.placement", "data.max_length", "data.reserved_slots", "data.sources"),
        kinds=("parquet", "transformers"),
        checks=("latent_expectations",),
    ),
    Stage(
        name="benchmarks",
        group="preparation",
        summary="Questions to be scored by: drawn in the public layouts, or counted in folders given by the user.",
        function="valr_ops.evaluation.benchmark_data:build_benchmarks",
        parameters=("seed", "data.synthetic", "evaluation.benchmarks"),
        kinds=("parquet", "json"),
        external_inputs="valr_ops.evaluation.benchmark_data:changed_benchmarks",
    ),
    _teacher_features("dinov3", "DINOv3"),
    _teacher_features("siglip2", "SigLIP2"),
    _teacher_features("pi3", "π³"),
    _teacher_features("dinov2", "DINOv2"),
    _teacher_features("clip", "CLIP"),
    _teacher_features("efficientnet", "EfficientNet-Lite0"),
    _teacher_features("qwen", "Qwen2.5-VL vision tower", library="transformers", also_reads=("base_model",)),
    Stage(
        name="stage1_sft",
        group="training",
        summary="Chain-of-thought fine-tuning without latents.",
        function="valr_ops.training.loop:build_stage1",
        inputs=("cot_corpus", "base_model", "latent_corpus"),
        parameters=("seed", "stage1", "runtime"),
        kinds=("torch", "deepspeed", "safetensors"),
        resources="gpu",
        checks=("losses_are_finite",),
    ),
    _stage2("valr_s", "VaLR-S", ("dinov3",)),
    _stage2("valr_m", "VaLR-M", ("dinov3", "siglip2", "pi3")),
    _scores("base", "the base model", "base_model"),
    _scores("sft", "the fine-tuned model without latents", "stage1_sft"),
    _scores("valr_s", "VaLR-S", "stage2_valr_s", "valr_s"),
    _scores("valr_m", "VaLR-M", "stage2_valr_m", "valr_m"),
    Stage(
        name="ablation_table",
        group="evaluation",
        summary="All models side by side with intervals and the majority answer, and every cell of the paper's tables.",
        function="valr_ops.evaluation.ablation:build_ablation_table",
        inputs=_SCORES,
        parameters=("evaluation.confidence", "scale"),
        kinds=("json", "matplotlib"),
    ),
    _study(
        "scaling_curve",
        "Accuracy against the length of the reasoning: as the model chose it, and as it was imposed.",
        "length_study:build_scaling_curve",
        ("sources", "benchmarks", "scores_sft", "scores_valr_m", "stage2_valr_m"),
    ),
    _study(
        "visual_decay",
        "How much the model looks at its images from step to step, and what it says once it can't.",
        "probes:build_visual_decay",
        ("sources", "benchmarks", "stage1_sft", "stage2_valr_m"),
        checks=("attention_adds_up",),
    ),
    _study(
        "alignment_maps",
        "Cosine of latents and teachers, patch by patch, beside that with another image.",
        "probes:build_alignment_maps",
        (
            "cot_corpus",
            "latent_corpus",
            "stage2_valr_m",
            *(f"teacher_features_{teacher}" for teacher in ("dinov3", "siglip2", "pi3")),
        ),
        parameters=(
            "seed",
            "latents",
            "alignment",
            "stage2",
            "runtime",
            "teachers.dinov3",
            "teachers.siglip2",
            "teachers.pi3",
            "variants.valr_m",
            "data.max_length",
            "evaluation.study_items",
            "evaluation.confidence",
        ),
        checks=("maps_are_finite",),
    ),
    _study(
        "latent_check",
        "Accuracy with the latents as they are, zeroed, noised, taken from another item, or left out.",
        "probes:build_latent_check",
        ("sources", "benchmarks", "stage2_valr_m"),
    ),
    Stage(
        name="report",
        group="evaluation",
        summary="One page: models beside the paper's, the studies, and ten items to read, worst first.",
        function="valr_ops.evaluation.report:build_report",
        inputs=("ablation_table", *_SCORES, "scaling_curve", "visual_decay", "alignment_maps", "latent_check"),
        kinds=("html",),
    ),
    _method_study(
        "method_check", "Whether aligned latents help, against everything that could explain it away, on drawn tiles."
    ),
    _method_study("gradient_check", "What the gradient through the fed-back states is worth, from none to all of it."),
    _method_study("encoder_check", "Teachers of different knowledge, alone and together."),
    _method_study("chain_check", "Chains of growing length: right steps and attention on the picture, step by step."),
)

_BY_NAME = {stage.name: stage for stage in STAGES}

ABLATION = "stage2_ablation"
"""The stage that is made by cell, and the Dagster asset whose partitions they are."""


@functools.cache
def ablation_cells() -> Mapping[str, Stage]:
    """The trained models of the paper's tables that are no stage of their own, by cell, and scale mini's own model.

    Paper: tables 3 to 6, 9, 11, 12 and figure 3. A cell that only takes fewer records into stage 1 has no stage 2.
    """
    # The recipe's types take 0.2 s to import, and most verbs need no cell.
    from valr_ops.recipe import recipes

    paper, mini = recipes.paper(), recipes.mini()
    rows = {}
    for cell in dict.fromkeys([*paper.variants, *mini.variants]):
        if f"stage2_{cell}" in _BY_NAME:
            continue
        scale = paper if cell in paper.variants else mini
        variant = scale.variants[cell]
        row = _stage2(cell, cell, scale.for_variant(cell).alignment.teachers)
        if variant.stage1_records is not None:
            sft = _BY_NAME["stage1_sft"]
            row = replace(sft, summary=f"{cell}: {sft.summary}", parameters=(*sft.parameters, f"variants.{cell}"))
        rows[cell] = replace(row, name=f"{ABLATION}@{cell}", variant=cell, cell=cell, on_request=True)
    return rows


class UnknownStageError(KeyError):
    """No stage has that name; the message lists the names."""

    def __str__(self) -> str:
        return str(self.args[0])


def stage(name: str) -> Stage:
    """The row called `name`; a cell's is ``stage2_ablation@CELL``. Raises `UnknownStageError`."""
    group, _, cell = name.partition("@")
    if group == ABLATION:
        cells = ablation_cells()
        if cell not in cells:
            close = difflib.get_close_matches(cell, cells, n=1)
            hint = f"did you mean {ABLATION}@{close[0]}?" if close else f"cells: {', '.join(cells)}"
            said = f"has no cell {cell!r}" if cell else f"is made by cell, as {ABLATION}@CELL"
            raise UnknownStageError(f"{ABLATION} {said}; {hint}")
        return cells[cell]
    if name not in _BY_NAME:
        close = difflib.get_close_matches(name, _BY_NAME, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"stages: {', '.join(_BY_NAME)}"
        raise UnknownStageError(f"there is no stage {name!r}; {hint}")
    return _BY_NAME[name]


def dvc_target(name: str) -> str:
    """How DVC addresses the stage called `name` from the project root."""
    requested = "@" in name or (name in _BY_NAME and _BY_NAME[name].on_request)
    return f"{REQUESTED_PIPELINE}:{name}" if requested else name


def upstream(names: Iterable[str]) -> tuple[Stage, ...]:
    """The stages called `names` and everything they need, in an order in which they can be made."""
    wanted: set[str] = set()

    def visit(name: str) -> None:
        if name not in wanted:
            wanted.add(name)
            for needed in stage(name).inputs:
                visit(needed)

    for name in names:
        visit(name)
    return ordered(wanted)


def ordered(names: Iterable[str]) -> tuple[Stage, ...]:
    """The rows called `names` in the order of the table, cells behind by name."""
    wanted = set(names)
    cells = ablation_cells().values() if any("@" in name for name in wanted) else ()
    return tuple(row for row in (*STAGES, *cells) if row.name in wanted)


def dvc_yaml() -> str:
    """The text of dvc.yaml, generated from the table; ``valr stages --write`` writes it and a test compares them."""
    return _yaml_text({row.name: _dvc_stage(row) for row in STAGES if not row.on_request})


def _dvc_stage(row: Stage) -> dict[str, Any]:
    inputs = [f"artifacts/{name}" for name in row.inputs] if row.name != "recipe" else ["params.yaml"]
    return {
        "desc": row.summary,
        "cmd": f"python -m valr_ops run {row.name}",
        **({"wdir": ".."} if row.on_request else {}),
        # The verb itself looks whether folders outside of the project changed. Not so for a stage with inputs: DVC
        # deletes what it makes again, which would be terabytes; whoever reads them holds the weights against them.
        **({"always_changed": True} if row.external_inputs and not row.inputs else {}),
        "deps": [*inputs, *row.code],
        **({"params": [{RECIPE_FILE: list(row.parameters)}]} if row.parameters else {}),
        "outs": [f"artifacts/{row.name}"],
    }


def requested_yaml() -> str:
    """The text of `REQUESTED_PIPELINE`: one template for all cells, because DVC needs half a millisecond for a line.

    DVC's templates have no lists of varying length. Where a cell has fewer inputs or fields than others, the free
    places name what is there already: the packages' own files, which are empty, and parts of the cell's variant.
    """
    cells = ablation_cells()
    inputs, own_inputs = _in_common({cell: row.inputs for cell, row in cells.items()})
    fields, own_fields = _in_common({cell: row.parameters for cell, row in cells.items()})
    files = [f"valr_ops/{folder}/__init__.py" for folder in ("training", "model", "teachers", "data", "store")]
    parts = ("teachers", "weight", "block", "slots", "records")
    most_inputs, most_fields = (max(map(len, own.values())) for own in (own_inputs, own_fields))
    each = {
        cell: {
            "inputs": [*(f"artifacts/{name}" for name in own_inputs[cell]), *files][:most_inputs],
            "fields": [*own_fields[cell], *(f"variants.{cell}.{part}" for part in parts)][:most_fields],
        }
        for cell in cells
    }
    template = {
        "desc": "A trained model of the paper's tables that is no stage of its own.",
        "cmd": f"python -m valr_ops run {ABLATION}@${{key}}",
        "wdir": "..",
        "deps": [
            *(f"artifacts/{name}" for name in inputs),
            *(f"${{item.inputs[{place}]}}" for place in range(most_inputs)),
            *next(iter(cells.values())).code,
        ],
        "params": [{RECIPE_FILE: [*fields, *(f"${{item.fields[{place}]}}" for place in range(most_fields))]}],
        "outs": [f"artifacts/{ABLATION}/${{key}}"],
    }
    studies = {row.name: _dvc_stage(row) for row in STAGES if row.on_request}
    return _yaml_text({ABLATION: {"foreach": each, "do": template}, **studies})


def _in_common(lists: Mapping[str, tuple[str, ...]]) -> tuple[list[str], dict[str, list[str]]]:
    """What all of the lists have, and what each of them has beside that."""
    shared = [one for one in next(iter(lists.values())) if all(one in values for values in lists.values())]
    return shared, {name: [one for one in values if one not in shared] for name, values in lists.items()}


def _yaml_text(stages: Mapping[str, Any]) -> str:
    import yaml

    text = yaml.safe_dump({"stages": dict(stages)}, sort_keys=False, allow_unicode=True, width=1000)
    return f"# Generated from valr_ops/stages.py by `valr stages --write`. Do not edit.\n{text}"
