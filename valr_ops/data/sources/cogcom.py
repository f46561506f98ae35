"""CogCoM's chains of manipulations: webdataset tars of images and trees of steps, in pickles that are never unpickled.

In: ``*.tar`` (also ``.tar.gz``, ``.tgz``). Members with the same name up to its first dot are one key and stand beside
each other: an image (``.png``, ``.jpg``, ``.jpeg``) and metadata (``.pyd``), in any order; members of other kinds are
passed over. The metadata is one question or a list of questions about the image, each with ``question``, ``answer`` and
``final_com``, which maps an edge ``"level,order--level,order"`` of a tree to the step at its end: ``func``, ``param``,
``variables``, ``onbox``, ``desc``, ``found`` (THUDM/CogCoM, cogcom/data/convert_to_wds.py and ann_visual.py).
Out: an interleaved record a question.
Always: the tree becomes one chain, the shortest from the root to a leaf whose step found the answer, among equals the
first by its edge keys. A step looks at the region of the original image that it grounds, or else works on, also within
a crop of it. The public code shows that crop twice as large, which a teacher's own resizing undoes, so none is written.
No more than one key is held in memory, and of a key that is not wanted here not its image.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from valr_ops.data.records import (
    BadRecord,
    Box,
    Image,
    Record,
    Step,
    Target,
    check_box,
    check_text,
    is_finite_number,
    shortened,
)
from valr_ops.data.sources import plain_pickle
from valr_ops.data.sources.reading import Reading, Row, Wanted, mapping_of, required, split_of, tar_members

LICENSE = "unknown"
"""Code and models have licences, the data states none."""

_SHARDS = (".tar", ".tar.gz", ".tgz")
_IMAGES = (".png", ".jpg", ".jpeg")
_METADATA = (".pyd",)
_MOST_METADATA_BYTES = 2**20
_MOST_QUESTIONS = 64

_EDGE = re.compile(r"(-1|\d{1,6}),(\d{1,6}|\*)--(\d{1,6}),(\d{1,6})", re.ASCII)
_NAME = re.compile(r"[a-z]+_\d{1,6}", re.ASCII)
_QUOTED = re.compile(r"`([a-z]+_\d{1,6})`", re.ASCII)


@dataclass
class _Key:
    """What was read of one key so far; a part that can't be used is the reason against it."""

    name: str
    first: int
    """Number of its first row."""
    image: Image | bytes | BadRecord | None = None
    metadata: Any = field(
        default_factory=lambda: BadRecord("schema_mismatch", "metadata: no .pyd member beside the image")
    )
    seen: set[tuple[str, ...]] = field(default_factory=set)

    def rows(self, shard: str, reading: Reading) -> Iterator[Row]:
        """A row for each question; one for a key without a list of them."""
        prefix = shard.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
        where, identity, split = f"{shard} key {shortened(self.name)}", f"{prefix}/{self.name}", split_of(shard)
        if not isinstance(self.metadata, list):
            yield Row(self.first, where, split, partial(self._loaded, identity, self.metadata, reading))
            return
        for index, question in enumerate(self.metadata):
            load = partial(self._loaded, f"{identity}/{index}", question, reading)
            yield Row(self.first + index, f"{where} question {index}", split, load)

    def _loaded(self, identity: str, metadata: Any, reading: Reading) -> dict[str, Any]:
        # Decoded for the first question about it.
        if not isinstance(self.image, Image | BadRecord):
            try:
                self.image = reading.embedded(self.image, "input", "image")
            except BadRecord as bad:
                self.image = bad
        return {"key": identity, "image": self.image, "metadata": metadata}


def rows(reading: Reading, wanted: Wanted) -> Iterator[Row]:
    """The questions of all shards; a shard named ``test...`` or ``val...`` is of that split.

    Raises:
        SourceError: no tar file, or one that can't be read to its end.
    """
    number = 0
    for shard in reading.names(*_SHARDS):
        key: _Key | None = None
        for member, read in tar_members(reading, shard):
            part = next((one for one in (_IMAGES, _METADATA) if member.lower().endswith(one)), None)
            if part is None:
                continue
            name = member[: member.index(".", member.rfind("/") + 1)]
            if key is None or key.name != name:
                for row in key.rows(shard, reading) if key else ():
                    yield row
                    number += 1
                key = _Key(name, number)
            again = part in key.seen
            key.seen.add(part)
            if part is _METADATA:
                # How many questions there are everyone has to know, to number the rows alike.
                key.metadata = _second(member) if again else _questions(read)
            elif any(map(wanted, range(number, number + _MOST_QUESTIONS))):
                key.image = _second(member) if again else _image_bytes(read, reading)
        for row in key.rows(shard, reading) if key else ():
            yield row
            number += 1


