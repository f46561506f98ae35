"""What a record can't tell about itself: seen before, shown by a benchmark, or of a licence that is not wanted.

In: `Keys`, a few hundred bytes for every record that a reader yielded, test records included, in corpus order. Out: for
each of them None or a reason code with a detail.
Always: of equal records the first stays; what was rejected makes no other record a duplicate; the benchmarks are those
of the recipe and the test splits of the sources themselves.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from valr_ops.data.images import ImageLimits, read_image
from valr_ops.data.likeness import NO_LOOK, Looks, alike, as_looks, look_of, pairs_alike
from valr_ops.data.records import BadRecord, Record, SourceError
from valr_ops.recipe.recipe import DataRecipe
from valr_ops.store.objects import Files, StorageError, open_files, refuse_links

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_LISTS = {"scenes.txt", "questions.txt"}
_MAX_LIST_BYTES = 64 * 2**20
_WORDS = re.compile(r"\w+")

COMMERCIAL = re.compile(
    r"(apache-2\.0|mit|bsd(-[234]-clause)?|isc|cc0-1\.0|cc-by-(2\.0|2\.5|3\.0|4\.0)|cc-by-sa-(2\.0|2\.5|3\.0|4\.0)"
    r"|odc-by(-1\.0)?|pddl(-1\.0)?|cdla-permissive-[12]\.0|unlicense|public[ -]domain)",
    re.IGNORECASE,
)
"""Licences that are known to allow commercial use."""

NON_COMMERCIAL = re.compile(
    r"(cc-by-nc(-sa)?-(2\.0|2\.5|3\.0|4\.0)|dinov3|qwen-research|[a-z0-9 -]*research[a-z0-9 -]*)", re.IGNORECASE
)
"""Licences that are known to allow training for research."""


def license_allows(license: str, policy: str) -> bool:
    """Whether records of a licence may be used under a ``data.license_policy``; an unknown licence only under `any`."""
    if policy == "any":
        return True
    commercial = COMMERCIAL.fullmatch(license.strip()) is not None
    return commercial or (policy == "non_commercial_ok" and NON_COMMERCIAL.fullmatch(license.strip()) is not None)


def normalised_question(text: str) -> str:
    """Letters and digits in lower case, one space between words."""
    return " ".join(_WORDS.findall(text.casefold()))


@dataclass(frozen=True)
class RecordKey:
    """Digests by which records are compared."""

    content: bytes
    """Of images, question and answer as they are, 16 bytes."""
    question: bytes
    """Of the normalised question, 16 bytes."""
    asked: bytes
    """Of normalised question and answer and the number of images, 16 bytes."""


def record_key(record: Record) -> RecordKey:
    """The digests of one record."""
    images = ",".join([image.digest for image in record.images])
    question = normalised_question(record.question)
    return RecordKey(
        # With its length in front, no question can run into an answer.
        content=_digest(f"{images} {len(record.question)} {record.question}{record.answer}"),
        question=_digest(question),
        asked=_digest(f"{question}\n{normalised_question(record.answer)}\n{len(record.images)}"),
    )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class ImageTable:
    """The distinct images of all sources, numbered in the order in which they were met."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._looks = bytearray()

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, digest: str, look: Callable[[], bytes | None]) -> int:
        """The number of an image; one that is new is looked at."""
        key = bytes.fromhex(digest)
        if key not in self._numbers:
            self._looks += look() or NO_LOOK
            self._numbers[key] = len(self._numbers)
        return self._numbers[key]

    @property
    def digests(self) -> list[bytes]:
        """By number, 32 bytes each."""
        return list(self._numbers)

    @property
    def looks(self) -> Looks:
        """By number."""
        return as_looks(bytes(self._looks))


@dataclass
class Keys:
    """What is compared of every record, in columns."""

    images: ImageTable = field(default_factory=ImageTable)
    ids: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    tests: list[bool] = field(default_factory=list)
    licenses: list[str] = field(default_factory=list)
    scenes: list[str | None] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    questions: list[bytes] = field(default_factory=list)
    asked: list[bytes] = field(default_factory=list)
    shown: list[tuple[int, ...]] = field(default_factory=list)
    """Numbers of the record's images in `images`."""

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, record: Record) -> None:
        """One record, its images looked at."""
        key = record_key(record)
        shown = tuple(self.images.number(image.digest, partial(look_of, image.data)) for image in record.images)
        about = ([record.id], [record.source], [record.split == "test"], [record.license], [record.scene])
        self.extend(about, ([key.content], [key.question], [key.asked]), [shown])

    def extend(self, about: Iterable[list[Any]], digests: Iterable[list[Any]], shown: list[tuple[int, ...]]) -> None:
        """Many records, column by column.

        Args:
            about: ids, sources, whether they are test records, licences, scenes.
            digests: the fields of their `RecordKey`s.
            shown: numbers of their images.
        """
        columns: tuple[list[Any], ...] = (self.ids, self.sources, self.tests, self.licenses, self.scenes)
        digest_columns: tuple[list[Any], ...] = (self.contents, self.questions, self.asked)
        for column, values in zip((*columns, *digest_columns, self.shown), (*about, *digests, shown), strict=True):
            column += values


