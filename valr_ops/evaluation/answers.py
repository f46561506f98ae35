"""From what a model said to the answer in it, and the order in which people look at answers.

In: raw generated text, with or without control tokens.
Out: the isolated answer, by a rule that has a name and a version, so that a score says which rule read it.
Always: isolation never guesses. It cuts text; whether what is left is an answer of the expected form is the
benchmark's decision. Both texts are kept beside each other. Each step is one pass over the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ISOLATION = "iso-1"
"""Name and version of the rule in `isolate`; part of every score's budget. A changed rule gets a new version."""

Rule = Literal["answer_tag", "boxed", "phrase", "none"]

# A span ends at the next marker, so that a megabyte of unclosed markers is still read in one pass.
LATENT_SEGMENT = re.compile(r"<latent>((?:[^<]|<(?!/?latent>))*)</latent>")
LATENT_SLOT = "<|latent_pad|>"
# Segments of the models that ours is compared with: Monet's, and LVR's, whose slots are chat tokens as well.
_OTHER_SEGMENTS = (
    re.compile(r"<abs_vis_token>(?:[^<]|<(?!/?abs_vis_token>))*</abs_vis_token>"),
    re.compile(r"<\|lvr_start\|>(?:[^<]|<(?!\|lvr_(?:start|end)\|>))*<\|lvr_end\|>"),
)
_CONTROL_TOKEN = re.compile(r"</?(?:latent|abs_vis_token|abs_vis_token_pad)>|<\|[^<>|]*\|>")

_ANY_CASE = re.IGNORECASE | re.ASCII
_REASONING_TAG = re.compile(r"<(/?)(?:think|analysis)>", _ANY_CASE)
_ANSWER_TAG = re.compile(r"<(/?)answer>", _ANY_CASE)
_ANSWER_PHRASE = re.compile(r"answer is|answer:", _ANY_CASE)
# Escaped braces are characters; the others nest.
_BRACE = re.compile(r"\\boxed\{|\\[\\{}]|[{}]")
_WRAPPED = re.compile(r"\\(?:text|mathrm)\{(.*)\}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Isolated:
    """What `isolate` cut out of an output."""

    text: str
    rule: Rule
    """What the answer was found by; ``none`` is the text unchanged."""
    answer_found: bool
    """False where nothing is left to be scored: nothing was said, or nothing after the reasoning or the mark."""
    unclosed_reasoning: bool
    """A tag of reasoning was opened and not closed, so reasoning may still be in `text`."""


def isolate(output: str) -> Isolated:
    """The answer in `output`, by the rule `ISOLATION`.

    Latent segments and control tokens go first, then everything up to the last closing tag of reasoning. The answer is
    what the first of these finds: the last complete ``<answer>``, the last ``\\boxed{}`` with balanced braces, the text
    after the last "answer is" or "answer:"; otherwise it is all that is left.
    """
    text = without_control_tokens(output)
    tags = list(_REASONING_TAG.finditer(text))
    closed = max((number for number, tag in enumerate(tags) if tag[1]), default=-1)
    unclosed = closed + 1 < len(tags)
    if closed >= 0:
        text = text[tags[closed].end() :]
    for rule, find in _FINDERS:
        found = find(text)
        if found is not None:
            return Isolated(found.strip(), rule, bool(found.strip()), unclosed)
    return Isolated(text.strip(), "none", bool(text.strip()), unclosed)


def answer_text(output: str) -> str:
    """The text of `isolate`; empty where nothing was said."""
    return isolate(output).text


def without_control_tokens(output: str) -> str:
    """`output` without latent segments, lone markers and chat tokens; other text is left as it is."""
    text = LATENT_SEGMENT.sub("", output)
    for segment in _OTHER_SEGMENTS:
        text = segment.sub("", text)
    return _CONTROL_TOKEN.sub("", text)


def _tagged(text: str) -> str | None:
    found, start = None, -1
    for tag in _ANSWER_TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start >= 0:
            found, start = (start, tag.start()), -1
    return text[slice(*found)] if found else None


def _boxed(text: str) -> str | None:
    """The content of the complete box that begins last, out of one ``\\text{}`` or ``\\mathrm{}`` around all of it."""
    boxes = _closed_boxes(text)
    if not boxes:
        return None
    content = text[slice(*max(boxes))].strip()
    wrapped = _WRAPPED.fullmatch(content)
    return wrapped[1] if wrapped and _balanced(wrapped[1]) else content


def _closed_boxes(text: str) -> list[tuple[int, int]]:
    """Start and end of the content of every box that is closed."""
    opened: list[int | None] = []
    boxes = []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(None)
        elif len(brace[0]) > 2:
            opened.append(brace.end())
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start is not None:
                boxes.append((start, brace.start()))
    return boxes


def _balanced(text: str) -> bool:
    depth = 0
    for brace in _BRACE.finditer(text):
        depth += (brace[0][-1] == "{" and len(brace[0]) != 2) - (brace[0] == "}")
        if depth < 0:
            return False
    return depth == 0


def _after_phrase(text: str) -> str | None:
    phrases = list(_ANSWER_PHRASE.finditer(text))
    return text[phrases[-1].end() :].strip().removeprefix(":") if phrases else None


_FINDERS: tuple[tuple[Rule, Callable[[str], str | None]], ...] = (
    ("answer_tag", _tagged),
    ("boxed", _boxed),
    ("phrase", _after_phrase),
)


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
