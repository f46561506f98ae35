"""Who answers: a model of ours, any local vision-language model, or an endpoint, behind one function.

In: a batch of prompts, images and words. Out: one `Said` a prompt, in order.
Always: what an answer was allowed, its `Budget`, is known before the first question is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import PIL.Image

Prompt = tuple[list[PIL.Image.Image], str]


@dataclass(frozen=True)
class Said:
    """One generated answer, or the reason why there is none."""

    text: str
    """Everything generated, control tokens included; empty where `error` is not."""
    text_tokens: int
    """Tokens outside latent segments."""
    finish_reason: str
    """`stop`, `length`, `length_in_segment`, or `error`."""
    segments: int = 0
    latent_steps: int = 0
    """Slots fed."""
    seconds: float = 0.0
    """From the question to the end of the answer; answers of a batch share them."""
    error: str = ""
    """Why nothing was said; such an item is asked again by the next run and never counts as answered."""


Generate = Callable[[list[Prompt]], Sequence[Said]]
"""One answer a prompt, in order."""