@dataclass(frozen=True)
class Benchmarks:
    """What no training record may show."""

    images: Mapping[bytes, str] = field(default_factory=dict)
    """SHA-256 of an image to its name, ``benchmark/path``."""
    looks: Looks = field(default_factory=lambda: as_looks(b""))
    """Of the same images, in the same order."""
    scenes: Mapping[str, str] = field(default_factory=dict)
    """Scene id to the benchmark's name."""
    questions: Mapping[bytes, str] = field(default_factory=dict)
    """Digest of a normalised question that is asked once and long enough, to the benchmark's name."""


def read_benchmarks(recipe: DataRecipe) -> Benchmarks:
    """Images, scenes and questions below the folders that the recipe names.

    Raises:
        SourceError: a folder that is missing or holds none of the three, a link that would be left out, an image that
            can't be decoded, or a list that is not UTF-8.
    """
    images: dict[bytes, str] = {}
    looks = bytearray()
    scenes: dict[str, str] = {}
    questions: dict[bytes, str] = {}
    for name, benchmark in recipe.benchmarks.items():
        files = open_files(benchmark.path)
        try:
            names, left_out = files.listed()
            useful = (*_IMAGE_SUFFIXES, "/")
            refuse_links(files.location, [one for one in left_out if one.lower().endswith(useful) or one in _LISTS])
            pictures = [one for one in names if one.lower().endswith(_IMAGE_SUFFIXES)]
            if not pictures and not _LISTS & set(names):
                raise StorageError(f"{benchmark.path} holds no image, no scenes.txt and no questions.txt")
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                looked_at = threads.map(partial(_looked_at, files, recipe), pictures)
                for picture, (digest, seen) in zip(pictures, looked_at, strict=True):
                    if digest not in images:
                        images[digest] = f"{name}/{picture}"
                        looks += seen or NO_LOOK
            scenes |= dict.fromkeys(_lines(files, "scenes.txt", names), name)
            asked = Counter(normalised_question(line) for line in _lines(files, "questions.txt", names))
            questions |= _telling(asked, recipe, name)
        except (StorageError, BadRecord) as error:
            raise SourceError(
                f"benchmark {name!r}: {error}; correct data.benchmarks.{name}.path, or the file"
            ) from None
    return Benchmarks(images, as_looks(bytes(looks)), scenes, questions)


def _looked_at(files: Files, recipe: DataRecipe, name: str) -> tuple[bytes, bytes | None]:
    image = read_image(files, name, "input", ImageLimits(1, recipe.max_image_pixels), "benchmark image")
    return bytes.fromhex(image.digest), look_of(image.data)


