"""From what a model said to the answer in it, and the order in which people look at answers.

In: raw generated text, with or without control tokens.
Out: the isolated answer, by a rule that has a name and a version, so that a score says which rule read it.
Always: isolation never guesses. It cuts text; whether what is left is an answer of the expected form is the
benchmark's decision. Both texts are kept beside each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

ISOLATION = "answer-line/1"
"""Name and version of the rule in `answer_text`; part of every score's budget. A changed rule gets a new version."""

# A span ends at the next marker, so that a megabyte of unclosed markers is still read in one pass.
LATENT_SEGMENT = re.compile(r"<latent>((?:[^<]|<(?!/?latent>))*)</latent>")
LATENT_SLOT = "<|latent_pad|>"
_CONTROL_TOKEN = re.compile(r"</?latent>|<\|[^<>|]*\|>")
_ANSWER_MARKER = re.compile(r"^[ \t]*answer[ \t]*:", re.IGNORECASE | re.MULTILINE)


def without_control_tokens(output: str) -> str:
    """`output` without latent segments, lone markers and chat tokens; other text is left as it is."""
    return _CONTROL_TOKEN.sub("", LATENT_SEGMENT.sub("", output))


def answer_text(output: str) -> str:
    """The isolated answer: the first line with text after the last line that begins with "Answer:".

    Without such a line it is all of the text, so that a model which answers in one word is read as well.
    An empty string means that nothing was said, or nothing after the marker.
    """
    text = without_control_tokens(output)
    markers = list(_ANSWER_MARKER.finditer(text))
    if not markers:
        return text.strip()
    rest = text[markers[-1].end() :].strip()
    return rest.splitlines()[0].strip() if rest else ""


def normalised(text: str) -> str:
    """Letter case and runs of white space removed, and one final full stop: the form in which texts are compared."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def worst_first(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Scored predictions in the order in which to look at them.

    Answers that could not be read come first, then wrong ones, then right ones; the longest reasoning first within
    each, because that is where something went wrong for longest. Ties keep the order of `rows`.
    """
    return sorted(rows, key=lambda row: (row["correct"], row["resolved"], -row["text_tokens"]))


def examples(rows: Sequence[Mapping[str, Any]], count: int = 10) -> list[Mapping[str, Any]]:
    """Up to `count` rows worth reading, worst first; some right answers are among them where there are any."""
    ordered = worst_first(rows)
    wrong = [row for row in ordered if not row["correct"]]
    right = [row for row in ordered if row["correct"]]
    room_for_wrong = max(count - len(right), round(0.7 * count))
    chosen = wrong[:room_for_wrong]
    return chosen + right[: count - len(chosen)]
