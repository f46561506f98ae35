"""What must hold of a corpus before it is published, as great-expectations suites on small pandas frames.

In: the staged folder of `cot_corpus` or `latent_corpus`. Out: a blocking `Check` that carries the ids of failing rows,
and `data_docs/index.html` in the same folder.
Always: nothing is sent anywhere, nothing is written but the page, and the page holds no clock and no run id, so that
equal artifacts have equal bytes. Facts that need a join (an image is stored, a target exists) are columns of the
frames, computed here; the rules about them are expectations.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq

from valr_ops.data.corpus import RECORD_SCHEMA, CorpusRecord, read_records
from valr_ops.recipe.recipe import Recipe
from valr_ops.store.artifacts import Check

# Read when the package is imported, hence before it.
os.environ["GX_ANALYTICS_ENABLED"] = "false"

import great_expectations as gx
import great_expectations.expectations as gxe
from great_expectations.data_context.types.base import (
    DataContextConfig,
    InMemoryStoreBackendDefaults,
    ProgressBarsConfig,
)

_SHOWN_ROWS = 20
"""Failing ids that a check carries for each expectation."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class _Suite:
    """The expectations on one frame."""

    title: str
    frame: pd.DataFrame
    key: str
    """Column that names a row."""
    expectations: list[Any]


@dataclass(frozen=True)
class _Outcome:
    """One expectation's result."""

    table: str
    rule: str
    """The sentence that has to hold."""
    expectation: str
    passed: bool
    rows: int
    failing: int
    ids: list[str]
    observed: str


def corpus_expectations(staged_folder: Path, recipe: Recipe) -> Check:
    """Schema, ranges, uniqueness and references of a staged `cot_corpus`; also writes its data docs.

    Args:
        staged_folder: holds records.parquet and images.parquet.
        recipe: limits on images and steps, and the names of the sources.

    Returns:
        a check named ``corpus_expectations``; its metadata lists for each failed expectation the ids of failing rows.
    """
    records = read_records(staged_folder)
    images = _image_frame(staged_folder, records)
    sizes = dict(zip(images["digest"], zip(images["width"], images["height"], strict=True), strict=True))
    data = recipe.data
    suites = [
        _Suite(
            "records",
            _record_frame(records, staged_folder, sizes),
            "id",
            [
                gxe.ExpectTableRowCountToBeBetween(min_value=1, description="There is at least one record."),
                _holds("schema", "records.parquet has exactly the columns of the contract."),
                gxe.ExpectColumnValuesToNotBeNull(column="id", description="Every record has an id."),
                gxe.ExpectColumnValuesToBeUnique(column="id", description="No two records have the same id."),
                gxe.ExpectColumnValuesToBeInSet(
                    column="source", value_set=sorted(data.sources), description="Every source is in the recipe."
                ),
                gxe.ExpectColumnValuesToBeInSet(
                    column="split", value_set=["train", "validation"], description="No test record is in the corpus."
                ),
                gxe.ExpectColumnValuesToBeInSet(
                    column="kind",
                    value_set=["single_view", "multi_view", "interleaved"],
                    description="The kind of record is known.",
                ),
                _between("license_length", 1, None, "Every record carries a licence."),
                _between("question_length", 1, None, "No question is empty."),
                _between("answer_length", 1, None, "No answer is empty."),
                _between("step_count", 1, data.max_steps, "Records have 1 to data.max_steps steps."),
                _between("input_images", 1, None, "Every record shows an image with the question."),
                _holds("images_stored", "Every image of a record is in images.parquet, with the same size."),
            ],
        ),
        _Suite(
            "steps",
            _step_frame(records),
            "step",
            [
                _between("text_length", 1, None, "No step is empty."),
                _holds("target_exists", "A step's target is one of its record's images."),
                _between("x0", 0, None, "Boxes begin inside the image (left)."),
                _between("y0", 0, None, "Boxes begin inside the image (top)."),
                _greater("x1", "x0", "Boxes are not inverted or empty (width)."),
                _greater("y1", "y0", "Boxes are not inverted or empty (height)."),
                _greater("width", "x1", "Boxes end inside the image (right).", or_equal=True),
                _greater("height", "y1", "Boxes end inside the image (bottom).", or_equal=True),
            ],
        ),
        _Suite(
            "images",
            images,
            "digest",
            [
                gxe.ExpectColumnValuesToBeUnique(column="digest", description="Each distinct image stands once."),
                _holds("digest_holds", "The stored bytes have the digest they are stored under."),
                _between("width", data.min_image_side, None, "Images are at least data.min_image_side wide."),
                _between("height", data.min_image_side, None, "Images are at least data.min_image_side high."),
                _between("pixels", 1, data.max_image_pixels, "Images have at most data.max_image_pixels pixels."),
                _between("uses", 1, None, "Every image belongs to a record."),
                _between("splits", 1, 1, "No image stands in both the training and the validation split."),
            ],
        ),
    ]
    return _check("corpus_expectations", suites, staged_folder)


