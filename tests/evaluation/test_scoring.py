from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from valr_ops.__main__ import main
from valr_ops.evaluation.benchmarks import mmvp, vsi_bench
from valr_ops.evaluation.scoring import LMMS_EVAL, Case, Scored, ScoringError, read_cases, score, score_file
from valr_ops.exits import EXIT_CONFIGURATION

CASE = {"id": "1", "question_type": "object_counting", "gold": "4", "output": "4 chairs"}


def written(path: Path, *rows: dict[str, Any] | str | bytes) -> Path:
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def run(source: Path, target: Path, *more: str) -> int:
    return main(["score", "--benchmark", "vsi_bench", "--in", str(source), "--out", str(target), *more])


def test_the_command_writes_a_line_a_case_in_order_and_ends_with_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(
        tmp_path / "cases.jsonl",
        CASE,
        {"id": 7, "question_type": "route_planning", "gold": "A", "options": ["A. left", "B. right"], "output": "(A)"},
        {"id": "x", "question_type": "object_counting", "gold": "5", "output": ""},
    )
    assert run(source, tmp_path / "scores.jsonl") == 0
    assert lines(tmp_path / "scores.jsonl") == [
        {"id": "1", "score": 1.0, "extracted": "4", "resolved": True},
        {"id": 7, "score": 0.0, "extracted": "(A)", "resolved": True},
        {"id": "x", "score": 0.0, "extracted": None, "resolved": True},
    ]
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == {
        "benchmark": "vsi_bench",
        "profile": "official",
        "n": 3,
        "mean": pytest.approx(1 / 3),
        "unresolved": 0,
    }


def test_aggregate_adds_the_totals_of_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "cases.jsonl", CASE, CASE | {"id": "2", "output": "none"})
    assert run(source, tmp_path / "scores.jsonl", "--profile", LMMS_EVAL, "--aggregate") == 0
    out = capsys.readouterr().out.splitlines()
    totals = json.loads(out[-1])["totals"]
    assert totals["micro"] == totals["object_counting"] == 0.5
    assert totals["macro"] is None
    assert "route_planning" in totals["absent"]
    assert any(line.strip() == "micro: 0.5000" for line in out)


def test_cases_that_a_judge_would_decide_are_counted_and_marked(tmp_path: Path) -> None:
    source = written(tmp_path / "cases.jsonl", {"id": 1, "gold": "(a)", "output": "(a)"})
    summary = score_file(source, tmp_path / "scores.jsonl", "mmvp", "official")
    assert (summary["mean"], summary["unresolved"]) == (0.0, 1)
    assert lines(tmp_path / "scores.jsonl") == [{"id": 1, "score": 0.0, "extracted": None, "resolved": False}]


