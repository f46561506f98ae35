"""The studies as stages: what is trained with what, what is kept, and what is said of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.studies.tiny_study import recipe
from valr_ops.recipe.recipe import Recipe, RecipeError
from valr_ops.stages import STAGES, code_of
from valr_ops.store.artifacts import StageContext, StageReport, directory_digest
from valr_ops.store.progress import Progress
from valr_ops.studies import courses, method
from valr_ops.studies.courses import Course, Taken
from valr_ops.studies.telling import Findings, sentences, speed


class Told(Progress):
    """Keeps what a stage says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def context(folder: Path, of: Recipe, stage: str = "method_check") -> StageContext:
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return StageContext(stage=stage, recipe=of, inputs={}, out=folder / "out", work=folder / "work", progress=Told())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[StageContext, StageReport]:
    """Three arms, with everything as small as can be."""
    here = context(tmp_path_factory.mktemp("study"), recipe(**{"study.learning_rates": [1e-3]}))
    return here, build_three_arms(here)


def build_three_arms(here: StageContext) -> StageReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "METHOD", ("sft", "latents", "aligned"))
        return method.build_method_check(here)


def test_every_arm_begins_with_the_same_weights_and_every_seed_is_reported(
    made: tuple[StageContext, StageReport],
) -> None:
    here, report = made
    rows = pq.read_table(here.out / "curves.parquet").to_pylist()
    assert {(row["arm"], row["seed"]) for row in rows} == {
        (arm, seed) for arm in ("sft", "latents", "aligned") for seed in (1, 2)
    }
    text = (here.out / "result.md").read_text()
    for arm in ("sft", "latents", "aligned"):
        right = [row["accuracy"] for row in rows if row["arm"] == arm and row["update"] == 3]
        assert report.summary[f"right_{arm}"] == pytest.approx(np.mean(right))
        assert ", ".join(f"{share:.3f}" for share in right) in text
    ended = [row["alignment/all"] for row in rows if row["arm"] == "aligned" and row["update"] == 3]
    table = text.partition("## What training ended with")[2].partition("##")[0]
    assert f"| aligned | {np.mean(ended):.3f} | " in table and "| latents |  |  | " in table and "| sft |" not in table
    assert len(list(method._kept(here).glob("*/stage1-*.safetensors"))) == 3, "stage 1 is shared by the arms of a seed"
    searched = pq.read_table(here.out / "search_3_steps.parquet").to_pylist()
    assert {(row["arm"], row["seed"]) for row in searched} == {(arm, 0) for arm in ("sft", "latents", "aligned")}
    for name in ("curves.png", "inside.png", "curves.svg", "readings.parquet"):
        assert (here.out / name).stat().st_size > 1000


def test_what_is_finished_is_not_trained_again_and_gives_the_same_bytes(
    made: tuple[StageContext, StageReport], tmp_path: Path
) -> None:
    here, _ = made
    again = replace(here, out=tmp_path / "out", progress=Told())
    again.out.mkdir()
    started = time.process_time()
    build_three_arms(again)
    assert again.progress.lines == []
    assert directory_digest(again.out) == directory_digest(here.out), time.process_time() - started


def test_an_arm_that_is_trained_longer_is_read_where_the_others_end(made: tuple[StageContext, StageReport]) -> None:
    here, _ = made
    curves = pq.read_table(here.out / "curves.parquet").to_pylist()
    readings = pq.read_table(here.out / "readings.parquet").to_pylist()
    assert max(row["update"] for row in curves if row["arm"] == "sft") == 2 * here.recipe.study.updates
    for seed in (1, 2):
        (there,) = [one["accuracy"] for one in curves if (one["arm"], one["seed"], one["update"]) == ("sft", seed, 3)]
        read = [one["value"] for one in readings if (one["arm"], one["seed"], one["reading"]) == ("sft", seed, "right")]
        assert np.mean(read) == pytest.approx(there)


def test_another_study_takes_the_courses_that_both_have(made: tuple[StageContext, StageReport], tmp_path: Path) -> None:
    here, _ = made
    told = Told()
    other = replace(here, stage="encoder_check", out=tmp_path / "out", work=here.work.parent / "other", progress=told)
    other.out.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "ENCODERS", ("aligned", "sft"))
        method.build_encoder_check(other)
    assert told.lines == [], "none is trained"


