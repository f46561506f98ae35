"""Sources and corpora on a real S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.made import context, digests, jsonl_source, recipe, row
from tests.store.weed import Weed
from valr_ops.data import sources
from valr_ops.data.corpus import ImageStore, Records
from valr_ops.data.curation import build_cot_corpus
from valr_ops.data.inventory import build_sources, changed_sources
from valr_ops.data.layouts import write_layout
from valr_ops.data.records import Record, SourceError
from valr_ops.data.shards import ShardError
from valr_ops.recipe.recipe import DataRecipe, Recipe, SourceRecipe, SyntheticRecipe
from valr_ops.store import objects
from valr_ops.store.objects import Cache

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("s3_store")]


def given(location: str) -> Recipe:
    return recipe({"mine": {"format": "jsonl", "path": location}})


def built(folder: Path, made: Recipe) -> Path:
    build_sources(context(folder, "sources", made))
    build_cot_corpus(context(folder, "cot_corpus", made, sources=folder / "sources"))
    return folder / "cot_corpus"


def test_a_corpus_from_a_bucket_has_the_bytes_of_one_from_a_folder(s3_store: Weed, tmp_path: Path) -> None:
    folder = jsonl_source(tmp_path / "mine", train=[row(number) for number in range(9)], test=[row(9)])
    s3_store.upload(folder, "test", "mine")
    made = given("s3://test/mine")
    remote, local = built(tmp_path / "remote", made), built(tmp_path / "local", given(str(folder)))
    # It names the recipe, in which the locations differ.
    for corpus in (remote, local):
        (corpus / "distribution.json").unlink()
    assert digests(remote) == digests(local)
    assert changed_sources(made, tmp_path / "remote" / "sources") is None
    s3_store.client().put_object(Bucket="test", Key="mine/images/3.png", Body=b"x")
    assert changed_sources(made, tmp_path / "remote" / "sources") == "source mine changed: images/3.png"


@pytest.mark.parametrize("format_name", sorted(set(sources.FORMATS) - {"jsonl"}))
def test_every_format_is_read_from_a_bucket(s3_store: Weed, tmp_path: Path, format_name: str) -> None:
    write_layout(format_name, tmp_path, "mine", 0, SyntheticRecipe(train_records=4))
    s3_store.upload(tmp_path, "test", format_name)

    def read(location: str) -> list[Record]:
        settings = SourceRecipe(format=format_name, path=location)  # type: ignore[arg-type]
        items = [one.item for one in sources.read(sources.located("mine", location, DataRecipe(), settings))]
        assert all(isinstance(item, Record) for item in items)
        return items  # type: ignore[return-value]

    assert read(f"s3://test/{format_name}") == read(str(tmp_path)) != []


def test_a_corpus_in_a_bucket_is_read_through_a_bounded_cache(s3_store: Weed, tmp_path: Path) -> None:
    folder = jsonl_source(tmp_path / "mine", train=[row(number) for number in range(9)])
    corpus = built(tmp_path, given(str(folder)))
    s3_store.upload(corpus, "test", "corpus")
    cache = Cache(tmp_path / "cache", 1 << 20)
    assert list(Records("s3://test/corpus", cache)) == list(Records(corpus))
    near, far = ImageStore(corpus), ImageStore("s3://test/corpus", cache)
    assert {digest: far.get(digest) for digest in far} == {digest: near.get(digest) for digest in near}
    # What lies there is not what the index says.
    s3_store.client().put_object(Bucket="test", Key="corpus/records-00000.arrow", Body=b"another")
    with pytest.raises(ShardError, match=r"records-00000.arrow.*damaged or was replaced"):
        list(Records("s3://test/corpus", Cache(tmp_path / "another", 1 << 20)))


def test_a_wrong_key_and_a_bucket_that_is_not_there_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="source 'mine': s3://nowhere/mine: there is no such bucket"):
        build_sources(context(tmp_path / "a", "sources", given("s3://nowhere/mine")))
    with pytest.raises(SourceError, match=r"no train.jsonl or test.jsonl in s3://test/nothing"):
        build_sources(context(tmp_path / "b", "sources", given("s3://test/nothing")))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(SourceError, match="access denied") as error:
        build_sources(context(tmp_path / "c", "sources", given("s3://test/mine")))
    assert "wrong" not in str(error.value)


def test_a_server_that_dies_while_a_source_is_read_ends_in_one_error_and_the_next_run_succeeds(
    s3_store: Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_ATTEMPTS", 2)
    rows = [row(number % 10, id=f"r{number}", question=f"{number}? {'long ' * 10_000}") for number in range(150)]
    s3_store.upload(jsonl_source(tmp_path / "long", train=rows), "test", "long")
    made = given("s3://test/long")
    build_sources(context(tmp_path, "sources", made))
    opened = sources.opened("mine", made, tmp_path / "sources")
    reading = sources.read(opened)
    for _ in range(30):
        next(reading)
    with s3_store.away(), pytest.raises(SourceError, match=r"source 'mine'.*(can't be reached|broke off)"):
        list(reading)
    assert len(list(sources.read(opened))) == 150
