"""Files to read, wherever they are: below a local folder or below an S3 prefix. The one module that knows boto3.

In: a location, ``../data/zebra_cot`` or ``s3://bucket/prefix``. Out: the names below it and their bytes, as a stream or
whole, with random access on both sides.
Always: a name can't leave its location, not even through a link; a stream from S3 goes on after a broken connection
where it stopped, and only if the object is still the same; nothing is held in memory but one block a stream.
Credentials and endpoint come from the environment, as for every AWS tool (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``).
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

_DRIVE = re.compile(r"^[A-Za-z]:")
_BLOCK = 1 << 20
_ATTEMPTS = 5


class StorageError(OSError):
    """A location that can't be read: which, why, and how to mend it."""


class MissingError(StorageError):
    """There is no such file."""


class EscapeError(StorageError):
    """A name that leads out of its location."""


class TooLargeError(StorageError):
    """A file larger than the reader wants to hold."""


class ChangedError(StorageError):
    """A file that is no longer what it was when it was opened."""


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

        Hidden files, and links that leave the location, are left out.

        Raises:
            StorageError: the location does not exist or can't be listed.
        """

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
        if not self.root.is_dir():
            raise StorageError(f"{self.root} {'is no folder' if self.root.exists() else 'does not exist'}")
        found = []
        for folder, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                path = Path(folder, name)
                # What stands before the name counts as well: "/train.json" asks for one in some folder.
                relative = path.relative_to(self.root).as_posix()
                if name.startswith(".") or (suffixes and not relative.endswith(suffixes)):
                    continue
                # A link is listed only if a reader would follow it.
                if path.is_file() and (not path.is_symlink() or path.resolve().is_relative_to(self._resolved)):
                    found.append(relative)
        return sorted(found)

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
    """Objects below an S3 prefix. See `Files`."""

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

    def _key(self, name: str) -> str:
        return f"{self._prefix}{checked(name)}"

    def _s3(self) -> Any:
        if self._client is None:
            import boto3
            from botocore.config import Config

            retries: Any = {"mode": "standard", "total_max_attempts": _ATTEMPTS}
            config = Config(retries=retries, connect_timeout=10, read_timeout=60)
            self._client = boto3.session.Session().client("s3", config=config)
        return self._client

    def _named(self, name: str) -> _s3_errors_named:
        return _s3_errors_named(f"{self.location}/{name}".rstrip("/"), name)


class _s3_errors_named:
    """Turns what boto3 raises into `StorageError`s that say which object, why, and what to do."""

    def __init__(self, shown: str, name: str) -> None:
        self.shown, self.name = shown, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None or isinstance(error, StorageError):
            return
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        if isinstance(error, ClientError):
            code = str(error.response.get("Error", {}).get("Code", ""))
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
            raise StorageError(f"{self.shown}: the store answered {code}") from None
        if isinstance(error, NoCredentialsError):
            raise StorageError(
                f"{self.shown}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from None
        if isinstance(error, BotoCoreError):
            raise StorageError(
                f"{self.shown}: the store can't be reached ({type(error).__name__}); check AWS_ENDPOINT_URL and the "
                "network, then run the same command again"
            ) from None


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
                    raise StorageError(
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


class Cache:
    """Copies of remote files on the local disk, at most `max_bytes` of them; the longest unused ones make room.

    Args:
        folder: made if it is not there; several processes may share it.
        max_bytes: bound on the copies; the one in use may exceed it alone.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, files: Files, name: str, sha256: str, size: int) -> Path:
        """The local copy of a file that has this digest, fetched unless it is there.

        Raises:
            ChangedError: what the store gives has another digest, twice. StorageError: as `Files.open`.
        """
        path = self.folder / sha256
        if path.is_file() and path.stat().st_size == size:
            os.utime(path)
            return path
        self._make_room(size)
        for _ in range(2):
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".fetch-", delete=False) as copy:
                try:
                    digest = _copy(files.open(name), copy)
                    if digest == sha256:
                        Path(copy.name).replace(path)
                        return path
                finally:
                    Path(copy.name).unlink(missing_ok=True)
        raise ChangedError(
            f"{files.location}/{name} has the digest {digest[:12]}, not {sha256[:12]} as its index says: the object is "
            "damaged or was replaced; push the artifact again with `dvc push`"
        )

    def drop(self, sha256: str) -> None:
        """Forget a copy that turned out to be damaged."""
        (self.folder / sha256).unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
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
            # A process that has it open keeps reading it.
            path.unlink(missing_ok=True)
            held -= bytes_


def _copy(stream: BinaryIO, to: Any) -> str:
    digest = hashlib.sha256()
    with stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            to.write(block)
    to.flush()
    return digest.hexdigest()
