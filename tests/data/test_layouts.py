from __future__ import annotations

import pickle
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.made import context, digests, recipe
from valr_ops.data import sources, synthetic
from valr_ops.data.images import decode
from valr_ops.data.inventory import build_sources
from valr_ops.data.layouts import pickled
from valr_ops.data.records import Record
from valr_ops.data.synthetic import COLOURS
from valr_ops.recipe import recipes
from valr_ops.recipe.recipe import Recipe

FORMATS = sorted(sources.FORMATS)
SENTENCE = re.compile(r"(?:View (\d+), row|Row) (\d+): ([a-z ]+)\.")
ASKED = re.compile(r"Which colour is the last in row (\d+)(?: of view (\d+))?\?")
CELL = 16


def drawn_recipe(seed: int = 0, train_records: int = 48, **synthetic: int) -> Recipe:
    """One source of each format, called as the format."""
    sizes = {"train_records": train_records, "test_records": 16, **synthetic}
    made = recipe({name: {"format": name} for name in FORMATS}, synthetic=sizes)
    return made.model_copy(update={"seed": seed})


def built(folder: Path, made: Recipe) -> Path:
    build_sources(context(folder, "sources", made))
    return folder / "sources"


def read(name: str, made: Recipe, artifact: Path, split: Any = "train") -> list[Record]:
    items = list(sources.read_source(name, made, artifact, split))
    assert all(isinstance(item, Record) for item in items), [item for item in items if not isinstance(item, Record)][:1]
    return items  # type: ignore[return-value]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """48 training records of each format."""
    artifact = built(tmp_path_factory.mktemp("few"), drawn_recipe())
    return {name: read(name, drawn_recipe(), artifact) for name in FORMATS}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """400 training records of each format, drawn twice: with one seed and with another."""
    halves = []
    for seed in (0, 1):
        made = drawn_recipe(seed, train_records=400)
        artifact = built(tmp_path_factory.mktemp(f"many{seed}"), made)
        halves.append({name: read(name, made, artifact) for name in FORMATS})
    return halves[0], halves[1]


def said(text: str) -> list[tuple[int, int, list[str]]]:
    """View, row and colours of every sentence in a step; view and row from 0."""
    return [(int(view or 1) - 1, int(row) - 1, words.split()) for view, row, words in SENTENCE.findall(text)]


def row_colours(pixels: np.ndarray, row: int) -> list[str]:
    """The colour of each cell of a row, from the pixels alone."""
    colours = []
    for left in range(0, pixels.shape[1], CELL):
        cell = pixels[row * CELL : (row + 1) * CELL, left : left + CELL].reshape(-1, 3)
        here = [name for name in COLOURS if (cell == synthetic._RGB[name]).all(1).any()]
        assert len(here) == 1
        colours += here
    return colours


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_gives_others(tmp_path: Path) -> None:
    once, again = (digests(built(tmp_path / name, drawn_recipe())) for name in "ab")
    other = digests(built(tmp_path / "c", drawn_recipe(seed=1)))
    assert once == again
    same = {name for name in once if other.get(name) == once[name]} - {"benchmarks.json"}  # none in this recipe
    assert not same, "a file does not depend on the seed"


def test_two_sources_of_one_format_show_different_scenes(tmp_path: Path) -> None:
    made = recipe({name: {"format": "onethinker"} for name in ("one", "two")}, synthetic={"train_records": 20})
    artifact = built(tmp_path, made)
    one, two = ({record.images[0].digest for record in read(name, made, artifact)} for name in ("one", "two"))
    assert len(one | two) == 40


@pytest.mark.parametrize("name", FORMATS)
def test_every_drawn_record_is_read_in_order_with_a_sentence_and_a_target_a_row(
    few: dict[str, list[Record]], name: str
) -> None:
    size = drawn_recipe().data.synthetic
    scenes: Any
    if name == "gcot":
        scenes = synthetic.multi_view_scenes(0, f"{name}/train", 48, size)
    else:
        bounds = {"zebra_cot": (4, 4), "monet": (4, 4), "cogcom": (1, 3), "refocus": (2, 4), "visual_cot": (2, 2)}
        scenes = synthetic.scenes(0, f"{name}/train", 48, size, *bounds.get(name, (1, 4)))
    assert len(few[name]) == len(scenes)
    for record, scene in zip(few[name], scenes, strict=True):
        found = [match[0] for step in record.steps for match in SENTENCE.finditer(step.text)]
        assert found == list(scene.sentences) and record.answer == scene.answer
        assert record.question == (scene.asked if name == "visual_cot" else scene.question)
        assert all(step.target is not None and said(step.text) for step in record.steps)
        assert record.license == "Apache-2.0"
    kinds = {"gcot": "multi_view", "onethinker": "single_view", "jsonl": "single_view"}
    assert {record.kind for record in few[name]} == {kinds.get(name, "interleaved")}