def test_the_quick_form_has_one_seed_and_claims_nothing(made: tuple[StageContext, StageReport], tmp_path: Path) -> None:
    here, _ = made
    quick = replace(here, out=tmp_path / "out", recipe=recipe(**{"study.quick": True}))
    quick.out.mkdir()
    report = method.build_method_check(quick)
    rows = pq.read_table(quick.out / "curves.parquet").to_pylist()
    assert {(row["arm"], row["seed"]) for row in rows} == {("sft", 1), ("aligned", 1)}
    text = (quick.out / "result.md").read_text()
    assert "of one seed, which alone shows nothing" in text and "nan" not in text
    assert not any(key.endswith("_low") for key in report.summary)


def test_chains_of_each_length_are_trained_and_told_step_by_step(tmp_path: Path) -> None:
    lengths = {"study.chain_steps": [1, 2], "study.learning_rates": [1e-3], "study.updates": 1}
    here = context(tmp_path, recipe(**lengths), "chain_check")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "CHAINS", ("sft", "aligned"))
        report = method.build_chain_check(here)
    rows = pq.read_table(here.out / "readings.parquet").to_pylist()
    for length in (1, 2):
        told = [row for row in rows if row["steps"] == length and row["reading"] == "image_attention"]
        assert len(told) == 2 * 2 * length and all(0 < row["value"] < 1 for row in told)
        right = [row["value"] for row in rows if row["steps"] == length and row["reading"] == "right"]
        assert len(right) == 2 * 2 * length
        assert f"right_aligned_{length}_steps" in report.summary
    assert "## From step to step, chains of 2" in (here.out / "result.md").read_text()
    assert (here.out / "chains.png").stat().st_size > 1000


def test_a_course_is_the_same_whatever_is_trained_beside_it(
    made: tuple[StageContext, StageReport], tmp_path: Path
) -> None:
    here, _ = made
    course = Course("aligned", 2, 1e-3)
    (alone,) = courses.take(here.recipe, [course], tmp_path, Progress(), "alone").values()
    (beside,) = courses.take(here.recipe, [course], method._kept(here), Progress(), "beside").values()
    assert replace(alone, seconds=0.0) == replace(beside, seconds=0.0)


def test_another_recipe_takes_other_courses_and_more_seeds_only_those_that_are_missing(
    made: tuple[StageContext, StageReport],
) -> None:
    here, _ = made
    digest = courses._digest(here.recipe)
    assert courses._digest(recipe(**{"study.seeds": [1, 2, 3], "study.quick": False})) == digest
    assert courses._digest(recipe(**{"study.updates": 4})) != digest
    assert courses._digest(recipe(**{"alignment.weight": 0.25})) != digest
    decide = code_of("valr_ops.studies.courses")
    assert {"valr_ops/studies/arms.py", "valr_ops/training/objective.py"} <= set(decide)
    assert not {"valr_ops/studies/telling.py", "valr_ops/studies/method.py"} & set(decide), "tables decide nothing"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(courses, "digest_of", lambda files, root: "of another code")
        assert courses._digest(here.recipe) != digest


def test_a_killed_study_leaves_no_process_and_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.studies.tiny_study import recipe\n"
        "from valr_ops.studies.courses import Course, take; from valr_ops.store.progress import Progress\n"
        "if __name__ == '__main__':\n"
        "    take(recipe(**{'study.updates': 2000}), [Course('aligned', 1, 1e-3)], Path(sys.argv[1]), Progress(), '')\n"
    )
    (tmp_path / "study.py").write_text(script)
    words = [sys.executable, str(tmp_path / "study.py"), str(tmp_path / "work")]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(words, env=environment, start_new_session=True)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("work/*/stage1-1-*.json")):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    while _alive(running.pid):
        assert time.monotonic() < deadline, "a worker outlived the process that it worked for"
        time.sleep(0.2)
    assert not list(tmp_path.glob("work/*/aligned-*")), "half a course is none"
    assert len(list(tmp_path.glob("work/*/stage1-1-*.json"))) == 1


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# ------------------------------------------------------------------------------------------------- what is said of it


