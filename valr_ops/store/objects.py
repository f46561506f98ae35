"""Files, wherever they are: below a local folder or below an S3 prefix. The one module that knows boto3.

In: a location, ``../data/zebra_cot`` or ``s3://bucket/prefix``. Out: the names below it and their bytes, as a stream or
whole, with random access on both sides; and on S3 the way back.
Always: a name can't leave its location, not even through a link; a stream from S3 goes on after a broken connection
where it stopped, and only if the object is still the same; an object is there whole or not at all, its SHA-256 checked
by the store; nothing is held in memory but one block a stream.
Credentials and endpoint come from the environment, as for every AWS tool (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``).
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ParamSpec, Protocol, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

P = ParamSpec("P")
T = TypeVar("T")

_DRIVE = re.compile(r"^[A-Za-z]:")
_BLOCK = 1 << 20
_ATTEMPTS = 5
_PATIENT_ATTEMPTS = 10
"""Of `patiently`, each of which is several of boto3's: four minutes and more, so that a restart of the store passes."""
_PART_BYTES = 64 << 20
_PARTS_AT_ONCE = 4
_OPENING = threading.Lock()


class StorageError(OSError):
    """A location that can't be read or written: which, why, and how to mend it."""


class MissingError(StorageError):
    """There is no such file."""


class EscapeError(StorageError):
    """A name that leads out of its location."""


class TooLargeError(StorageError):
    """A file larger than the reader wants to hold."""


class ChangedError(StorageError):
    """A file that is no longer what it was when it was opened, or not what its digest says."""


class UnreachableError(StorageError):
    """The store is away or busy; the same call may succeed later."""

    exit_status = 1


class TakenError(StorageError):
    """Another writer was first; what it wrote stays."""


class DiskFullError(StorageError):
    """No room on the local disk; the same call goes on once there is some."""

    exit_status = 1