def latent_expectations(staged_folder: Path, recipe: Recipe, corpus: Path | None = None) -> Check:
    """Lengths, marker positions and targets of a staged `latent_corpus`; also writes its data docs.

    Args:
        staged_folder: holds sequences.parquet.
        recipe: limits on the length.
        corpus: the artifact `cot_corpus`; with it, targets are looked up in images.parquet and boxes compared with the
            image's size, without it only their form is checked.

    Returns:
        a check named ``latent_expectations``; its metadata lists for each failed expectation the ids of failing rows.
    """
    sizes = None
    if corpus is not None:
        table = pq.read_table(corpus / "images.parquet", columns=["digest", "width", "height"])
        sizes = {row["digest"]: (row["width"], row["height"]) for row in table.to_pylist()}
    sequences, segments = _sequence_frames(staged_folder / "sequences.parquet", recipe.data.reserved_slots, sizes)
    suites = [
        _Suite(
            "sequences",
            sequences,
            "id",
            [
                gxe.ExpectTableRowCountToBeBetween(min_value=1, description="There is at least one sequence."),
                gxe.ExpectColumnValuesToNotBeNull(column="id", description="Every sequence has an id."),
                gxe.ExpectColumnValuesToBeUnique(column="id", description="No two sequences have the same id."),
                gxe.ExpectColumnValuesToBeInSet(
                    column="split", value_set=["train", "validation"], description="No test record is in the corpus."
                ),
                _between(
                    "length_with_slots",
                    1,
                    recipe.data.max_length,
                    "Sequences fit data.max_length, data.reserved_slots for every segment included.",
                ),
                _between("prompt_length", 1, None, "Every sequence begins with a prompt."),
                _greater("length", "prompt_length", "Something follows the prompt, so there is something to learn."),
                _holds("markers_match", "Control tokens stand at the segments and nowhere else."),
                _holds("grids_match", "Every input image has its patch grid."),
            ],
        ),
        _Suite(
            "segments",
            segments,
            "segment",
            [
                _holds("after_prompt", "Segments stand behind the prompt and inside the sequence."),
                _holds("in_order", "Segments stand in reading order."),
                _holds("pair_holds", "A segment's position is that of <latent>, with </latent> behind it."),
                _holds("target_resolvable", "A segment's target is an image of the corpus, or it has none."),
                _holds("box_holds", "A segment's box has an area inside its image."),
            ],
        ),
    ]
    return _check("latent_expectations", suites, staged_folder)


def _between(column: str, least: int | None, most: int | None, description: str) -> Any:
    return gxe.ExpectColumnValuesToBeBetween(column=column, min_value=least, max_value=most, description=description)


def _holds(column: str, description: str) -> Any:
    return gxe.ExpectColumnValuesToBeInSet(column=column, value_set=[True], description=description)


def _greater(larger: str, smaller: str, description: str, or_equal: bool = False) -> Any:
    return gxe.ExpectColumnPairValuesAToBeGreaterThanB(
        column_A=larger,
        column_B=smaller,
        or_equal=or_equal,
        ignore_row_if="either_value_is_missing",
        description=description,
    )


def _record_frame(records: list[CorpusRecord], folder: Path, sizes: dict[str, tuple[int, int]]) -> pd.DataFrame:
    schema = pq.read_schema(folder / "records.parquet").equals(RECORD_SCHEMA)
    return pd.DataFrame(
        {
            "id": [record.id for record in records],
            "source": [record.source for record in records],
            "split": [record.split for record in records],
            "kind": [record.kind for record in records],
            "schema": [schema] * len(records),
            "license_length": [len(record.license) for record in records],
            "question_length": [len(record.question.strip()) for record in records],
            "answer_length": [len(record.answer.strip()) for record in records],
            "step_count": [len(record.steps) for record in records],
            "input_images": [sum(image.role == "input" for image in record.images) for record in records],
            "images_stored": [
                all(sizes.get(image.digest) == (image.width, image.height) for image in record.images)
                for record in records
            ],
        }
    )


