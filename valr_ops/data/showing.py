"""A record for people: as lines of a terminal, and as pictures with what its steps look at drawn on them.

In: a record with or without the bytes of its images, and decoded pictures. Out: a rich grid, and pictures large enough
to look at, each with its boxes outlined and numbered by step and a legend below.
Always: texts of a record are shown as they are, never read as markup; steps count from 1 as people do, images from 0 as
the data does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from rich.table import Table
from rich.text import Text

from valr_ops.data.corpus import CorpusRecord, ImageReference
from valr_ops.data.records import Box, Image, Record, Step, Target

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00")
"""Of the steps in turn; told apart by people who see fewer colours, too (Okabe and Ito)."""

_LEAST_SIDE, _MOST_SIDE = 600, 1280
"""Longer side in pixels of a picture with targets; a smaller one is enlarged by a whole number."""
_LEAST_WIDTH = 900
"""Of a picture with its legend."""
_MARGIN = 12
_FONT_PIXELS = 15
_LINE = 22
_LEGEND_CHARACTERS = 300
_TEXT_CHARACTERS = 600


def target_in_words(target: Target | None) -> str:
    """What a step looks at and who says so, in one line."""
    if target is None:
        return "no target"
    box = f"box {list(target.box)}" if target.box else "all of it"
    origin = {
        "dataset": "stated by the data",
        "crop": "a region that the data names",
        "only_image": "the only image",
        "matched": f"matched by {target.by}",
    }[target.origin]
    return f"image {target.image}, {box} ({origin})"


def shown_text(text: str, limit: int = _TEXT_CHARACTERS) -> Text:
    """A text of a record for a cell: its line breaks visible, what is beyond `limit` characters counted."""
    cut = text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit} characters more)"
    return Text(cut.replace("\r", "").replace("\n", "⏎ "))


def describe(record: Record | CorpusRecord, digests: bool = False) -> Table:
    """A grid of two columns with everything that a record holds.

    Args:
        digests: also the first twelve digits of each image's digest.
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("id", Text(record.id, style="bold"))
    scene = f" · scene {record.scene}" if record.scene else ""
    grid.add_row("is", Text(f"{record.split} · {record.kind} · licence {record.license}{scene}"))
    images: Sequence[Image | ImageReference] = record.images
    for number, image in enumerate(images):
        digest = f" · {image.digest[:12]}" if digests else ""
        role = "shown with the question" if image.role == "input" else "stands in the reasoning, never shown"
        grid.add_row(f"image {number}", Text(f"{image.width} x {image.height} · {role}{digest}"))
    grid.add_row("question", shown_text(record.question))
    for number, step in enumerate(record.steps, start=1):
        target = Text(f"→ {target_in_words(step.target)}", style="dim" if step.target is None else "cyan")
        grid.add_row(f"step {number}", Text("\n").join((shown_text(step.text), target)))
    grid.add_row("answer", shown_text(record.answer))
    return grid


def targets_of(image: int, steps: tuple[Step, ...]) -> dict[int, tuple[Box | None, str]]:
    """By number of the step, from 1: the box and the text of those steps that look at an image."""
    return {
        number: (step.target.box, step.text)
        for number, step in enumerate(steps, start=1)
        if step.target is not None and step.target.image == image
    }


def with_targets(picture: PIL.Image.Image, targets: Mapping[int, tuple[Box | None, str]]) -> PIL.Image.Image:
    """The picture with each box outlined and numbered, a frame for a step that looks at all of it, and a legend.

    Args:
        picture: RGB, of any size.
        targets: box in its pixels, or None for all of it, and a text for the legend, by the number to draw.
    """
    longer = max(picture.size)
    scale = -(-_LEAST_SIDE // longer) if longer < _LEAST_SIDE else min(1.0, _MOST_SIDE / longer)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    resampling = PIL.Image.Resampling.NEAREST if scale >= 1 else PIL.Image.Resampling.LANCZOS
    font = _font()
    frames = [number for number, (box, _) in targets.items() if box is None]
    around = _MARGIN + 5 * min(len(frames), 6)
    legend = [_legend_line(number, *target) for number, target in targets.items()] or ["no step looks at this image"]
    width = max(size[0] + 2 * around, _LEAST_WIDTH)
    height = size[1] + 2 * around
    sheet = PIL.Image.new("RGB", (width, height + _LINE * len(legend) + _MARGIN), "white")
    sheet.paste(picture.resize(size, resampling), (around, around))
    draw = PIL.ImageDraw.Draw(sheet)

    for depth, number in enumerate(frames[:6]):
        out = 4 + 5 * depth
        corners = (around - out, around - out, around + size[0] + out - 1, around + size[1] + out - 1)
        draw.rectangle(corners, outline=_colour(number), width=3)
    badges: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, (box, _) in targets.items():
        if box is None:
            badges[around, around].append(number)
            continue
        x0, y0, x1, y1 = (around + round(side * scale) for side in box)
        # A light line on either side keeps the outline visible on any ground.
        draw.rectangle((x0 - 1, y0 - 1, x1, y1), outline="white", width=5)
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=_colour(number), width=3)
        badges[x0, y0].append(number)
    for (x, y), numbers in badges.items():
        for number in numbers:
            x = _badge(draw, font, x, y, number)
    for line, (text, number) in enumerate(zip(legend, targets or [0], strict=True)):
        at = height + _LINE * line
        start = _badge(draw, font, _MARGIN, at, number) + 6 if targets else _MARGIN
        draw.text((start, at + 1), _fitted(text, font, width - start - _MARGIN), fill="black", font=font)
    return sheet


def _legend_line(number: int, box: Box | None, text: str) -> str:
    region = "all of it" if box is None else f"{list(box)}"
    return f"{region} · {' '.join(text[:_LEGEND_CHARACTERS].split())}"


def _badge(draw: PIL.ImageDraw.ImageDraw, font: PIL.ImageFont.FreeTypeFont, x: int, y: int, number: int) -> int:
    """A number on its step's colour, at the corner x, y; where the next one may begin."""
    width = round(font.getlength(str(number))) + 10
    draw.rectangle((x, y, x + width - 1, y + _LINE - 4), fill=_colour(number), outline="white")
    draw.text((x + 5, y), str(number), fill="white", font=font)
    return x + width


def _fitted(text: str, font: PIL.ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _colour(number: int) -> str:
    return COLOURS[(number - 1) % len(COLOURS)]


@cache
def _font() -> PIL.ImageFont.FreeTypeFont:
    # matplotlib brings a font with Latin, Greek and Cyrillic letters; Pillow's own has fewer.
    return PIL.ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), _FONT_PIXELS)


def write_pictures(
    folder: Path, prefix: str, pictures: Iterator[PIL.Image.Image], steps: tuple[Step, ...]
) -> list[Path]:
    """Write a record's pictures, in the order of its images, with the targets of its steps drawn.

    Args:
        folder: made if it is not there.
        prefix: what the file names begin with.

    Returns:
        the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, picture in enumerate(pictures):
        files.append(folder / f"{prefix}image_{number}.png")
        with_targets(picture, targets_of(number, steps)).save(files[-1])
    return files
