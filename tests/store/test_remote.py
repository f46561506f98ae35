"""Artifacts on a real S3 server, over a network and beside writers that do what networks and writers do."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.store.proxy import Proxy, between
from tests.store.weed import Weed, environment
from valr_ops.store import objects
from valr_ops.store.artifacts import directory_digest
from valr_ops.store.objects import (
    Cache,
    ChangedError,
    DiskFullError,
    MissingError,
    S3Files,
    StorageError,
    TakenError,
    UnreachableError,
)
from valr_ops.store.remote import Remote

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("s3_store")]

MIB = 1 << 20


@pytest.fixture
def location(request: pytest.FixtureRequest) -> str:
    return f"s3://test/{hashlib.md5(request.node.name.encode()).hexdigest()[:8]}"


@pytest.fixture
def network(s3_store: Weed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What the environment names instead of the server itself."""
    with between(s3_store.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def artifact(folder: Path, files: int = 3, size: int = 100_000) -> Path:
    """Files with bytes of their own, at two depths, one of them empty, and two that are equal."""
    (folder / "deep").mkdir(parents=True)
    for number in range(files):
        block = hashlib.sha256(f"{folder.name} {number}".encode()).digest()
        (folder / ("deep" if number % 2 else "") / f"shard-{number}.bin").write_bytes(block * (size // len(block)))
    (folder / "empty").touch()
    (folder / "same.bin").write_bytes((folder / "shard-0.bin").read_bytes())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def key(location: str, digest: str) -> str:
    return f"{location.removeprefix('s3://test/')}/files/md5/{digest[:2]}/{digest[2:]}"


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_an_artifact_comes_back_as_it_went(location: str, tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    remote = Remote(location)
    stored = remote.push(made)
    assert stored.digest == directory_digest(made) and stored.first
    assert (stored.files, stored.size) == (5, sum(map(len, contents(made).values())))
    assert remote.holds(stored.digest) and not remote.holds(f"{'0' * 32}.dir")
    remote.fetch(stored.digest, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(made)
    again = remote.push(tmp_path / "back")
    assert again.digest == stored.digest and not again.first
    with pytest.raises(StorageError, match="back exists"):
        remote.fetch(stored.digest, tmp_path / "back")


def test_dvc_pulls_what_was_pushed_here_and_the_other_way_round(
    s3_store: Weed, location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvc.repo import Repo

    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    repo = Repo.init(no_scm=True)
    with repo.config.edit("repo") as config:
        config["core"] |= {"analytics": False, "remote": "store"}
        config["remote"]["store"] = {"url": location, "endpointurl": s3_store.endpoint}
    repo = Repo()
    made = artifact(project / "made")
    before = contents(made)
    repo.add("made")
    stored = Remote(location).push(made)
    for folder in (made, project / ".dvc" / "cache"):
        subprocess.run(["rm", "-rf", folder], check=True)
    repo = Repo()
    repo.pull()
    assert contents(made) == before
    assert f"md5: {stored.digest}" in (project / "made.dvc").read_text()

    theirs = artifact(project / "theirs")
    repo.add("theirs")
    assert repo.push(targets=["theirs"]) > 0
    Remote(location).fetch(directory_digest(theirs), tmp_path / "back")
    assert contents(tmp_path / "back") == contents(theirs)


def test_of_many_writers_of_one_artifact_one_is_first(location: str, tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    with ThreadPoolExecutor(6) as threads:
        stored = list(threads.map(lambda _: Remote(location).push(made), range(6)))
    assert [one.first for one in stored].count(True) == 1
    assert {one.digest for one in stored} == {directory_digest(made)}
    Remote(location).fetch(stored[0].digest, tmp_path / "back")


def test_of_two_writers_of_one_name_the_second_is_told(location: str) -> None:
    files = S3Files(location)
    files.put("result.json", b"mine", only_new=True)
    with pytest.raises(TakenError, match=r"result\.json was written by another writer first, and stays as it is"):
        files.put("result.json", b"yours", only_new=True)
    assert files.read("result.json", 10) == b"mine"
    files.put("result.json", b"yours")
    assert files.read("result.json", 10) == b"yours"
    files.delete("result.json")
    files.delete("result.json")
    assert files.size("result.json") is None


def test_a_large_file_travels_in_parts(s3_store: Weed, location: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(objects, "_PART_BYTES", 5 * MIB)
    made = artifact(tmp_path / "made", files=1, size=12 * MIB)
    stored = Remote(location).push(made)
    tag = s3_store.client().head_object(Bucket="test", Key=key(location, md5(made / "shard-0.bin")))["ETag"]
    assert tag.strip('"').endswith("-3")
    Remote(location).fetch(stored.digest, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(made)


@pytest.mark.parametrize("how", ["bytes", "length", "gone"])
def test_an_object_altered_behind_our_back_is_found(s3_store: Weed, location: str, tmp_path: Path, how: str) -> None:
    made, remote = artifact(tmp_path / "made"), Remote(location)
    stored = remote.push(made)
    victim, client = key(location, md5(made / "deep" / "shard-1.bin")), s3_store.client()
    data = client.get_object(Bucket="test", Key=victim)["Body"].read()
    if how == "gone":
        client.delete_object(Bucket="test", Key=victim)
    else:
        client.put_object(Bucket="test", Key=victim, Body=b"x" * (len(data) - (how == "length")))
    with pytest.raises(MissingError if how == "gone" else ChangedError, match="dvc push"):
        remote.fetch(stored.digest, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    if how == "length":
        with pytest.raises(ChangedError, match=r"not what its name says.*Delete that object"):
            remote.push(made)
        client.delete_object(Bucket="test", Key=victim)
    if how != "bytes":
        remote.push(made)
        remote.fetch(stored.digest, tmp_path / "back")
        assert contents(tmp_path / "back") == contents(made)


def test_a_file_that_is_written_to_while_it_is_pushed_is_not_left_under_a_wrong_name(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, upload = artifact(tmp_path / "made"), S3Files.upload

    def late(files: S3Files, name: str, path: Path) -> None:
        path.write_bytes(b"other")
        upload(files, name, path)

    monkeypatch.setattr(S3Files, "upload", late)
    with pytest.raises(ChangedError, match="was written to while it was pushed"):
        Remote(location).push(made)
    assert [name for name in S3Files(location).names() if name.endswith(".dir")] == []


def test_an_altered_list_of_files_is_found_by_readers_and_writers(
    s3_store: Weed, location: str, tmp_path: Path
) -> None:
    made, remote = artifact(tmp_path / "made"), Remote(location)
    stored = remote.push(made)
    evil = [{"md5": md5(made / "same.bin"), "relpath": "../../outside"}]
    s3_store.client().put_object(Bucket="test", Key=key(location, stored.digest), Body=json.dumps(evil).encode())
    for call in (lambda: remote.fetch(stored.digest, tmp_path / "back"), lambda: remote.push(made)):
        with pytest.raises(ChangedError, match="not what its name says"):
            call()


def test_a_list_that_leads_out_of_its_folder_is_refused(s3_store: Weed, location: str, tmp_path: Path) -> None:
    evil = json.dumps([{"md5": hashlib.md5(b"").hexdigest(), "relpath": "../outside"}]).encode()
    digest = f"{hashlib.md5(evil).hexdigest()}.dir"
    for name, body in ((digest, evil), (hashlib.md5(b"").hexdigest(), b"")):
        s3_store.client().put_object(Bucket="test", Key=key(location, name), Body=body)
    with pytest.raises(objects.EscapeError):
        Remote(location).fetch(digest, tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


def test_wrong_credentials_are_said_at_once(
    s3_store: Weed, location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifact(tmp_path / "made")
    stored = Remote(location).push(made)
    for name, value in environment(s3_store, secret="wrong").items():
        monkeypatch.setenv(name, value)
    remote = Remote(location)
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=pytest.fail))
    for call in (
        lambda: remote.push(made),
        lambda: remote.fetch(stored.digest, tmp_path / "back"),
        lambda: S3Files(location).put("x", b"x"),
        lambda: S3Files(location).upload("x", made / "same.bin"),
    ):
        with pytest.raises(StorageError, match=r"access denied.*AWS_SECRET_ACCESS_KEY") as error:
            call()
        assert not isinstance(error.value, UnreachableError) and "wrong" not in str(error.value)


def test_inputs_come_through_a_bounded_cache(s3_store: Weed, location: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=350_000)
    remote = Remote(location, cache)
    made = [artifact(tmp_path / name) for name in ("one", "two")]
    digests = [remote.push(folder).digest for folder in made]
    remote.fetch(digests[0], tmp_path / "first")
    for digest in {md5(path) for path in made[0].rglob("*.bin")}:
        s3_store.client().delete_object(Bucket="test", Key=key(location, digest))
        s3_store.client().put_object(Bucket="test", Key=key(location, digest), Body=b"x" * 100_000)
    remote.fetch(digests[0], tmp_path / "second")
    assert contents(tmp_path / "second") == contents(made[0]), "taken from the cache, not from the store"
    remote.fetch(digests[1], tmp_path / "third")
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 350_000
    assert contents(tmp_path / "first") == contents(made[0]), "what made room is still where it was fetched to"
    assert contents(tmp_path / "third") == contents(made[1])


def test_what_is_forgotten_leaves_the_files_that_others_have(s3_store: Weed, location: str, tmp_path: Path) -> None:
    remote, one, two = Remote(location), artifact(tmp_path / "one"), artifact(tmp_path / "two")
    (two / "shared").write_bytes((one / "shard-0.bin").read_bytes())
    first, second = remote.push(one).digest, remote.push(two).digest
    remote.forget(first, but=[second])
    assert not remote.holds(first)
    remote.fetch(second, tmp_path / "back")
    with pytest.raises(MissingError, match=f"has no artifact {first}"):
        remote.fetch(first, tmp_path / "gone")


# -------------------------------------------------------------------------------------------------- the bad network


@pytest.mark.parametrize("direction", ["upload", "download"])
def test_a_slow_network_that_cuts_connections_costs_time_only(
    network: Proxy, location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    monkeypatch.setattr(objects, "_PART_BYTES", 5 * MIB)
    made, remote = artifact(tmp_path / "made", files=2, size=6 * MIB), Remote(location)
    digest = directory_digest(made)
    if direction == "download":
        remote.push(made)
    network.seconds_a_block, network.cut_after, network.cuts = 0.0002, 300_000, 12
    if direction == "upload":
        remote.push(made)
    else:
        remote.fetch(digest, tmp_path / "back")
    assert network.cuts < 6, "the network did cut"
    network.cuts = 0
    if direction == "upload":
        remote.fetch(digest, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(made)


@pytest.mark.parametrize("lie_to", ["server", "client"])
def test_a_lying_network_is_found_out(network: Proxy, location: str, tmp_path: Path, lie_to: str) -> None:
    made, remote = artifact(tmp_path / "made", size=MIB), Remote(location)
    network.lie_to, network.lies = lie_to, 1
    digest = remote.push(made).digest
    remote.fetch(digest, tmp_path / "back")
    assert network.lies == 0, "the network did lie"
    assert contents(tmp_path / "back") == contents(made)


@pytest.mark.parametrize(("direction", "after"), [("upload", 0.1), ("upload", 0.8), ("download", 0.5)])
def test_the_server_is_killed_in_the_middle(
    s3_store: Weed, network: Proxy, location: str, tmp_path: Path, direction: str, after: float
) -> None:
    made, remote = artifact(tmp_path / "made", files=4, size=3 * MIB), Remote(location)
    digest, total = directory_digest(made), sum(path.stat().st_size for path in made.rglob("shard-*"))
    if direction == "download":
        remote.push(made)
    # It takes seconds to be there again.
    back_again = threading.Thread(target=s3_store.start)

    def kill() -> None:
        s3_store.kill()
        back_again.start()

    network.seconds_a_block = 0.0002
    network.after_bytes = (network.passed + int(after * total), kill)
    if direction == "upload":
        remote.push(made)
    else:
        remote.fetch(digest, tmp_path / "back")
    assert network.after_bytes is None, "the server was killed"
    back_again.join()
    if direction == "upload":
        remote.fetch(digest, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "made"]


def test_a_server_that_stays_away_is_one_sentence_and_leaves_nothing(
    s3_store: Weed, location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_PATIENT_ATTEMPTS", 2)
    monkeypatch.setattr(objects, "_ATTEMPTS", 2)
    made, remote = artifact(tmp_path / "made"), Remote(location)
    stored = remote.push(made)
    with s3_store.away():
        for call in (lambda: remote.push(made), lambda: remote.fetch(stored.digest, tmp_path / "back")):
            with pytest.raises(UnreachableError, match=r"can't be reached.*check AWS_ENDPOINT_URL") as error:
                call()
            assert error.value.exit_status == 1
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


FETCH_ON_A_SMALL_DISK = """
import sys
from pathlib import Path
from types import SimpleNamespace
from valr_ops.store import remote
from valr_ops.store.objects import Cache, DiskFullError
small, location, digest, blind, cached = Path(sys.argv[1]), *sys.argv[2:6]
if blind == "blind":
    # Another process takes the room that was there.
    remote.shutil.disk_usage = lambda path: type("usage", (), {"free": 1 << 40})
cache = Cache(small / "cache", 1 << 30) if cached == "cached" else None
try:
    remote.Remote(location, cache).fetch(digest, small / "back")
except DiskFullError as error:
    print(error)
print([path.name for path in small.rglob("*") if path.is_file() and path.stat().st_size], (small / "back").exists())
"""


@pytest.mark.parametrize("cached", ["cached", "straight"])
@pytest.mark.parametrize("blind", ["asked", "blind"])
def test_a_full_disk_leaves_nothing_half_written(location: str, tmp_path: Path, blind: str, cached: str) -> None:
    digest = Remote(location).push(artifact(tmp_path / "made", files=1, size=4 * MIB)).digest
    (tmp_path / "small").mkdir()
    script = f'mount -t tmpfs -o size=3m tmpfs "$1" && exec {sys.executable} -c "$PROGRAM" "$@"'
    words = ["unshare", "-Urm", "sh", "-c", script, "sh", str(tmp_path / "small"), location, digest, blind, cached]
    done = subprocess.run(
        words, env={**os.environ, "PROGRAM": FETCH_ON_A_SMALL_DISK}, capture_output=True, text=True, timeout=60
    )
    if "unshare failed" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip("this machine allows no small disk to be mounted")
    said, left = done.stdout.splitlines()
    assert "is full" in said and "make room there" in said
    assert left == "[] False"
    assert issubclass(DiskFullError, StorageError)