@pytest.mark.parametrize("name", FORMATS)
def test_every_step_can_be_read_off_the_pixels_of_its_target(few: dict[str, list[Record]], name: str) -> None:
    for record in few[name]:
        for step in record.steps:
            assert step.target is not None
            target = record.images[step.target.image]
            pixels = np.asarray(decode(target.data, step.target.box))
            sentences = said(step.text)
            whole = pixels.shape[0] == 4 * CELL
            assert whole or pixels.shape[0] == CELL * len(sentences)
            for line, (view, row, colours) in enumerate(sentences):
                assert row_colours(pixels, row if whole else line) == colours
                if record.kind == "multi_view":
                    assert step.target.image == view


@pytest.mark.parametrize("name", FORMATS)
def test_every_answer_can_be_computed_from_the_question_and_the_pixels(few: dict[str, list[Record]], name: str) -> None:
    for record in few[name]:
        asked = ASKED.search(record.question)
        assert asked is not None
        view, row = int(asked[2] or 1) - 1, int(asked[1]) - 1
        assert record.images[view].role == "input"
        assert row_colours(np.asarray(decode(record.images[view].data)), row)[-1] == record.answer


def test_an_edited_picture_shows_only_its_row(few: dict[str, list[Record]]) -> None:
    for record in few["refocus"]:
        for step in record.steps:
            assert step.target is not None
            edited = np.asarray(decode(record.images[step.target.image].data))
            ((_, row, _),) = said(step.text)
            others = np.delete(edited, np.s_[row * CELL : (row + 1) * CELL], axis=0)
            assert others.max() < 64 < edited.max()


def test_no_scene_of_the_test_split_is_in_a_training_split(few: dict[str, list[Record]], tmp_path: Path) -> None:
    test = read("jsonl", drawn_recipe(), built(tmp_path, drawn_recipe()), "test")
    train = {image.digest for records in few.values() for record in records for image in record.images}
    shown = {record.images[0].digest for record in test}
    assert len(shown) == 16 and not train & shown


def test_views_of_one_scene_have_one_size_and_name_their_scene(few: dict[str, list[Record]]) -> None:
    assert {len(record.images) for record in few["gcot"]} == {2, 3}
    assert len({record.scene for record in few["gcot"]}) == 48 and None not in {one.scene for one in few["gcot"]}


def test_scale_tiny_draws_every_format_and_images_that_keep_their_size() -> None:
    tiny = recipes.tiny()
    drawn = {source.format for source in tiny.data.sources.values() if source.path is None}
    assert drawn == set(FORMATS)
    size = tiny.data.synthetic
    assert size.test_records == 256
    assert tiny.base.max_pixels is not None and size.rows * size.columns * size.cell_pixels**2 <= tiny.base.max_pixels


@pytest.mark.parametrize("name", FORMATS)
def test_other_sizes_of_the_grid_are_read_as_well(tmp_path: Path, name: str) -> None:
    sizes = {"rows": 2, "columns": 5, "cell_pixels": 12, "train_records": 12, "test_records": 4}
    made = recipe({name: {"format": name}}, synthetic=sizes)
    records = read(name, made, built(tmp_path, made))
    assert len(records) == 12 and {(one.images[0].width, one.images[0].height) for one in records} == {(60, 24)}


def test_a_tar_holds_no_time_and_no_owner_and_several_shards_are_read_in_order(tmp_path: Path) -> None:
    made = recipe({"cogcom": {"format": "cogcom"}}, synthetic={"train_records": 260})
    artifact = built(tmp_path, made)
    shards = sorted((artifact / "cogcom").iterdir())
    assert [shard.name for shard in shards] == ["train-00000.tar", "train-00001.tar"]
    for shard in shards:
        with tarfile.open(shard) as tar:
            owners = {(one.mtime, one.uid, one.gid, one.uname, one.gname, one.mode) for one in tar}
        assert owners == {(0, 0, 0, "", "", 0o644)}
    assert len(read("cogcom", made, artifact)) == 260


def test_what_is_written_as_a_pickle_is_one() -> None:
    value = {"a": [1, -(2**31), 2.5, None, True, False, "ä\n", (), ("x", 7)], "b": {}, "c": [], "d": "y" * 300}
    assert pickle.loads(pickled(value)) == value
    with pytest.raises(TypeError, match="set is no plain value"):
        pickled({"a": {1}})


# ----------------------------------------------------------------------------------------------------------------------
# A model that sees no picture. It knows the question, all steps before, and the words before the one to guess, each
# word by its place, so that it can copy, count and compare. The two halves are drawn with two seeds: a guess is then
# right with a probability of exactly 1/4 if text tells nothing, and the margin is that of a binomial distribution.

Example = tuple[tuple[str, ...], str]
Guesser = Callable[[list[Example], list[Example]], list[str]]