def _step_frame(records: list[CorpusRecord]) -> pd.DataFrame:
    columns = ["step", "text_length", "target_exists", "x0", "y0", "x1", "y1", "width", "height"]
    rows: list[tuple[Any, ...]] = []
    for record in records:
        for number, step in enumerate(record.steps):
            target = step.target
            exists = target is None or 0 <= target.image < len(record.images)
            box: tuple[int | None, ...] = (None,) * 4
            size: tuple[int | None, ...] = (None,) * 2
            if target is not None and target.box is not None and exists:
                box = target.box
                size = (record.images[target.image].width, record.images[target.image].height)
            rows.append((f"{record.id}#step{number}", len(step.text.strip()), exists, *box, *size))
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[3:], "float64"))


def _image_frame(folder: Path, records: list[CorpusRecord]) -> pd.DataFrame:
    uses: Counter[str] = Counter()
    splits: dict[str, set[str]] = {}
    for record in records:
        for image in record.images:
            uses[image.digest] += 1
            splits.setdefault(image.digest, set()).add(record.split)
    rows = []
    with pq.ParquetFile(folder / "images.parquet") as file:
        for batch in file.iter_batches(batch_size=64):
            for row in batch.to_pylist():
                digest = row["digest"]
                holds = hashlib.sha256(row["data"]).hexdigest() == digest
                pixels = row["width"] * row["height"]
                seen = len(splits.get(digest, ()))
                rows.append((digest, row["width"], row["height"], pixels, holds, uses[digest], seen))
    columns = ["digest", "width", "height", "pixels", "digest_holds", "uses", "splits"]
    return pd.DataFrame(rows, columns=columns)


