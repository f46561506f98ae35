from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import PIL.Image
import pytest

from tests.data.made import ALL_FORMATS, context, digests, jsonl_source, recipe, row
from valr_ops.data.inventory import build_sources, changed_sources
from valr_ops.data.sources import SourceError
from valr_ops.recipe.recipe import Recipe


def built(folder: Path, made: Recipe) -> Path:
    build_sources(context(folder, "sources", made))
    return folder / "sources"


def listed(artifact: Path, source: str = "mine") -> dict[str, Any]:
    files: dict[str, Any] = json.loads((artifact / "inventory.json").read_text())[source]["files"]
    return files


def given(location: Path | str, **settings: Any) -> Recipe:
    return recipe({"mine": {"format": "jsonl", "path": str(location), **settings}})


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """Objects by key in ``s3://bucket``, from a local server that speaks as much of S3 as is asked here."""
    objects: dict[str, bytes] = {}

    class Store(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if "list-type=2" not in url.query:
                self.give_object(with_body=True)
                return
            prefix = parse_qs(url.query).get("prefix", [""])[0]
            entries = "".join(
                f"<Contents><Key>{key}</Key><Size>{len(data)}</Size></Contents>"
                for key, data in sorted(objects.items())
                if key.startswith(prefix)
            )
            self.give(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode())

        def do_HEAD(self) -> None:
            self.give_object(with_body=False)

        def give_object(self, with_body: bool) -> None:
            data = objects.get(unquote(urlsplit(self.path).path).removeprefix("/bucket/"))
            if data is None:
                self.give(404, b"")
                return
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            self.give(206 if start else 200, data[start:], f'"{hashlib.md5(data).hexdigest()}"', with_body)

        def give(self, status: int, body: bytes, tag: str = "", with_body: bool = True) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if tag:
                self.send_header("ETag", tag)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield objects
    server.shutdown()
    server.server_close()


def test_the_inventory_lists_size_and_digest_of_every_file(tmp_path: Path) -> None:
    artifact = built(tmp_path, recipe())
    inventory = json.loads((artifact / "inventory.json").read_text())
    assert sorted(inventory) == sorted(ALL_FORMATS)
    for name, entry in inventory.items():
        assert entry["generated"] is True
        assert {path: file["md5"] for path, file in entry["files"].items()} == digests(artifact / name)
        assert all(file["size"] == (artifact / name / path).stat().st_size for path, file in entry["files"].items())
    PIL.Image.open(io.BytesIO((artifact / "preview.png").read_bytes())).verify()


def test_the_report_shows_a_scene_of_every_drawn_source(tmp_path: Path) -> None:
    made = recipe({"scenes": {"format": "jsonl"}, "many": {"format": "gcot"}})
    report = build_sources(context(tmp_path, "sources", made))
    shown = report.tables["First drawn scene of each source"]
    assert "| scenes | Read row" in shown and "of view" in shown and shown.count("\n") == 3
    assert report.summary["sources"] == 2 and report.plots == ("preview.png",)


def test_a_given_folder_is_listed_and_not_copied(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    folder = jsonl_source(tmp_path / "mine", train=[row(0), row(1, images=["../secret.png"])])
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / ".hidden").write_text("x")
    artifact = built(tmp_path / "a", given(folder))
    assert sorted(path.name for path in artifact.iterdir()) == ["benchmarks.json", "inventory.json"]
    assert sorted(listed(artifact)) == sorted(["train.jsonl", *(f"images/{number}.png" for number in range(10))])
    assert str(tmp_path) not in (artifact / "inventory.json").read_text()


def test_a_given_file_is_listed_with_the_images_it_names_and_that_its_reader_would_read(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    images = ["images/1.png", "../secret.png", str(tmp_path / "secret.png"), "images/absent.png", "a\0b", 7]
    entries = [{"path": "images/2.png", "role": "step"}]
    rows = [row(0), b"not json", row(1, images=images), row(2, images=entries), row(3, images="images/4.png")]
    folder = jsonl_source(tmp_path / "mine", train=rows)
    artifact = built(tmp_path / "a", given(folder / "train.jsonl"))
    assert sorted(listed(artifact)) == ["images/0.png", "images/1.png", "images/2.png", "train.jsonl"]
    assert {name: file["md5"] for name, file in listed(artifact).items()}.items() <= digests(folder).items()


def test_objects_are_listed_with_their_entity_tags(tmp_path: Path, bucket: dict[str, bytes]) -> None:
    folder = jsonl_source(tmp_path / "mine", train=[row(0)])
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            bucket[f"data/mine/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
    bucket["data/other.png"] = b"not below the prefix"
    made = given("s3://bucket/data/mine")
    artifact = built(tmp_path / "a", made)
    assert {name: file["etag"] for name, file in listed(artifact).items()} == digests(folder)
    assert listed(artifact)["train.jsonl"]["size"] == (folder / "train.jsonl").stat().st_size

    assert changed_sources(made, artifact) is None
    bucket["data/mine/images/3.png"] = b"other"
    del bucket["data/mine/images/4.png"]
    assert changed_sources(made, artifact) == "source mine changed: images/3.png, images/4.png"


@pytest.mark.parametrize("state", ["missing", "empty", "without records", "no sources"])
def test_nothing_to_list_stops_the_stage(tmp_path: Path, state: str) -> None:
    folder = tmp_path / "mine"
    if state != "missing":
        folder.mkdir()
    if state == "without records":
        (folder / "train.jsonl").write_text("\n")
    with pytest.raises(SourceError, match=r"data\.sources|no record"):
        built(tmp_path / "a", recipe({}) if state == "no sources" else given(folder))


def test_an_empty_prefix_stops_the_stage(tmp_path: Path, bucket: dict[str, bytes]) -> None:
    bucket["elsewhere/train.jsonl"] = b"{}"
    with pytest.raises(SourceError, match=r"s3://bucket/nothing.*data\.sources\.mine\.path"):
        built(tmp_path, given("s3://bucket/nothing"))


def test_a_given_source_that_changed_is_named_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    folder = jsonl_source(tmp_path / "mine", train=[row(0)])
    made = recipe({"mine": {"format": "jsonl", "path": str(folder)}, "scenes": ALL_FORMATS["scenes"]})
    artifact = built(tmp_path / "a", made)
    assert changed_sources(made, artifact) is None
    (folder / "images" / "3.png").write_bytes(b"other")
    (folder / "images" / "4.png").unlink()
    assert changed_sources(made, artifact) == "source mine changed: images/3.png, images/4.png"
    for number in (5, 6, 7):
        (folder / "images" / f"{number}.png").unlink()
    assert changed_sources(made, artifact) == (
        "source mine changed: images/3.png, images/4.png, images/5.png and 2 more"
    )


def test_a_given_folder_that_disappeared_is_a_change(tmp_path: Path) -> None:
    folder = jsonl_source(tmp_path / "mine", train=[row(0)])
    made = given(folder)
    artifact = built(tmp_path / "a", made)
    folder.rename(tmp_path / "moved")
    assert "source mine can't be read any more" in (changed_sources(made, artifact) or "")


def test_more_files_than_are_measured_at_a_time_are_all_listed(tmp_path: Path) -> None:
    folder = jsonl_source(tmp_path / "mine", train=[row(0)])
    for number in range(300):
        (folder / f"extra-{number:03d}").write_text(str(number))
    files = listed(built(tmp_path / "a", given(folder)))
    assert len(files) == 311 and list(files) == sorted(files)
    assert files["extra-123"]["md5"] == hashlib.md5(b"123").hexdigest()


def test_a_changed_benchmark_makes_the_sources_out_of_date(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "scenes.txt").write_text("a\n")
    made = recipe({"scenes": {"format": "jsonl"}}, benchmarks={"vsi": {"path": str(tmp_path / "bench")}})
    build_sources(context(tmp_path, "sources", made))
    assert changed_sources(made, tmp_path / "sources") is None
    (tmp_path / "bench" / "scenes.txt").write_text("a\nb\n")
    assert changed_sources(made, tmp_path / "sources") == "benchmark vsi changed: scenes.txt"
    (tmp_path / "bench" / "scenes.txt").unlink()
    (tmp_path / "bench").rmdir()
    changed = changed_sources(made, tmp_path / "sources")
    assert changed is not None and "data.benchmarks.vsi.path" in changed


def test_what_will_not_be_read_is_not_drawn(tmp_path: Path) -> None:
    made = recipe({"a": {"format": "jsonl", "limit": 5}, "b": {"format": "jsonl"}})
    artifact = built(tmp_path, made)
    assert len((artifact / "a" / "train.jsonl").read_text().splitlines()) == 5
    assert len((artifact / "b" / "train.jsonl").read_text().splitlines()) == 32