def patiently(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call again, with growing pauses, while the store is away; in the end its `UnreachableError` is raised."""
    again = Retrying(
        retry=retry_if_exception_type(UnreachableError),
        wait=wait_exponential_jitter(initial=1, max=30),
        stop=stop_after_attempt(_PATIENT_ATTEMPTS),
        before_sleep=_tell_away,
        reraise=True,
    )
    return again(call, *args, **kwargs)


def _tell_away(state: RetryCallState) -> None:
    if state.attempt_number == 1 and state.outcome:
        print(f"the store is asked again for some minutes: {state.outcome.exception()}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Stamp:
    """What tells one state of a file from another without reading it."""

    size: int
    """Bytes."""
    version: str
    """Time of the last change and inode of a local file, entity tag of an object."""


class Files(Protocol):
    """What lies below a location. Names are relative, with ``/``."""

    location: str

    def names(self, *suffixes: str) -> list[str]:
        """Sorted names of all files at any depth that end in one of `suffixes` (all files without one).

        Hidden files, links that leave the location, and linked folders are left out.

        Raises:
            StorageError: the location does not exist or can't be listed.
        """

    def listed(self, *suffixes: str) -> tuple[list[str], list[str]]:
        """`names`, and the sorted links whose files are not among them; a linked folder, of any name, ends in ``/``."""

    def stamp(self, name: str) -> Stamp:
        """The state of a file. Raises `StorageError` as `open`."""

    def open(self, name: str) -> BinaryIO:
        """A seekable stream.

        Raises:
            EscapeError: the name leads out of the location. MissingError: no such file. StorageError: not readable.
        """

    def read(self, name: str, at_most: int) -> bytes:
        """The whole file. Raises `TooLargeError` beyond `at_most` bytes, and as `open`."""


def open_files(location: str | Path) -> Files:
    """The files below a local folder, beside a local file, or below an ``s3://bucket/prefix``.

    Raises:
        StorageError: an S3 location without a bucket.
    """
    if str(location).startswith("s3://"):
        return S3Files(str(location))
    return LocalFiles(Path(location))


def refuse_links(location: str, left_out: Sequence[str]) -> None:
    """Stop where data would vanish. Raises `StorageError` that names the first of the links that were left out."""
    if left_out:
        raise StorageError(
            f"{left_out[0]} is a link, and what it leads to is not among the files of {location}; put a copy in its "
            "place (cp -rL), or give a folder that holds both"
        )


def is_remote(location: str | Path) -> bool:
    """Whether a location is read over the network."""
    return str(location).startswith("s3://")


class LocalFiles:
    """Files below a local folder. See `Files`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root)
        self._resolved = root.resolve()

    def names(self, *suffixes: str) -> list[str]:
        return self.listed(*suffixes)[0]

    def listed(self, *suffixes: str) -> tuple[list[str], list[str]]:
        if not self.root.is_dir():
            raise StorageError(f"{self.root} {'is no folder' if self.root.exists() else 'does not exist'}")
        found, left_out = [], []
        for folder, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in folders:
                path = Path(folder, name)
                # Nothing is lost where the walk comes to the same folder by its own name.
                if path.is_symlink() and not self._visits(path.resolve()):
                    left_out.append(f"{path.relative_to(self.root).as_posix()}/")
            for name in files:
                path = Path(folder, name)
                # What stands before the name counts as well: "/train.json" asks for one in some folder.
                relative = path.relative_to(self.root).as_posix()
                if name.startswith(".") or (suffixes and not relative.endswith(suffixes)):
                    continue
                # A link is listed only if a reader would follow it.
                linked = path.is_symlink()
                if path.is_file() and (not linked or path.resolve().is_relative_to(self._resolved)):
                    found.append(relative)
                elif linked:
                    left_out.append(relative)
        return sorted(found), sorted(left_out)

    def _visits(self, folder: Path) -> bool:
        """Whether `listed` walks through it."""
        if not folder.is_relative_to(self._resolved):
            return False
        return not any(part.startswith(".") for part in folder.relative_to(self._resolved).parts)

    def stamp(self, name: str) -> Stamp:
        status = self.path(name).stat()
        return Stamp(status.st_size, f"{status.st_mtime_ns}-{status.st_ino}")

    def open(self, name: str) -> BinaryIO:
        try:
            return self.path(name).open("rb")
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"{name}: {error.strerror}") from None

    def read(self, name: str, at_most: int) -> bytes:
        with self.open(name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > at_most:
                raise TooLargeError(f"{name} has {size} bytes")
            return file.read()

    def path(self, name: str) -> Path:
        """The regular file called `name`, links followed. Raises `EscapeError` or `MissingError`."""
        relative = checked(name)
        try:
            found = (self._resolved / relative).resolve(strict=True)
            inside = found.is_relative_to(self._resolved)
            regular = found.is_file()
        except (OSError, RuntimeError, ValueError):
            raise MissingError(f"{name} does not exist") from None
        if not inside:
            raise EscapeError(f"{name} is a link that leaves the folder")
        if not regular:
            raise MissingError(f"{name} is no regular file")
        return found


class S3Files:
    """Objects below an S3 prefix. See `Files`; these can be written as well, by any number of threads."""

    def __init__(self, location: str) -> None:
        bucket, _, prefix = location.removeprefix("s3://").partition("/")
        if not bucket:
            raise StorageError(f"{location} names no bucket; write s3://bucket/prefix")
        self.location = location.rstrip("/")
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._client: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # A connection does not travel to another process.
        return {**self.__dict__, "_client": None}

    def names(self, *suffixes: str) -> list[str]:
        with self._named(""):
            pages = self._s3().get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
            keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        names = [key.removeprefix(self._prefix) for key in keys]
        shown = [name for name in names if not any(part.startswith(".") or not part for part in name.split("/"))]
        return sorted(name for name in shown if not suffixes or name.endswith(suffixes))

    def listed(self, *suffixes: str) -> tuple[list[str], list[str]]:
        return self.names(*suffixes), []

    def stamp(self, name: str) -> Stamp:
        with self._named(name):
            head = self._s3().head_object(Bucket=self._bucket, Key=self._key(name))
        return Stamp(head["ContentLength"], head["ETag"])

    def open(self, name: str) -> BinaryIO:
        return io.BufferedReader(_Object(self, name, self.stamp(name)), _BLOCK)

    def read(self, name: str, at_most: int) -> bytes:
        with _Object(self, name, None) as stream:
            data = stream.read(at_most + 1)
        if len(data) > at_most:
            raise TooLargeError(f"{name} has more than {at_most} bytes")
        return data

    def body(self, name: str, start: int, version: str | None) -> tuple[Any, Stamp]:
        """The object from byte `start` on, and its stamp; of `version` only, if one is given."""
        condition = {"IfMatch": version} if version else {}
        part = {"Range": f"bytes={start}-"} if start else {}
        with self._named(name):
            answer = self._s3().get_object(Bucket=self._bucket, Key=self._key(name), **condition, **part)
        return answer["Body"], Stamp(start + answer["ContentLength"], answer["ETag"])

    def size(self, name: str) -> int | None:
        """Bytes of the object; None if there is none."""
        try:
            return self.stamp(name).size
        except MissingError:
            return None

    def put(self, name: str, data: bytes, *, only_new: bool = False) -> None:
        """Write a small object; with `only_new`, only where there is none.

        Raises:
            TakenError: `only_new`, and there is one already. It may be this call's own, whose answer was lost on the
                way: compare. StorageError: as `open`.
        """
        condition = {"IfNoneMatch": "*"} if only_new else {}
        try:
            with self._named(name):
                key = self._key(name)
                self._s3().put_object(Bucket=self._bucket, Key=key, Body=data, ChecksumAlgorithm="SHA256", **condition)
        except ChangedError:
            raise TakenError(
                f"{self.location}/{name} was written by another writer first, and stays as it is"
            ) from None

    def upload(self, name: str, path: Path) -> None:
        """Write the file at `path`, of any size: in parts, which nobody sees before all of them have arrived.

        Raises:
            StorageError: as `open`.
        """
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(
            multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE
        )
        with self._named(name):
            checked_by_store = {"ChecksumAlgorithm": "SHA256"}
            self._s3().upload_file(str(path), self._bucket, self._key(name), ExtraArgs=checked_by_store, Config=config)

    def delete(self, name: str) -> None:
        """Remove an object, if there is one."""
        with self._named(name):
            self._s3().delete_object(Bucket=self._bucket, Key=self._key(name))

    def _key(self, name: str) -> str:
        return f"{self._prefix}{checked(name)}"

    def _s3(self) -> Any:
        # boto3's sessions must not be made by two threads at once; its clients may be used by many.
        with _OPENING:
            if self._client is None:
                self._client = _client()
        return self._client

    def _named(self, name: str) -> _s3_errors_named:
        return _s3_errors_named(f"{self.location}/{name}".rstrip("/"), name)


_PASSING = {
    *("SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "OperationAborted", "ConditionalRequestConflict"),
    # The bytes that arrived are not those that were sent.
    *("BadDigest", "IncompleteBody", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"),
}
"""Answers that say nothing about the next attempt."""


class _s3_errors_named:
    """Turns what boto3 raises into `StorageError`s that say which object, why, and what to do."""

    def __init__(self, shown: str, name: str) -> None:
        self.shown, self.name = shown, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None or isinstance(error, StorageError):
            return
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            CredentialRetrievalError,
            NoCredentialsError,
            ParamValidationError,
            PartialCredentialsError,
            ProfileNotFound,
        )

        if isinstance(error, S3UploadFailedError):
            error = error.__context__
        if isinstance(error, ClientError):
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if code in ("NoSuchKey", "404", "NotFound"):
                raise MissingError(f"{self.name or self.shown} does not exist") from None
            if code in ("PreconditionFailed", "412"):
                raise ChangedError(f"{self.shown} changed while it was read; run the same command again") from None
            if code in ("NoSuchBucket",):
                raise StorageError(f"{self.shown}: there is no such bucket; correct the location") from None
            if code in ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden"):
                raise StorageError(
                    f"{self.shown}: access denied ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the "
                    "bucket's policy"
                ) from None
            if status >= 500 or code in _PASSING:
                raise UnreachableError(f"{self.shown}: the store answered {code}; run the same command again") from None
            raise StorageError(f"{self.shown}: the store answered {code}") from None
        # Waiting mends none of these settings.
        if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError | ProfileNotFound):
            raise StorageError(
                f"{self.shown}: no credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE to a profile that has them"
            ) from None
        if isinstance(error, ParamValidationError):
            raise StorageError(
                f"{self.shown} is no name that S3 allows; a bucket has letters, digits, dots and hyphens only: correct "
                "the location"
            ) from None
        if isinstance(error, ValueError) and str(error).startswith("Invalid endpoint"):
            raise StorageError(
                f"{self.shown}: the store has no valid address; AWS_ENDPOINT_URL must begin with http:// or https://, "
                "as in http://127.0.0.1:8333"
            ) from None
        if isinstance(error, BotoCoreError):
            raise UnreachableError(
                f"{self.shown}: the store can't be reached ({type(error).__name__}); check AWS_ENDPOINT_URL and the "
                "network, then run the same command again"
            ) from None


def _client() -> Any:
    import boto3
    from botocore.config import Config

    retries: Any = {"mode": "standard", "total_max_attempts": _ATTEMPTS}
    # Some calls upload several files at once, each in several parts.
    pool = 4 * _PARTS_AT_ONCE
    config = Config(retries=retries, connect_timeout=10, read_timeout=60, max_pool_connections=pool)
    return boto3.session.Session().client("s3", config=config)


class _Object(io.RawIOBase):
    """One object as a seekable stream; after a broken connection it goes on where it stopped."""

    def __init__(self, files: S3Files, name: str, stamp: Stamp | None) -> None:
        self._files, self._name, self._stamp = files, name, stamp
        self._at = 0
        self._body: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END and self._stamp is None:
            self._stamp = self._files.stamp(self._name)
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._stamp.size if self._stamp else 0}[whence]
        if origin + offset != self._at:
            self._drop()
            self._at = origin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        from botocore.exceptions import BotoCoreError

        view = memoryview(buffer).cast("B")
        for attempt in range(_ATTEMPTS):
            if self._stamp is not None and self._at >= self._stamp.size:
                return 0
            try:
                if self._body is None:
                    version = self._stamp.version if self._stamp else None
                    self._body, self._stamp = self._files.body(self._name, self._at, version)
                    if self._at >= self._stamp.size:
                        return 0
                data = self._body.read(len(view))
                # A connection that ends early reads as an end of file.
                if not data:
                    raise ConnectionError("the connection ended early")
                break
            except (BotoCoreError, OSError) as error:
                self._drop()
                if isinstance(error, StorageError):
                    raise
                if attempt == _ATTEMPTS - 1:
                    raise UnreachableError(
                        f"{self._files.location}/{self._name}: reading broke off {_ATTEMPTS} times at byte {self._at} "
                        f"({type(error).__name__}); check the network, then run the same command again"
                    ) from None
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None