def _sequence_frames(
    path: Path, reserved_slots: int, sizes: dict[str, tuple[int, int]] | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One frame by sequence, one by segment.

    The ids of the control tokens are not stored in the artifact: they are what most segments' positions hold.
    """
    pairs = Counter(
        tuple(ids[segment["position"] : segment["position"] + 2].tolist())
        for row, ids in _sequences(path)
        for segment in row["segments"]
    )
    pair = pairs.most_common(1)[0][0] if pairs else ()
    sequence_rows, segment_rows = [], []
    for row, ids in _sequences(path):
        segments = row["segments"]
        positions = [segment["position"] for segment in segments]
        markers = sorted([*positions, *(position + 1 for position in positions)])
        sequence_rows.append(
            (
                row["id"],
                row["split"],
                len(ids),
                len(ids) + reserved_slots * len(segments),
                row["prompt_length"],
                np.flatnonzero(np.isin(ids, pair)).tolist() == markers,
                len(row["image_digests"]) == len(row["image_grids"]),
            )
        )
        for number, segment in enumerate(segments):
            position = segment["position"]
            resolvable, box_holds = _target_holds(segment["digest"], segment["box"], sizes)
            segment_rows.append(
                (
                    f"{row['id']}#segment{number}",
                    row["prompt_length"] <= position < len(ids) - 1,
                    number == 0 or position > positions[number - 1],
                    tuple(ids[position : position + 2].tolist()) == pair,
                    resolvable,
                    box_holds,
                )
            )
    return (
        pd.DataFrame(
            sequence_rows,
            columns=[
                *("id", "split", "length", "length_with_slots", "prompt_length"),
                *("markers_match", "grids_match"),
            ],
        ),
        pd.DataFrame(
            segment_rows,
            columns=["segment", "after_prompt", "in_order", "pair_holds", "target_resolvable", "box_holds"],
        ),
    )


def _sequences(path: Path) -> Iterator[tuple[dict[str, Any], npt.NDArray[np.int32]]]:
    """Rows of sequences.parquet and their ids as arrays: as Python numbers those of the full corpus fill a machine."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            ids = batch["input_ids"]
            offsets, values = ids.offsets.to_numpy(), ids.values.to_numpy()
            for number, row in enumerate(batch.drop_columns(["input_ids"]).to_pylist()):
                yield row, values[offsets[number] : offsets[number + 1]]


def _target_holds(
    digest: str | None, box: list[int] | None, sizes: dict[str, tuple[int, int]] | None
) -> tuple[bool, bool]:
    """Whether the target can be found, and whether its box lies in it."""
    if digest is None:
        return True, box is None
    resolvable = digest in sizes if sizes is not None else _DIGEST.fullmatch(digest) is not None
    if box is None:
        return resolvable, True
    width, height = (sizes or {}).get(digest, (None, None))
    x0, y0, x1, y1 = box
    inside = (width is None or x1 <= width) and (height is None or y1 <= height)
    return resolvable, 0 <= x0 < x1 and 0 <= y0 < y1 and inside


def _check(name: str, suites: list[_Suite], folder: Path) -> Check:
    outcomes = _validate(suites)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    _write_docs(name, suites, outcomes, folder / "data_docs" / "index.html")
    if failed:
        worst = max(failed, key=lambda outcome: outcome.failing)
        which = f", first in {worst.ids[0]}" if worst.ids else ""
        detail = (
            f"{len(failed)} of {len(outcomes)} expectations failed on {worst.table} and others: {worst.rule} "
            f"({worst.failing} of {worst.rows} rows{which}). The artifact was not published; correct the stage's "
            "input, or the limit in the recipe that the rule names"
        )
        detail = detail if len({outcome.table for outcome in failed}) > 1 else detail.replace(" and others", "")
    else:
        rows = ", ".join(f"{len(suite.frame)} {suite.title}" for suite in suites)
        detail = f"all {len(outcomes)} expectations hold on {rows}"
    return Check(
        name=name,
        passed=not failed,
        detail=detail,
        metadata={
            "expectations": len(outcomes),
            "rows": {suite.title: len(suite.frame) for suite in suites},
            "failed": [
                {
                    "table": outcome.table,
                    "rule": outcome.rule,
                    "expectation": outcome.expectation,
                    "failing_rows": outcome.failing,
                    "ids": outcome.ids,
                }
                for outcome in failed
            ],
        },
    )


def _validate(suites: list[_Suite]) -> list[_Outcome]:
    """Run great-expectations on every frame, without its bars, log lines and files."""
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context = gx.get_context(
            mode="ephemeral",
            project_config=DataContextConfig(
                # The default makes a folder for pages below /tmp and leaves it there.
                store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
                progress_bars=ProgressBarsConfig(globally=False),
                analytics_enabled=False,
            ),
        )
        source = context.data_sources.add_pandas("staged")
        for suite in suites:
            batch = source.add_dataframe_asset(suite.title).add_batch_definition_whole_dataframe("all")
            result = batch.get_batch(batch_parameters={"dataframe": suite.frame}).validate(
                gx.ExpectationSuite(name=suite.title, expectations=suite.expectations),
                result_format={
                    "result_format": "SUMMARY",
                    "unexpected_index_column_names": [suite.key],
                    "partial_unexpected_count": _SHOWN_ROWS,
                },
            )
            outcomes += [_outcome(suite, one.to_json_dict()) for one in result.results]
    return outcomes


def _outcome(suite: _Suite, result: dict[str, Any]) -> _Outcome:
    configuration, values = result["expectation_config"], result["result"]
    exception = result.get("exception_info", {})
    observed = values.get("observed_value", "")
    if exception.get("exception_message"):
        observed = exception["exception_message"]
    ids = [str(row[suite.key]) for row in values.get("partial_unexpected_index_list") or []]
    return _Outcome(
        table=suite.title,
        rule=configuration["description"],
        expectation=configuration["type"],
        passed=bool(result["success"]),
        rows=len(suite.frame),
        failing=int(values.get("unexpected_count", 0 if result["success"] else len(suite.frame))),
        ids=ids,
        observed=str(observed),
    )


def _write_docs(name: str, suites: list[_Suite], outcomes: list[_Outcome], path: Path) -> None:
    """The page; great-expectations' own renderer puts clocks and run ids into it, hence a template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("data_docs.html.j2").render(
        name=name,
        version=gx.__version__,
        passed=all(outcome.passed for outcome in outcomes),
        tables=[
            {
                "title": suite.title,
                "rows": len(suite.frame),
                "outcomes": [outcome for outcome in outcomes if outcome.table == suite.title],
                "summary": _describe(suite),
            }
            for suite in suites
        ],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def _describe(suite: _Suite) -> list[dict[str, str]]:
    """Least, mean and greatest value of every number in a frame."""
    numbers = suite.frame.select_dtypes("number")
    return [
        {
            "column": str(column).replace("_", " "),
            "least": f"{numbers[column].min():g}",
            "mean": f"{numbers[column].mean():.4g}",
            "greatest": f"{numbers[column].max():g}",
        }
        for column in numbers
        if numbers[column].notna().any()
    ]