def naive_bayes(train: list[Example], test: list[Example]) -> list[str]:
    counts: dict[str, Counter[str]] = {label: Counter() for label in COLOURS}
    for tokens, label in train:
        counts[label].update(tokens)
    totals = Counter(label for _, label in train)

    def score(label: str, tokens: tuple[str, ...]) -> float:
        seen, total = counts[label], totals[label]
        return float(np.log(total + 1) + sum(np.log((seen[token] + 0.5) / (total + 1)) for token in tokens))

    return [max(COLOURS, key=lambda label: score(label, tokens)) for tokens, _ in test]


def least_squares(train: list[Example], test: list[Example]) -> list[str]:
    known = {token: i for i, token in enumerate(sorted({token for tokens, _ in train for token in tokens}))}

    def matrix(examples: list[Example]) -> np.ndarray:
        found = np.zeros((len(examples), len(known) + 1))
        found[:, -1] = 1.0
        for row, (tokens, _) in enumerate(examples):
            found[row, [known[token] for token in tokens if token in known]] = 1.0
        return found

    x = matrix(train)
    y = np.array([[float(label == colour) for colour in COLOURS] for _, label in train])
    weights = np.linalg.solve(x.T @ x + 10.0 * np.eye(x.shape[1]), x.T @ y)
    return [COLOURS[i] for i in (matrix(test) @ weights).argmax(1)]


GUESSERS: tuple[Guesser, ...] = (naive_bayes, least_squares)


def words(text: str, mark: str) -> list[str]:
    """A text's words as they are, by place, and together."""
    found = re.findall(r"\w+", text.lower())
    return [f"{mark}={' '.join(found)}", *(f"{mark}.{i}={word}" for i, word in enumerate(found)), *set(found)]


def next_words(records: list[Record]) -> list[Example]:
    """An example for every colour word of every step: all text before it, and the word."""
    examples: list[Example] = []
    for record in records:
        before = words(record.question, "question")
        earlier: list[list[str]] = []
        for step in record.steps:
            for view, row, colours in said(step.text):
                place = [f"view={view}", f"row={row}"]
                steps = [
                    f"{back} back.{i}={word}"
                    for back, line in enumerate(reversed(earlier))
                    for i, word in enumerate(line)
                ]
                for i, colour in enumerate(colours):
                    here = [f"here.{at}={word}" for at, word in enumerate(colours[:i])]
                    tokens = [*before, *place, f"at={i}", *steps, *here]
                    # What stood at the same place of the steps before, whichever place that is.
                    tokens += [f"same place, {back} back={line[i]}" for back, line in enumerate(reversed(earlier))]
                    tokens += [f"all={word}" for line in earlier for word in line]
                    examples.append((tuple(dict.fromkeys(tokens)), colour))
                earlier.append(colours)
    return examples


def answers(records: list[Record], given: Callable[[Record], str]) -> list[Example]:
    return [(tuple(dict.fromkeys(words(given(record), "given"))), record.answer) for record in records]


def share_right(guess: Guesser, train: list[Example], test: list[Example]) -> float:
    return float(np.mean([guessed == label for guessed, (_, label) in zip(guess(train, test), test, strict=True)]))


def margin(count: int) -> float:
    """Four standard deviations of the share of right guesses among `count` at chance."""
    return 4 * (0.25 * 0.75 / count) ** 0.5


@pytest.mark.parametrize("guess", GUESSERS, ids=lambda guess: guess.__name__)
@pytest.mark.parametrize("name", FORMATS)
def test_no_colour_of_a_step_can_be_guessed_from_all_text_before_it(many: Any, name: str, guess: Guesser) -> None:
    train, test = (next_words(half[name]) for half in many)
    assert len(test) > 2500
    assert abs(share_right(guess, train, test) - 0.25) < margin(len(test))  # at most 3.5 points


@pytest.mark.parametrize("guess", GUESSERS, ids=lambda guess: guess.__name__)
@pytest.mark.parametrize("name", FORMATS)
def test_no_answer_can_be_guessed_from_its_question(many: Any, name: str, guess: Guesser) -> None:
    train, test = (answers(half[name], lambda record: record.question) for half in many)
    assert abs(share_right(guess, train, test) - 0.25) < margin(400)  # 8.7 points


@pytest.mark.parametrize("guess", GUESSERS, ids=lambda guess: guess.__name__)
@pytest.mark.parametrize("name", FORMATS)
def test_the_same_guessers_read_the_answer_in_the_last_step(many: Any, name: str, guess: Guesser) -> None:
    train, test = (answers(half[name], lambda record: record.steps[-1].text) for half in many)
    assert share_right(guess, train, test) > 0.9


@pytest.mark.parametrize("guess", GUESSERS, ids=lambda guess: guess.__name__)
def test_the_same_guessers_find_a_row_that_is_told_twice(many: Any, guess: Guesser) -> None:
    def told(record: Record) -> list[Record]:
        again = [record.steps[0], *record.steps]
        return [Record(**{**vars(record), "steps": tuple(again)})]

    train, test = (next_words([one for record in half["jsonl"] for one in told(record)]) for half in many)
    assert share_right(guess, train, test) > 0.25 + 2 * margin(len(test))