@pytest.mark.parametrize(("module", "name"), [(vsi_bench, "vsi_bench"), (mmvp, "mmvp")])
def test_without_a_profile_the_first_of_the_benchmark_is_taken(tmp_path: Path, module: Any, name: str) -> None:
    gold = CASE if name == "vsi_bench" else CASE | {"gold": "(a)"}
    source = written(tmp_path / "cases.jsonl", gold)
    summary = score_file(source, tmp_path / "scores.jsonl", name)
    assert summary["profile"] == next(iter(module.PROFILES))


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ("{", "2: column"),
        ('{"id": "2", "gold": "4", "outp', "2: column"),
        (b'{"id": "2", "gold": "4", "output": "\xff"}', "2: byte 36"),
        ("[" * 100_000, "2 is not JSON"),
        ("[1]", "2: a list"),
        ("null", "2: null"),
        ({"gold": "4", "output": ""}, "2: id is missing; the fields are gold, output"),
        ({"id": "2", "output": ""}, "2: gold is missing"),
        ({"id": "2", "gold": "4"}, "2: output is missing"),
        (CASE | {"id": "1"}, r"2: id '1' was already in .*cases.jsonl:1"),
        (CASE | {"id": 1}, r"2: id '1' was already"),
        (CASE | {"id": ""}, "2: id is empty"),
        (CASE | {"id": None}, "2: id is null"),
        (CASE | {"id": True}, "2: id is true or false"),
        (CASE | {"id": 1.5}, "2: id is the number 1.5"),
        (CASE | {"id": "2", "output": None}, "2: output is null"),
        (CASE | {"id": "2", "output": 4}, "2: output is the number 4"),
        (CASE | {"id": "2", "output": ["4"]}, "2: output is a list"),
        (CASE | {"id": "2", "gold": None}, "2: gold is null"),
        (CASE | {"id": "2", "gold": {}}, "2: gold is an object"),
        ('{"id": "2", "gold": NaN, "output": ""}', "2: gold is the number nan"),
        (CASE | {"id": "2", "question_type": 3}, "2: question_type is the number 3"),
        (CASE | {"id": "2", "question": ["Which?"]}, "2: question is a list"),
        (CASE | {"id": "2", "options": {"A": "left"}}, "2: options is an object"),
        (CASE | {"id": "2", "options": [None]}, "2: an option is null"),
        (CASE | {"id": "2", "gold": "0"}, "2: case '2': gold '0'"),
        (CASE | {"id": "2", "question_type": "colour"}, "2: case '2': question_type 'colour'"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_nothing_is_written(
    tmp_path: Path, bad: dict[str, Any] | str | bytes, named: str
) -> None:
    source, target = written(tmp_path / "cases.jsonl", CASE, bad), tmp_path / "scores.jsonl"
    with pytest.raises(ScoringError, match=rf"cases\.jsonl:{named}"):
        score_file(source, target, "vsi_bench")
    assert sorted(tmp_path.iterdir()) == [source]


def test_the_command_leaves_old_scores_alone_and_exits_42_on_bad_cases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = written(tmp_path / "cases.jsonl", CASE, "{"), tmp_path / "scores.jsonl"
    target.write_text("old")
    assert run(source, target) == EXIT_CONFIGURATION == 42
    assert "cases.jsonl:2" in capsys.readouterr().err
    assert target.read_text() == "old"


def test_a_file_that_is_empty_or_missing_is_an_error(tmp_path: Path) -> None:
    target = tmp_path / "scores.jsonl"
    for empty in (b"", b"\n \n", b"\xef\xbb\xbf"):
        (tmp_path / "cases.jsonl").write_bytes(empty)
        assert run(tmp_path / "cases.jsonl", target) == 42
    assert run(tmp_path, target) == 42
    assert not target.exists()
    target.write_text("old")
    assert run(tmp_path / "no.jsonl", target) == 42
    assert target.read_text() == "old"


@pytest.mark.parametrize(
    ("benchmark", "profile", "named"),
    [
        ("vsi", "official", "vsi_bench, blink"),
        ("vsi_bench", "lmms-eval", "lmms-eval@0.7.3"),
        ("jsonl/../mmvp", "", "no"),
    ],
)
def test_an_unknown_benchmark_or_profile_is_an_error_that_lists_the_known_ones(
    benchmark: str, profile: str, named: str
) -> None:
    with pytest.raises(ScoringError, match=named):
        score([], benchmark, profile)


def test_scores_may_not_replace_the_cases_nor_anything_but_a_file(tmp_path: Path) -> None:
    source = written(tmp_path / "cases.jsonl", CASE)
    before = source.read_bytes()
    (tmp_path / "link").symlink_to(source)
    os.mkfifo(tmp_path / "pipe")
    for target in (source, tmp_path / "link", tmp_path, tmp_path / "pipe"):
        assert run(source, target) == 42
    assert run(source, tmp_path / "no folder" / "scores.jsonl") == 42
    assert source.read_bytes() == before
    assert (tmp_path / "pipe").is_fifo()


def test_old_scores_are_replaced_and_not_written_over(tmp_path: Path) -> None:
    source, target = written(tmp_path / "cases.jsonl", CASE), tmp_path / "scores.jsonl"
    target.write_text("old")
    os.link(target, tmp_path / "old")
    assert run(source, target) == 0
    assert (tmp_path / "old").read_text() == "old"
    assert lines(target)[0]["score"] == 1.0
    assert {path.name for path in tmp_path.iterdir()} == {"cases.jsonl", "scores.jsonl", "old"}


def test_a_byte_order_mark_blank_lines_and_other_fields_do_no_harm(tmp_path: Path) -> None:
    row = json.dumps(CASE | {"model": "x", "latency_s": 1.5})
    cases = [
        case for _, case in read_cases(written(tmp_path / "cases.jsonl", "\ufeff" + row, "", "  ", CASE | {"id": "2"}))
    ]
    assert [case.id for case in cases] == ["1", "2"]
    assert cases[1].where.endswith("cases.jsonl:4")


def test_golds_and_options_keep_the_form_of_the_data_set(tmp_path: Path) -> None:
    source = written(
        tmp_path / "cases.jsonl",
        {"id": 1, "gold": "(B)", "options": ["left", "right"], "output": ""},
        {"id": 2, "gold": 3.5, "options": [1, 2.5], "output": ""},
        {"id": 3, "gold": ["a", "b"], "options": "(a) Open (b) Closed", "output": ""},
        {"id": 4, "gold": " x", "options": None, "question_type": None, "output": ""},
    )
    assert [(case.gold, case.options) for _, case in read_cases(source)] == [
        ("(B)", ("left", "right")),
        ("3.5", ("1", "2.5")),
        ('["a", "b"]', ("(a) Open (b) Closed",)),
        (" x", ()),
    ]


def test_half_a_surrogate_pair_in_an_answer_is_read_and_written(tmp_path: Path) -> None:
    source = written(
        tmp_path / "cases.jsonl", r'{"id": "1", "question_type": "route_planning", "gold": "A", "output": "\ud83d"}'
    )
    score_file(source, tmp_path / "scores.jsonl", "vsi_bench")
    assert lines(tmp_path / "scores.jsonl")[0]["extracted"] == "\ud83d"


def test_a_megabyte_of_answer_is_scored(tmp_path: Path) -> None:
    source = written(tmp_path / "cases.jsonl", CASE | {"output": "4 " + "猫" * 1_000_000})
    assert score_file(source, tmp_path / "scores.jsonl", "vsi_bench")["mean"] == 1.0


def test_a_case_made_in_memory_is_named_by_its_id_alone() -> None:
    with pytest.raises(ScoringError, match=r"^case '9'"):
        score([Case("9", "0", "4", "object_counting")], "vsi_bench", "official")
    assert score([Case("9", "4", "4", "object_counting")], "vsi_bench", "official") == [Scored(1.0, "4")]


def test_scoring_loads_nothing_heavy() -> None:
    code = (
        "import sys; from valr_ops.evaluation import scoring; scoring.rules_of('vsi_bench'); scoring.rules_of('mmvp');"
        "print({'torch', 'transformers', 'numpy', 'pandas', 'scipy', 'pydantic', 'rich'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
