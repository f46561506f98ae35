from __future__ import annotations

import hashlib
import io
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import ClientError, CredentialRetrievalError, EndpointConnectionError, NoCredentialsError

from valr_ops.store.objects import (
    Cache,
    ChangedError,
    EscapeError,
    LocalFiles,
    MissingError,
    S3Files,
    StorageError,
    TakenError,
    TooLargeError,
    UnreachableError,
    checked,
    is_remote,
    open_files,
    patiently,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    for name in ("a.png", "deep/b.json", "c.json", ".hidden/d.json", ".e.json"):
        (root / name).write_text(name)
    (tmp_path / "outside.json").write_text("secret")
    (root / "link.json").symlink_to(tmp_path / "outside.json")
    (root / "inside.json").symlink_to(root / "c.json")
    return root


def test_names_are_sorted_and_leave_out_what_is_hidden_or_leads_out(folder: Path) -> None:
    files = LocalFiles(folder)
    assert files.names() == ["a.png", "c.json", "deep/b.json", "inside.json"]
    assert files.names(".json", ".jsonl") == ["c.json", "deep/b.json", "inside.json"]


def test_links_that_no_reader_follows_are_told_apart_from_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name, target in (("out", tmp_path / "elsewhere"), ("hid", folder / ".hidden"), ("in", folder / "deep")):
        (folder / "deep" / name).symlink_to(target)
    (folder / "dead.png").symlink_to(folder / "nothing.png")
    files = LocalFiles(folder)
    assert files.listed() == (files.names(), ["dead.png", "deep/hid/", "deep/out/", "link.json"])
    assert files.listed(".json") == (files.names(".json"), ["deep/hid/", "deep/out/", "link.json"])


ESCAPES = ["/etc/passwd", "../outside.json", "deep/../../outside.json", "C:\\x", "a\0b", "link.json"]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_leads_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(EscapeError):
        LocalFiles(folder).read(name, 100)


def test_what_is_not_there_or_no_file_or_too_large_is_told_apart(folder: Path) -> None:
    files = LocalFiles(folder)
    for name in ("nothing.json", "deep", "c.json/x"):
        with pytest.raises(MissingError):
            files.open(name)
    with pytest.raises(TooLargeError, match="has 6 bytes"):
        files.read("c.json", 5)
    assert files.read("c.json", 6) == b"c.json"
    for missing in (folder / "nowhere", folder / "a.png"):
        with pytest.raises(StorageError):
            LocalFiles(missing).names()


def test_a_changed_file_has_another_stamp(folder: Path) -> None:
    files = LocalFiles(folder)
    before = files.stamp("c.json")
    assert files.stamp("c.json") == before
    replaced = folder / "new"
    replaced.write_text("C.JSON")
    replaced.replace(folder / "c.json")
    assert files.stamp("c.json") != before


def test_locations_with_a_bucket_are_remote() -> None:
    assert is_remote("s3://bucket/prefix") and not is_remote("/s3/bucket")
    assert isinstance(open_files("s3://bucket"), S3Files)
    with pytest.raises(StorageError, match="names no bucket"):
        open_files("s3:///prefix")
    assert checked("a\\b/./c") == "a/b/c"


class Body(io.BytesIO):
    """What an answer's body is to us; it may break off."""

    def __init__(self, data: bytes, breaks_after: int | None) -> None:
        super().__init__(data if breaks_after is None else data[:breaks_after])


class Client:
    """The few calls of boto3's client that are used, over a dictionary."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self.breaks: list[int | None] = []
        self.error: Exception | None = None
        self.asked: list[dict[str, Any]] = []

    def _object(self, key: str) -> tuple[bytes, str]:
        if self.error is not None:
            raise self.error
        if key not in self.objects:
            raise client_error("NoSuchKey")
        data = self.objects[key]
        return data, f'"{hashlib.md5(data).hexdigest()}"'

    def head_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        data, tag = self._object(Key)
        return {"ContentLength": len(data), "ETag": tag}

    def get_object(self, Bucket: str, Key: str, **options: Any) -> dict[str, Any]:
        self.asked.append(options)
        data, tag = self._object(Key)
        if options.get("IfMatch", tag) != tag:
            raise client_error("PreconditionFailed")
        rest = data[int(options.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")) :]
        body = Body(rest, self.breaks.pop(0) if self.breaks else None)
        return {"Body": body, "ContentLength": len(rest), "ETag": tag}

    def put_object(self, Bucket: str, Key: str, Body: bytes, ChecksumAlgorithm: str, **options: Any) -> None:
        assert ChecksumAlgorithm == "SHA256"
        if self.error is not None:
            raise self.error
        if options.get("IfNoneMatch") == "*" and Key in self.objects:
            raise client_error("PreconditionFailed", 412)
        self.objects[Key] = Body

    def upload_file(self, Filename: str, Bucket: str, Key: str, ExtraArgs: dict[str, str], Config: Any) -> None:
        try:
            self.put_object(Bucket, Key, Path(Filename).read_bytes(), **ExtraArgs)
        except ClientError as error:
            # As boto3 does.
            raise S3UploadFailedError(f"failed: {error}")  # noqa: B904

    def get_paginator(self, _: str) -> Any:
        client = self

        class Pages:
            def paginate(self, Bucket: str, Prefix: str) -> Any:
                if client.error is not None:
                    raise client.error
                keys = sorted(key for key in client.objects if key.startswith(Prefix))
                yield {"Contents": [{"Key": key} for key in keys[:2]]}
                yield {"Contents": [{"Key": key} for key in keys[2:]]}
                yield {}

        return Pages()


def client_error(code: str, status: int = 400) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


DATA = bytes(range(256)) * 20_000


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> tuple[S3Files, Client]:
    client = Client({"set/a.png": b"a", "set/deep/b.json": DATA, "set/.hidden/c.json": b"c", "other/d.json": b"d"})
    monkeypatch.setattr(S3Files, "_s3", lambda self: client)
    return S3Files("s3://bucket/set/"), client


def test_names_below_a_prefix_are_those_of_all_pages(store: tuple[S3Files, Client]) -> None:
    files, _ = store
    assert files.names() == ["a.png", "deep/b.json"]
    assert files.names(".json") == ["deep/b.json"]
    assert files.read("a.png", 1) == b"a"
    with pytest.raises(TooLargeError):
        files.read("deep/b.json", 1000)
    with pytest.raises(EscapeError):
        files.read("../other/d.json", 10)


def test_a_stream_goes_on_where_the_connection_broke(store: tuple[S3Files, Client]) -> None:
    files, client = store
    client.breaks = [1_000_000, 0, 77, None]
    with files.open("deep/b.json") as stream:
        assert stream.read() == DATA
    assert [options.get("Range") for options in client.asked] == [
        *(None, "bytes=1000000-", "bytes=1000000-", "bytes=1000077-")
    ]
    assert all("IfMatch" in options for options in client.asked)


def test_a_stream_that_breaks_for_ever_is_one_error(store: tuple[S3Files, Client]) -> None:
    files, client = store
    client.breaks = [0] * 50
    with files.open("deep/b.json") as stream, pytest.raises(StorageError, match=r"bucket/set/deep/b.json.*broke off"):
        stream.read()


def test_a_stream_is_seekable(store: tuple[S3Files, Client]) -> None:
    files, _ = store
    with files.open("deep/b.json") as stream:
        stream.seek(-10, os.SEEK_END)
        assert stream.read() == DATA[-10:]
        stream.seek(5)
        assert stream.read(3) == DATA[5:8]


def test_an_object_that_is_replaced_while_it_is_read_is_noticed(store: tuple[S3Files, Client]) -> None:
    files, client = store
    client.breaks = [1000]
    with files.open("deep/b.json") as stream:
        stream.read(10)
        client.objects["set/deep/b.json"] = DATA + b"x"
        with pytest.raises(ChangedError, match="changed while it was read"):
            stream.read()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (client_error("AccessDenied"), "access denied.*AWS_SECRET_ACCESS_KEY"),
        (client_error("NoSuchBucket"), "no such bucket"),
        (client_error("SlowDown"), "answered SlowDown"),
        (NoCredentialsError(), "no credentials .*; set AWS_ACCESS_KEY_ID"),
        (CredentialRetrievalError(provider="sso", error_msg="expired"), r"no credentials .*expired\); set AWS"),
        (EndpointConnectionError(endpoint_url="http://127.0.0.1:1"), "can't be reached.*AWS_ENDPOINT_URL"),
    ],
)
def test_what_the_store_refuses_is_said_with_the_way_to_mend_it(
    store: tuple[S3Files, Client], error: Exception, message: str
) -> None:
    files, client = store
    client.error = error
    for call in (files.names, lambda: files.read("a.png", 10), lambda: files.open("a.png")):
        with pytest.raises(StorageError, match=message):
            call()


@pytest.mark.parametrize(
    ("bucket", "settings", "message"),
    [
        ("bucket", {"AWS_SECRET_ACCESS_KEY": None}, "no credentials .*missing: AWS_SECRET_ACCESS_KEY.*; set AWS"),
        ("bucket", {"AWS_PROFILE": "typo"}, r"no credentials .*\(typo\).*; set .*AWS_PROFILE"),
        ("My Bucket!", {}, r"s3://My Bucket!/a\.png is no name that S3 allows.*correct the location"),
        ("bucket", {"AWS_ENDPOINT_URL": "127.0.0.1:1"}, "AWS_ENDPOINT_URL must begin with http://"),
    ],
)
def test_wrong_settings_are_no_outage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bucket: str, settings: dict[str, str | None], message: str
) -> None:
    right = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    files = {name: str(tmp_path / name) for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")}
    for name in {name for name in os.environ if name.startswith("AWS_")}:
        monkeypatch.delenv(name)
    for name, value in {**right, **files, "AWS_EC2_METADATA_DISABLED": "true", **settings}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=message) as said:
        S3Files(f"s3://{bucket}").stamp("a.png")
    assert not isinstance(said.value, UnreachableError), "it would be asked again for minutes"


def test_an_object_is_written_once_or_again_as_asked(store: tuple[S3Files, Client], tmp_path: Path) -> None:
    files, client = store
    files.put("new.json", b"mine", only_new=True)
    with pytest.raises(TakenError, match=r"set/new\.json was written by another writer first, and stays as it is"):
        files.put("new.json", b"yours", only_new=True)
    assert files.read("new.json", 10) == b"mine"
    (tmp_path / "file").write_bytes(DATA)
    files.upload("new.json", tmp_path / "file")
    assert client.objects["set/new.json"] == DATA and files.size("new.json") == len(DATA)
    assert files.size("nothing") is None
    for write in (lambda: files.put("../x", b""), lambda: files.upload("../x", tmp_path / "file")):
        with pytest.raises(EscapeError):
            write()


@pytest.mark.parametrize(
    "error",
    [
        *(client_error("InternalError", 500), client_error("ServiceUnavailable", 503), client_error("SlowDown", 503)),
        *(client_error("BadDigest"), client_error("XAmzContentSHA256Mismatch")),
        EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
    ],
)
def test_what_may_pass_is_waited_for_and_said_in_the_end(
    store: tuple[S3Files, Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    files, client = store
    client.error = error
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            client.error = None

    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=pause))  # other threads go on sleeping
    (tmp_path / "file").write_bytes(b"x")
    patiently(files.upload, "file", tmp_path / "file")
    assert client.objects["set/file"] == b"x" and len(pauses) == 3 and pauses[0] < pauses[2]
    client.error = error
    with pytest.raises(UnreachableError) as said:
        patiently(files.put, "file", b"x")
    assert said.value.exit_status == 1, "a retry may mend it"
    assert sum(pauses[3:]) > 120


def test_what_waiting_does_not_mend_is_not_waited_for(
    store: tuple[S3Files, Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, client = store
    client.error = client_error("AccessDenied", 403)
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=pytest.fail))
    (tmp_path / "file").touch()
    for call in (lambda: patiently(files.put, "x", b""), lambda: patiently(files.upload, "x", tmp_path / "file")):
        with pytest.raises(StorageError, match=r"access denied.*AWS_SECRET_ACCESS_KEY"):
            call()


def test_files_travel_to_another_process() -> None:
    files = S3Files("s3://bucket/set")
    files._client = object()
    assert pickle.loads(pickle.dumps(files))._client is None


def test_the_cache_drops_what_was_not_used_for_longest(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    sums = {}
    for number in range(4):
        data = bytes([number]) * 100
        (root / f"{number}").write_bytes(data)
        sums[number] = hashlib.sha256(data).hexdigest()
    cache, files = Cache(tmp_path / "cache", max_bytes=250), LocalFiles(root)
    for number, time in ((0, 1), (1, 2), (0, 3), (2, 4)):
        os.utime(cache.fetch(files, str(number), sums[number], 100), ns=(time, time))
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {sums[0], sums[2]}


def test_what_has_another_digest_never_enters_the_cache(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    cache = Cache(tmp_path / "cache", 100)
    with pytest.raises(ChangedError, match="damaged or was replaced"):
        cache.fetch(LocalFiles(tmp_path), "a", "0" * 64, 1)
    assert list((tmp_path / "cache").iterdir()) == []