def _second(member: str) -> BadRecord:
    return BadRecord("schema_mismatch", f"{shortened(member)}: a second member of its kind")


def _image_bytes(read: Callable[[int, str], bytes], reading: Reading) -> bytes | BadRecord:
    try:
        return read(8 * reading.recipe.max_image_pixels + 2**20, "image_too_large")
    except BadRecord as bad:
        return bad


def _questions(read: Callable[[int, str], bytes]) -> Any:
    try:
        metadata = plain_pickle.loads(read(_MOST_METADATA_BYTES, "schema_mismatch"), max_bytes=_MOST_METADATA_BYTES)
    except BadRecord as bad:
        return bad
    except plain_pickle.UnsafePickleError as error:
        return BadRecord("unsafe_pickle", f"metadata: {error}")
    except plain_pickle.BrokenPickleError as error:
        return BadRecord("schema_mismatch", f"metadata: no whole pickle: {error}")
    if isinstance(metadata, list) and not 1 <= len(metadata) <= _MOST_QUESTIONS:
        return BadRecord("schema_mismatch", f"metadata: {len(metadata)} questions, 1 to {_MOST_QUESTIONS} are allowed")
    return metadata


def identity(raw: Mapping[str, Any], row: Row, reading: Reading) -> str:
    """Shard and key, for a key is unique in its shard only; from a list of questions also the place in it."""
    return f"{reading.source}/{check_text(raw['key'], 'key', 'schema_mismatch')}"


def record(raw: Mapping[str, Any], row: Row, identity: str, reading: Reading) -> Record:
    """The interleaved record of one question."""
    for part in (raw["metadata"], raw["image"]):
        if isinstance(part, BadRecord):
            raise part
    metadata = mapping_of(raw["metadata"])
    question = check_text(required(metadata, "question"), "question", "empty_question")
    answer = check_text(required(metadata, "answer"), "answer", "empty_answer")
    chain = _chain(required(metadata, "final_com"))
    image = raw["image"]
    return reading.record(
        row,
        identity,
        license=reading.license(LICENSE),
        kind="interleaved",
        question=question,
        images=(image,),
        steps=tuple(_steps(chain, image, reading.recipe.min_image_side)),
        answer=answer,
    )


def _chain(tree: object) -> list[tuple[str, dict[str, Any]]]:
    """The edges of the shortest path from the root to a leaf that found the answer, with their steps.

    The root is ``0,0``, or above level 0 where an edge comes from level -1. ``*`` as the order of a parent stands for
    all nodes of that level, as in the public generator.
    """
    if not isinstance(tree, dict) or not tree:
        raise BadRecord("schema_mismatch", f"final_com: expected edges with steps, found {shortened(tree)}")

    def invalid(what: str) -> BadRecord:
        return BadRecord("step_tree_invalid", f"final_com: {what}")

    ends: dict[str, tuple[int, int]] = {}
    below: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    below_level: defaultdict[int, list[str]] = defaultdict(list)
    for edge, step in tree.items():
        match = _EDGE.fullmatch(edge) if isinstance(edge, str) else None
        if match is None:
            raise invalid(f"{shortened(edge)!r} is no edge level,order--level,order")
        level, end = int(match[1]), (int(match[3]), int(match[4]))
        if end[0] <= level:
            raise invalid(f"{edge!r} leads back up, which would close a cycle")
        if not isinstance(step, dict) or not isinstance(step.get("found"), bool):
            raise BadRecord("schema_mismatch", f"final_com[{edge}]: expected a step with found, true or false")
        ends[edge] = end
        if match[2] == "*" or level == -1:
            below_level[level].append(edge)
        else:
            below[level, int(match[2])].append(edge)
    if len(set(ends.values())) < len(ends):
        raise invalid("a step has two parents")

    root = (-1, 0) if -1 in below_level else (0, 0)
    levels_with_children = set(below_level)
    came_by: dict[tuple[int, int], tuple[str, tuple[int, int]]] = {}
    answer: tuple[int, int] | None = None
    waiting = deque([root])
    # Breadth first and sorted: the first leaf that found the answer ends the path looked for.
    while waiting:
        node = waiting.popleft()
        leaf = node not in below and node[0] not in levels_with_children
        if leaf and answer is None and node in came_by and tree[came_by[node][0]]["found"]:
            answer = node
        # The first node of a level is the best parent of what has the whole level for parents.
        for edge in sorted(below.get(node, []) + below_level.pop(node[0], [])):
            came_by[ends[edge]] = edge, node
            waiting.append(ends[edge])
    orphans = [edge for edge, end in ends.items() if end not in came_by]
    if orphans:
        raise invalid(f"no path from the root leads to {min(orphans)!r}")
    if answer is None:
        raise BadRecord("no_found_path", f"final_com: none of {len(tree)} steps is a leaf that found the answer")
    path = []
    node = answer
    while node != root:
        edge, node = came_by[node]
        path.append((edge, tree[edge]))
    return path[::-1]