def checked(name: object) -> str:
    """`name` with ``/`` between its parts.

    Raises:
        EscapeError: absolute, a drive, ``..`` or NUL.
    """
    text = str(name).replace("\\", "/")
    path = PurePosixPath(text)
    if path.is_absolute() or _DRIVE.match(text) or ".." in path.parts or "\0" in text:
        raise EscapeError(f"{name} must be relative to its folder and stay in it")
    return path.as_posix()


def download(files: Files, name: str, to: Path, digest: str, algorithm: str = "sha256") -> None:
    """Copy a file to `to`, which is there with this digest in the end, or not at all.

    Args:
        algorithm: of `digest`, as `hashlib` calls it.

    Raises:
        ChangedError: what the store gives has another digest, twice. DiskFullError: it does not fit on the disk.
        StorageError: as `Files.open`.
    """
    try:
        for _ in range(2):
            with tempfile.NamedTemporaryFile(dir=to.parent, prefix=".fetch-", delete=False) as copy:
                try:
                    found = _copy(files.open(name), copy, algorithm)
                    if found == digest:
                        # A temporary file is its owner's alone; an artifact is read by others too.
                        Path(copy.name).chmod(0o644)
                        Path(copy.name).replace(to)
                        return
                finally:
                    Path(copy.name).unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(to.parent, f"{files.location}/{name}") from None
        raise
    raise ChangedError(
        f"{files.location}/{name} has the digest {found[:12]}, not {digest[:12]} as its index says: the object is "
        "damaged or was replaced; push the artifact again with `dvc push`"
    )