def findings(**shares: list[float]) -> Findings:
    """Arms with these shares of right steps, a seed each."""
    taken = {
        arm: [
            Taken(Course(arm, seed, 1e-3), [{"update": 2, "accuracy": share, "chains": share**4}], 100, {}, 1.0)
            for seed, share in enumerate(values, 1)
        ]
        for arm, values in shares.items()
    }
    return Findings(taken, recipe(**{"study.updates": 2}).study, 0.95, ("sft",))


@pytest.mark.parametrize(
    ("aligned", "verdict"),
    [([0.9, 0.92, 0.91], "better"), ([0.1, 0.12, 0.11], "worse"), ([0.9, 0.1, 0.5], "no difference shown")],
)
def test_a_difference_is_called_one_only_where_the_interval_leaves_out_zero(aligned: list[float], verdict: str) -> None:
    found = findings(sft=[0.3, 0.31, 0.32], aligned=aligned)
    difference = found.minus("aligned", "sft")
    apart = np.subtract(aligned, [0.3, 0.31, 0.32])
    reach = 4.302653 * apart.std(ddof=1) / np.sqrt(3)  # Student's t of 2 degrees of freedom, 0.975
    assert (difference.low, difference.high) == pytest.approx((apart.mean() - reach, apart.mean() + reach))
    assert sentences(found)[1].endswith(f", {verdict}.")


def test_equal_compute_is_where_the_cheap_arm_has_cost_as_much() -> None:
    found = findings(sft=[0.3, 0.3], aligned=[0.9, 0.8])
    (first, second), dear = found.taken["sft"], [replace(one, flops=250) for one in found.taken["aligned"]]
    long = [
        replace(one, curve=[*one.curve, *({"update": at, "accuracy": right, "chains": 0.0} for at, right in later)])
        for one, later in ((first, [(4, 0.5), (5, 0.6), (6, 1.0)]), (second, [(4, 0.5), (5, 0.7), (6, 1.0)]))
    ]
    found = replace(found, taken={"sft": long, "aligned": dear})
    at_equal = found.minus_at_equal_compute("aligned", "sft")
    assert at_equal is not None and at_equal.value == pytest.approx((0.9 - 0.6 + 0.8 - 0.7) / 2)
    dearer = replace(found, taken={"sft": long, "aligned": [replace(one, flops=400) for one in dear]})
    assert dearer.minus_at_equal_compute("aligned", "sft") is None, "it was not trained that long"


def test_arms_that_end_alike_are_told_apart_by_how_soon_they_got_there() -> None:
    found = findings(sft=[0.3, 0.3, 0.3], aligned=[0.95, 0.95, 0.95], colour=[0.9, 0.9, 0.9])
    sooner = [
        replace(one, curve=[{"update": at, "accuracy": 0.9, "chains": 0.0}, *one.curve])
        for at, one in zip((0, 1, 1), found.taken["colour"], strict=True)
    ]
    found = replace(found, taken=found.taken | {"colour": sooner}, against=("sft", "aligned"))
    sft, aligned, colour = speed(found).splitlines()[2:]
    assert sft == "| sft | never, never, never |  |  |  |"
    assert aligned == "| aligned | 2, 2, 2 | 2 |  |  |"
    # Differences -2, -1, -1: Student's interval of three.
    assert colour == "| colour | 0, 1, 1 | 1 |  | −1 (−3 to +0) |"


def test_seeds_are_paired() -> None:
    found = findings(sft=[0.1, 0.5, 0.9], aligned=[0.2, 0.6, 1.0])
    assert found.minus("aligned", "sft").low == pytest.approx(0.1)


# ------------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"study.seeds": [1]}, r"study: seeds=\[1\]: an interval needs at least two"),
        ({"study.seeds": [0, 1]}, "search_seed=0 is among seeds"),
        ({"study.chain_steps": [2, 5]}, "has 4 tiles, and none is visited twice, so 5 are too many"),
        ({"study.block": 3}, r"block=3 but study.model has blocks 0..2"),
    ],
)
def test_a_study_that_shows_nothing_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(**change)


def test_no_stage_but_a_study_depends_on_the_section() -> None:
    readers = {row.name for row in STAGES if any(field.split(".")[0] == "study" for field in row.parameters)}
    assert readers == {row.name for row in STAGES if row.group == "studies"}


def test_quick_is_for_studies() -> None:
    words = [sys.executable, "-m", "valr_ops", "run", "sources", "--quick"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "sources has no quick form" in done.stderr
    assert json.dumps("") not in done.stdout