def _steps(chain: list[tuple[str, dict[str, Any]]], image: Image, min_side: int) -> Iterator[Step]:
    """The texts of a chain, each with the region that it looks at."""
    values: dict[str, Any] = {}
    regions: dict[str, list[Any]] = {}  # The boxes that a bbx_ variable holds, or that an img_ variable was cut along.
    for edge, step in chain:
        where = f"final_com[{edge}]"
        variables = required(step, "variables") or {}
        if not isinstance(variables, dict) or not all(isinstance(name, str) for name in variables):
            raise BadRecord(
                "schema_mismatch", f"{where}.variables: expected names and values, found {shortened(variables)}"
            )
        # Where nothing was executed, the public generator leaves a variable's own name as its value.
        boxes = {
            name: _boxes(None if value == name else value, f"{where}.variables.{name}")
            for name, value in variables.items()
            if name.startswith("bbx")
        }
        grounded = [box for name in boxes if name not in values for box in boxes[name]]
        # The public generator repeats in a step what it works on, cut down to the box of this branch of the tree.
        regions.update((name, found) for name, found in boxes.items() if found)

        onbox, named = required(step, "onbox"), _named(required(step, "param"), f"{where}.param")
        if isinstance(onbox, str):
            if not _NAME.fullmatch(onbox):
                raise BadRecord(
                    "schema_mismatch", f"{where}.onbox: {shortened(onbox)!r} is neither a variable nor a box"
                )
            named.insert(0, onbox)
        _refuse_undefined(named, {*values, *(name for name in variables if variables[name] is not None)}, where)
        worked_on = [] if isinstance(onbox, str) else _boxes(onbox, f"{where}.onbox")
        worked_on = worked_on or next((regions[name] for name in named if name in regions), [])
        regions.update((name, worked_on) for name in variables if name.startswith("img") and name not in values)
        values.update(variables)

        text = required(step, "desc")
        if isinstance(text, str):
            _refuse_undefined(_QUOTED.findall(text), values, where)
            text = _QUOTED.sub(lambda quoted: _shown(values[quoted[1]], quoted), text)
        box = _enclosing(grounded or worked_on, image, where, min_side)
        target = None if box is None else Target(0, box, "crop")
        yield Step(check_text(text, f"{where}.desc", "empty_reasoning"), target)


def _named(value: object, where: str) -> list[str]:
    """The variables that a field names: it is one, quotes some, or is a list of such."""
    if value is None or is_finite_number(value):
        return []
    if isinstance(value, str):
        return [value] if _NAME.fullmatch(value) else _QUOTED.findall(value)
    if isinstance(value, list | tuple):
        flat = [one for part in value for one in (part if isinstance(part, list | tuple) else [part])]
        if all(isinstance(one, str) or is_finite_number(one) for one in flat):
            return [name for one in flat for name in _named(one, where)]
    raise BadRecord("schema_mismatch", f"{where}: expected a text, numbers or a list of them, found {shortened(value)}")


def _refuse_undefined(names: Iterable[str], defined: Container[str], where: str) -> None:
    for name in names:
        if name not in defined:
            raise BadRecord("undefined_variable", f"{where}: no step before it makes {name}")


def _boxes(value: object, where: str) -> list[Any]:
    """One box, a list of boxes or nothing as a list of boxes, not yet looked into."""
    if value is None:
        return []
    if isinstance(value, list | tuple):
        if all(isinstance(one, list | tuple) for one in value):
            return list(value)
        if not any(isinstance(one, list | tuple | str) for one in value):
            return [value]
    raise BadRecord("schema_mismatch", f"{where}: expected a box or a list of boxes, found {shortened(value)}")


def _shown(value: object, quoted: re.Match[str]) -> str:
    """A text or number that a step read, in place of the variable's name."""
    return str(value) if isinstance(value, str) or is_finite_number(value) else quoted[0]


def _enclosing(boxes: list[Any], image: Image, where: str, min_side: int) -> Box | None:
    """The region around all boxes, which are in pixels of the original image."""
    for box in boxes:
        if len(box) == 4 and all(is_finite_number(value) and 0 <= value <= 1 for value in box):
            raise BadRecord("bbox_invalid", f"{where}: {shortened(box)} are fractions of the sides, expected pixels")
    corners = [check_box(box, image.width, image.height, where, 1) for box in boxes]
    if not corners:
        return None
    x0, y0, x1, y1 = zip(*corners)
    region = check_box([min(x0), min(y0), max(x1), max(y1)], image.width, image.height, where, min_side)
    if region == (0, 0, image.width, image.height):
        raise BadRecord("crop_is_whole_image", f"{where}: {list(region)}")
    return region