def disk_full(folder: Path, what: str, needed: int | None = None) -> DiskFullError:
    """The error for `what`, of `needed` bytes, that does not fit below `folder`."""
    size = f"{needed / 2**30:.2f} GiB" if needed is not None else "it"
    return DiskFullError(
        f"{what}: the disk of {folder} is full ({shutil.disk_usage(folder).free / 2**30:.2f} GiB free, {size} needed); "
        "make room there, then run the same command again; nothing half-written stays"
    )


class Cache:
    """Copies of remote files on the local disk, at most `max_bytes` of them; the longest unused ones make room.

    Args:
        folder: made if it is not there; several processes may share it.
        max_bytes: bound on the copies; the one in use may exceed it alone.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def holds(self, digest: str, size: int) -> bool:
        """Whether a copy is there."""
        path = self.folder / digest
        return path.is_file() and path.stat().st_size == size

    def fetch(self, files: Files, name: str, digest: str, size: int, algorithm: str = "sha256") -> Path:
        """The local copy of a file that has this digest, fetched unless it is there. Raises as `download`."""
        path = self.folder / digest
        if self.holds(digest, size):
            os.utime(path)
            return path
        self._make_room(size)
        download(files, name, path, digest, algorithm)
        # It may be linked to from elsewhere, where nobody must write into it.
        path.chmod(0o444)
        # Others may have fetched at the same time, each for itself in bounds.
        self._make_room(0, path)
        return path

    def drop(self, digest: str) -> None:
        """Forget a copy that turned out to be damaged."""
        (self.folder / digest).unlink(missing_ok=True)

    def _make_room(self, size: int, but: Path | None = None) -> None:
        copies = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if not path.name.startswith("."):
                copies.append((status.st_mtime_ns, status.st_size, path))
        held = sum(one for _, one, _ in copies)
        for _, bytes_, path in sorted(copies):
            if held + size <= self.max_bytes:
                break
            if path == but:
                continue
            # A process that has it open keeps reading it.
            path.unlink(missing_ok=True)
            held -= bytes_


def _copy(stream: BinaryIO, to: Any, algorithm: str) -> str:
    digest = hashlib.new(algorithm)
    with stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            to.write(block)
    to.flush()
    return digest.hexdigest()
