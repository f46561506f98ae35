"""BLINK: questions of visual perception with two to four options, in 14 sub-tasks.

In: `BLINK-Benchmark/BLINK` on disk, a folder with the validation split for each sub-task; or cases whose
`question_type` is the sub-task, gold "(B)", options the texts of the choices.
Out: items with one to four images, sub-task by sub-task; scores by the authors' matcher (zeyofu/BLINK_Benchmark
2d6a779), lmms-eval or VLMEvalKit, and the totals.
Always: a question is the data set's own prompt. The disclaimer that the authors' script puts before three sub-tasks,
about people whom closed models refuse to look at, is left out. The options' number says which letters count; without
options that is A to E for the authors, A to Z for lmms-eval. Nothing is stripped before the authors' matcher looks:
"(B)." is not the word "(B)".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from string import ascii_uppercase

from valr_ops.evaluation.benchmarks import Item
from valr_ops.evaluation.benchmarks.folder import Folder
from valr_ops.evaluation.choices import by_can_infer, gold_letter, judged, mean, means
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored, Totals

COUNTS = {
    "Art_Style": 117,
    "Counting": 120,
    "Forensic_Detection": 132,
    "Functional_Correspondence": 130,
    "IQ_Test": 150,
    "Jigsaw": 150,
    "Multi-view_Reasoning": 133,
    "Object_Localization": 122,
    "Relative_Depth": 124,
    "Relative_Reflectance": 134,
    "Semantic_Correspondence": 139,
    "Spatial_Relation": 143,
    "Visual_Correspondence": 172,
    "Visual_Similarity": 135,
}
"""Questions of each sub-task in the validation split; the test split comes without answers."""
SUB_TASKS = tuple(COUNTS)
SOURCE = "get it with `hf download BLINK-Benchmark/BLINK --repo-type dataset --revision COMMIT --local-dir FOLDER`"
_IMAGES = ("image_1", "image_2", "image_3", "image_4")

_BRACKETED = ("(A)", "(B)", "(C)", "(D)", "(E)")
_READY = {letter: letter for letter in _BRACKETED} | {letter[1]: letter for letter in _BRACKETED}


def read(folder: Folder) -> list[Item]:
    """The questions of `SUB_TASK/val-*.parquet`, sub-tasks in the order of `SUB_TASKS`.

    Raises:
        BenchmarkError: a sub-task without its file, or a row without prompt, choices, image or the letter of a choice.
    """
    items = []
    for task in SUB_TASKS:
        for name in folder.find(f"{task}/val-*.parquet"):
            for row in folder.rows(name, ("idx", "sub_task", "prompt", "choices", "answer"), _IMAGES):
                options = row.texts("choices")
                items.append(
                    Item(
                        id=row.text("idx"),
                        benchmark=folder.benchmark,
                        question=row.text("prompt"),
                        gold=row.letter("answer", len(options)),
                        options=options,
                        question_type=row.one_of("sub_task", [task]),
                        images=row.pictures(),
                    )
                )
    return items


def official(case: Case) -> Scored:
    """The answer if it is a letter, else the only ``(X)`` among the words of its last paragraph or of all of it.

    With several or none the authors ask a language model: unresolved.
    """
    gold = f"({gold_letter(case)})"
    if case.output in _READY:
        return judged(_READY[case.output], gold)
    valid = set(_BRACKETED[: len(case.options)] if case.options else _BRACKETED)
    everywhere = valid.intersection(case.output.split())
    at_the_end = valid.intersection(case.output.rpartition("\n\n")[2].split())
    for found in (at_the_end, everywhere):
        if len(found) == 1:
            return judged(found.pop(), gold)
    return Scored(0.0, None, resolved=False)


def lmms_eval(case: Case) -> Scored:
    """The letter of a first line that is nothing else, else of the last "answer X", the last ``(X)``, or at the start.

    Only the last two care little for words: "Both" reads B.
    """
    text = case.output.strip()
    line_of_a_letter, after_answer, bracketed, at_start = _patterns(ascii_uppercase[: len(case.options)])
    first_line = text.partition("\n")[0].strip()
    letter = ""
    if len(first_line) <= 4 and (match := line_of_a_letter.match(first_line)):
        letter = match[1]
    elif found := after_answer.findall(text) or bracketed.findall(text):
        letter = found[-1]
    elif match := at_start.match(text):
        letter = match[1]
    return judged(letter.upper() or None, gold_letter(case))


@lru_cache
def _patterns(letters: str) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """The four places of a letter, in the order in which they count; no `letters` means all 26."""
    letter = f"([{letters or ascii_uppercase}])"
    return (
        re.compile(rf"\(?{letter}\)?[.\s:,)]*$", re.IGNORECASE),
        # One way to spread white space around the mark, or a megabyte of it would take a square of steps.
        re.compile(rf"answers?(?:\s+is)?\s*(?:[:\-]\s*)?\(?{letter}\)?(?![A-Za-z])", re.IGNORECASE),
        re.compile(rf"\({letter}\)"),
        re.compile(rf"[(\s]*{letter}", re.IGNORECASE),
    )


PROFILES = {OFFICIAL: official, LMMS_EVAL: lmms_eval, VLMEVALKIT: by_can_infer}


def totals(cases: Sequence[Case], scores: Sequence[Scored], profile: str) -> Totals:
    """`overall` as the profile has it, `micro` over samples, `macro` over the 14 sub-tasks, each sub-task, baselines.

    `overall` is the macro mean, for VLMEvalKit the sample mean. `macro` is None unless the sub-tasks are the 14; then
    `absent` lists those without a case, if there are any.
    `always_a` scores the answer A, `random` a uniform draw; the latter is None where a case has no options.
    """
    by_task = means(cases, scores)
    macro = sum(by_task.values()) / len(SUB_TASKS) if by_task.keys() == set(SUB_TASKS) else None
    micro = mean(scores)
    chances = [1 / len(case.options) for case in cases if case.options]
    absent = [task for task in SUB_TASKS if task not in by_task]
    found = {
        "overall": micro if profile == VLMEVALKIT else macro,
        "micro": micro,
        "macro": macro,
        **by_task,
        "always_a": sum(gold_letter(case) == "A" for case in cases) / len(cases) if cases else None,
        "random": sum(chances) / len(chances) if chances and len(chances) == len(cases) else None,
    }
    return found | {"absent": absent} if absent else found