def _lines(files: Files, name: str, names: Sequence[str]) -> list[str]:
    if name not in names:
        return []
    try:
        # A byte order mark is no part of the first line.
        text = files.read(name, _MAX_LIST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StorageError(f"{name} is not UTF-8 (byte {error.start})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _telling(asked: Mapping[str, int], recipe: DataRecipe, name: str) -> dict[bytes, str]:
    """Questions that betray one item: asked once, and no template of a few words."""
    least = recipe.benchmark_question_words
    telling = (question for question, times in asked.items() if times == 1 and question.count(" ") + 1 >= least)
    return {_digest(question): name for question in telling}


def decide(keys: Keys, recipe: DataRecipe, benchmarks: Benchmarks | None = None) -> list[tuple[str, str] | None]:
    """Why each record is left out, or None: reason code and detail.

    Args:
        keys: all records that the readers yielded, in corpus order; test records are compared among themselves only.
        recipe: licence policy and bounds on likeness.
        benchmarks: beside the images of the sources' own test records; None for only those. A test split asks its
            questions in the same words as its training split, so they betray nothing.
    """
    given = benchmarks or Benchmarks()
    of_image = _benchmark_images(keys, recipe, given)
    ids: dict[bool, dict[str, int]] = {False: {}, True: {}}
    contents: dict[bool, dict[bytes, int]] = {False: {}, True: {}}

    def reason(row: int) -> tuple[str, str] | None:
        test = keys.tests[row]
        if keys.ids[row] in ids[test]:
            return "duplicate_id", f"an earlier record has the id {keys.ids[row]}"
        if keys.contents[row] in contents[test]:
            same = keys.ids[contents[test][keys.contents[row]]]
            return "duplicate_content", f"same images, question and answer as {same}"
        if test:
            return None
        if not license_allows(keys.licenses[row], recipe.license_policy):
            return "licence_blocked", f"{keys.licenses[row]} under data.license_policy={recipe.license_policy}"
        scene = keys.scenes[row]
        if scene is not None and scene in given.scenes:
            return "benchmark_scene", f"scene {scene} is in {given.scenes[scene]}"
        for place, number in enumerate(keys.shown[row]):
            if number in of_image:
                return "benchmark_image", f"image {place} is {of_image[number]}"
        if keys.questions[row] in given.questions:
            return "benchmark_question", f"the question is asked by {given.questions[keys.questions[row]]}"
        return None

    reasons: list[tuple[str, str] | None] = []
    for row in range(len(keys)):
        reasons.append(reason(row))
        if reasons[row] is None:
            ids[keys.tests[row]][keys.ids[row]] = row
            contents[keys.tests[row]][keys.contents[row]] = row
    for row, earlier in _near(keys, reasons, recipe):
        if reasons[earlier] is None:
            same = keys.ids[earlier]
            reasons[row] = "near_duplicate", f"same question and answer, and images that look the same, as {same}"
    return reasons


def _benchmark_images(keys: Keys, recipe: DataRecipe, given: Benchmarks) -> dict[int, str]:
    """Number of each image that a benchmark or a test record shows, with what shows it."""
    shown_by: dict[int, str] = {}
    for row in np.flatnonzero(keys.tests).tolist():
        for number in keys.shown[row]:
            shown_by.setdefault(number, f"an image of the test record {keys.ids[row]}")
    looks = keys.images.looks
    if not shown_by and not given.images:
        return {}
    for number, digest in enumerate(keys.images.digests):
        if digest in given.images:
            shown_by.setdefault(number, given.images[digest])
    names = list(given.images.values())
    tested = sorted(shown_by)
    known = np.concatenate([given.looks, looks[tested]])
    names += [shown_by[number] for number in tested]
    similar = alike(looks, known, recipe.benchmark_image_bits)
    for number in np.flatnonzero(similar >= 0).tolist():
        shown_by.setdefault(number, f"alike to {names[similar[number]]}")
    return shown_by


def _near(keys: Keys, reasons: Sequence[tuple[str, str] | None], recipe: DataRecipe) -> Iterator[tuple[int, int]]:
    """Pairs (later, earlier) of kept records with equal question and answer whose images all look alike; sorted."""
    if recipe.near_duplicate_bits is None:
        return
    bits = recipe.near_duplicate_bits
    by_asked: dict[bytes, list[int]] = defaultdict(list)
    for row, asked in enumerate(keys.asked):
        if reasons[row] is None and not keys.tests[row]:
            by_asked[asked].append(row)
    groups = [rows for rows in by_asked.values() if len(rows) > 1]
    if not groups:
        return
    rows = np.array([row for group in groups for row in group], dtype=np.int64)
    group_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    looks = keys.images.looks
    first_images = looks[[keys.shown[row][0] for row in rows]]
    pairs = {(int(rows[later]), int(rows[earlier])) for earlier, later in pairs_alike(group_of, first_images, bits)}
    for row, earlier in sorted(pairs):
        if _all_alike(keys.shown[earlier], keys.shown[row], looks, bits):
            yield row, earlier


def _all_alike(one: Sequence[int], other: Sequence[int], looks: Looks, bits: int) -> bool:
    """Whether two records' images look the same, place by place; an image without a look only equals itself."""
    for first, second in zip(one, other, strict=True):
        if first == second:
            continue
        if not looks[first].any() or not looks[second].any():
            return False
        if int(np.bitwise_count(looks[first] ^ looks[second]).sum()) > bits:
            return False
    return True


def image_groups(shown: Sequence[Sequence[int]], scenes: Sequence[str | None], images: int) -> list[int]:
    """For each record the smallest number of an image of its group: records that share an image or a scene, directly or
    through others.

    Args:
        shown: numbers of each record's images.
        scenes: of each record, or None.
        images: number of images there are.
    """
    parent = list(range(images))
    last_of_scene: dict[str, int] = {}

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def join(numbers: Iterable[int]) -> None:
        for one, other in pairwise(numbers):
            low, high = sorted((root(one), root(other)))
            parent[high] = low

    for numbers, scene in zip(shown, scenes, strict=True):
        join(numbers)
        if scene is not None:
            join((last_of_scene.setdefault(scene, numbers[0]), numbers[0]))
    return [root(numbers[0]) for numbers in shown]
