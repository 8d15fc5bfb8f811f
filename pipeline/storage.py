"""The only file that opens URLs: local paths, s3://, and anything else that fsspec knows.

Objects are written whole. What proves something (token shards, manifests, tokenizers) is written once and never
again; only views that are made anew from it (reports) may be replaced.

Endpoint, region and keys of S3 come from where S3 clients have them (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_PROFILE, ~/.aws, the machine's role), or from `configure`.
"""

import contextlib
import errno
import io
import json
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline import s3
from pipeline.errors import UnsafeStorage
from pipeline.readahead import ReadAhead
from pipeline.retries import http_status, patiently

R = TypeVar("R")
Options = dict[str, dict[str, Any]]  # protocol to what fsspec's file system of it takes
TEMPORARY = ".tmp-"  # local files in the making, and probes; a killed writer leaves its own behind
CREATE_ONLY = "TOKENMILL_CREATE_ONLY"  # environment variable: SERVER, which is the default, or CHECKED
SERVER, CHECKED = "server", "checked"
TRIES = 3  # of requests by a client that tries again by itself
WRITE_S, WRITE_BYTES_PER_S = 60, 250_000  # a slower write counts as stalled: nothing else notices a peer that is gone


@dataclass(frozen=True)
class Found:
    """An object that is there. `version` changes with its content: the ETag, or a local file's mtime in ns."""

    url: str
    num_bytes: int | None  # None where a server does not tell
    version: str | None


def environment(options: Options, create_only: str = SERVER) -> dict[str, str]:
    """The variables that give these options to every process that has them, so to Ray's workers by `runtime_env`.

    options: such as {"s3": {"endpoint_url": "http://127.0.0.1:8333", "profile": "lab"}}; what the usual AWS_*
    variables say need not stand here. create_only: see `write_once`. Raises ValueError if JSON cannot hold them.
    """
    if create_only not in (SERVER, CHECKED):
        raise ValueError(f"create-only writes by {create_only!r}: choose {SERVER!r} or {CHECKED!r}")
    try:
        given = {f"FSSPEC_{protocol.upper()}": json.dumps(kwargs) for protocol, kwargs in options.items()}
    except TypeError as error:
        raise ValueError(f"storage options {options}: {error}; give text, numbers, lists and mappings") from error
    return {**given, CREATE_ONLY: create_only}


def configure(options: Options, create_only: str = SERVER) -> None:
    """Gives the options to this process and to those that it starts from now on. For what raises see `environment`."""
    os.environ.update(environment(options, create_only))
    fsspec.config.set_conf_env(fsspec.config.conf)


def normalise(url: str) -> str:
    """One spelling per place: local paths absolute, without file://; no slash at the end."""
    url = str(url)
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    if "://" not in url:
        url = os.path.abspath(os.path.expanduser(url))
    return url.rstrip("/")


def join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *parts])


def locate(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path on it, for other libraries to use: it tries again by itself, a few times.

    Our own code uses the functions below, which are more patient.
    """
    return _locate(url, TRIES)


def is_local(fs: AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def read(url: str, start: int = 0, end: int | None = None) -> bytes:
    """The whole object, or its bytes [start, end).

    Raises FileNotFoundError, PermissionError, or StorageError once patience has run out.
    """
    fs, path = _locate(url)
    if (start, end) != (0, None):
        return _ask("read", url, lambda: fs.cat_file(path, start=start, end=end))
    one_request = {"max_concurrency": 1} if s3.is_s3(url) else {}  # else s3fs asks for the size first
    return _ask("read", url, lambda: fs.cat_file(path, **one_request))


def open_stream(url: str, version: str | None = None) -> IO[bytes]:
    """For reading from front to back; from S3 with read-ahead, in memory that does not grow with the object.

    All of it is one version of the object: the given one, or else that of this moment. Raises ReplacedObject, here or
    in a later read, where there is another one. Elsewhere than on S3 and local disks nobody checks.
    """
    fs, path = _locate(url)
    if not s3.is_s3(url):
        stream = _ask("read", url, lambda: fs.open(path, "rb"))
        if version is not None and is_local(fs):
            s3.refuse_other(url, str(os.fstat(stream.fileno()).st_mtime_ns), version)
        return stream
    info = _ask("read", url, lambda: fs.info(path))
    if info["type"] != "file":
        raise FileNotFoundError(f"{url} is a folder")
    there = s3.version_of(info)
    if version is not None:
        s3.refuse_other(url, there, version)

    def fetch(start: int, end: int, given_up: threading.Event) -> bytes:
        return _ask("read", url, lambda: s3.get_range(fs, url, start, end, there), given_up)

    return io.BufferedReader(ReadAhead(fetch, info["size"]), buffer_size=2**18)


def find(url: str) -> Found | None:
    """None if there is no such object, or none that we may see."""
    fs, path = _locate(url)
    try:
        return _found(fs, _ask("look at", url, lambda: fs.info(path)), url)
    except (FileNotFoundError, PermissionError):
        return None


def exists(url: str) -> bool:
    return find(url) is not None


def glob(pattern: str) -> list[Found]:
    """Objects that match, sorted by URL; from listings alone, however many they are."""
    fs, path = locate(pattern)  # with tries of its own: lest one page's error begin a long listing anew
    found = _ask("list", pattern, lambda: fs.glob(path, detail=True))
    return sorted(_files(fs, found.values(), pattern), key=lambda file: file.url)


def scan(folder: str) -> list[Found]:
    """The files right in the folder, sorted by URL; [] if there is no such folder."""
    fs, infos = _listing(folder)
    names = [(file.url.rsplit("/", 1)[1], file) for file in _files(fs, infos, folder)]
    return [file for name, file in names if name and not name.startswith(TEMPORARY)]


def list_files(folder: str) -> list[str]:
    """URLs of the files right in the folder, sorted; [] if there is no such folder."""
    return [file.url for file in scan(folder)]


def list_folders(folder: str) -> list[str]:
    """URLs of the folders right in the folder, sorted."""
    fs, infos = _listing(folder)
    return [_as_url(fs, info["name"].rstrip("/"), folder) for info in infos if info["type"] == "directory"]


def write_once(url: str, data: bytes) -> None:
    """Creates the object, whole and atomically. Raises FileExistsError if it is there: then it is left as it is.

    Not on local disks: an object of the very same bytes counts as this call's own, for it cannot be told from one
    whose answer got lost on the way (the HTTP client itself sends a request again, without a word).
    Where the server does not honour create-only writes (`check_create_only`), `configure(..., create_only="checked")`
    looks, writes and reads back. That is safe with one driver at a time; with two, each may believe that it was
    first, and the later one's bytes stand.
    """
    fs, path = _locate(url)
    if is_local(fs):
        return _create_local(Path(path), data)
    if os.environ.get(CREATE_ONLY, SERVER) == CHECKED:
        if not exists(url):
            replace(url, data)
    else:
        try:
            return _put(url, data, mode="create")
        except OSError as error:
            # servers name a failed condition in their own words, and s3fs knows only some of them
            if not isinstance(error, FileExistsError) and http_status(error) != 412:
                raise
    with contextlib.suppress(FileNotFoundError):  # removed since: it was there all the same
        if read(url) == data:
            return
    raise FileExistsError(f"{url} is already there")


def check_create_only(folder: str) -> None:
    """Writes a small object into the folder twice, to see whether the second write is refused; then removes it.

    Raises UnsafeStorage if it is not, PermissionError if these keys may not write there.
    """
    url = join(folder, f"{TEMPORARY}probe-{uuid.uuid4().hex}")
    advice = (
        "two drivers on one output could undo each other's work. Have the server updated or take another; "
        f"or set create_only to {CHECKED!r} if never more than one driver at a time writes there"
    )
    try:
        write_once(url, b"first")
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        raise UnsafeStorage(f"{folder}: the server has no create-only writes ({error}), so {advice}") from error
    try:
        with contextlib.suppress(FileExistsError):
            write_once(url, b"second")
        if read(url) != b"first":
            raise UnsafeStorage(f"{folder}: the server overwrites what it is told only to create, so {advice}")
    finally:
        remove(url)


def replace(url: str, data: bytes) -> None:
    """Writes the object whole, over what was there. For reports and notes, never for what proves something."""
    fs, path = _locate(url)
    if is_local(fs):
        with _temporary_beside(Path(path), data) as temporary:
            os.replace(temporary, path)
        return
    _put(url, data)


def remove(url: str) -> None:
    fs, path = _locate(url)
    with contextlib.suppress(FileNotFoundError):
        _ask("remove", url, lambda: fs.rm_file(path))


def upload(folder: str | Path, url: str) -> None:
    """Writes each file of a local folder, in the order of their names. The last one, written once, is the commit:
    what lies there without it was left by a run that died, and is written anew.
    """
    *others, last = sorted(Path(folder).iterdir())
    if exists(join(url, last.name)):
        raise FileExistsError(f"{url} is already there")
    for file in others:
        replace(join(url, file.name), file.read_bytes())
    write_once(join(url, last.name), last.read_bytes())


@contextlib.contextmanager
def downloaded(url: str):
    """The files of a folder as a local folder, which lives as long as the context."""
    fs, path = _locate(url)
    if is_local(fs):
        if not Path(path).is_dir():
            raise FileNotFoundError(f"{url} is no folder")
        yield Path(path)
        return
    files = list_files(url)
    if not files:
        raise FileNotFoundError(f"{url} holds no files")
    with tempfile.TemporaryDirectory() as local:
        for file in files:
            (Path(local) / file.rsplit("/", 1)[1]).write_bytes(read(file))
        yield Path(local)


def _locate(url: str, tries: int = 1) -> tuple[Any, str]:
    """As `locate`; with one try, since `_ask` tries again."""
    # a cached listing would hide what other workers have written since
    options: dict[str, Any] = {"use_listings_cache": False}
    if s3.is_s3(url):
        options["config_kwargs"] = s3.client_settings(_given("s3"), tries)
    fs, path = fsspec.core.url_to_fs(normalise(url), **options)
    if s3.is_s3(url):
        fs.retries = tries
    return fs, path


def _given(protocol: str) -> dict[str, Any]:
    """Options from `configure`, FSSPEC_* variables and ~/.config/fsspec."""
    return fsspec.config.conf.get(protocol, {})


def _ask(what: str, url: str, call: Callable[[], R], given_up: threading.Event | None = None) -> R:
    """What the call returns, patiently. Raises PermissionError that says who may not do what, and as `patiently`."""
    try:
        return patiently(call, url, given_up)
    except Exception as error:
        if s3.is_s3(url) and (refusal := s3.refusal(error, what, url, _given("s3"))) is not None:
            raise refusal from error
        raise


def _put(url: str, data: bytes, **options: Any) -> None:
    fs, path = _locate(url)
    if s3.is_s3(url):
        options["chunksize"] = s3.PART_BYTES
    if fs.async_impl:
        options["timeout"] = WRITE_S + len(data) / WRITE_BYTES_PER_S
    _ask("write", url, lambda: fs.pipe_file(path, data, **options))


def _listing(folder: str) -> tuple[AbstractFileSystem, list[dict[str, Any]]]:
    """What is right in the folder, sorted; nothing if there is no such folder."""
    fs, path = locate(folder)
    try:
        return fs, sorted(_ask("list", folder, lambda: fs.ls(path, detail=True)), key=lambda info: info["name"])
    except FileNotFoundError:
        return fs, []


def _files(fs: AbstractFileSystem, infos: Iterable[dict[str, Any]], like: str) -> Iterator[Found]:
    for info in infos:
        if info["type"] == "file" or info.get("islink"):
            try:
                yield _found(fs, info, like)
            except FileNotFoundError:  # a link to nothing, or removed since: who reads it is told so
                yield Found(_as_url(fs, info["name"], like), None, None)


def _found(fs: AbstractFileSystem, info: dict[str, Any], like: str) -> Found:
    size = info["size"]
    return Found(_as_url(fs, info["name"], like), None if size is None else int(size), _version(fs, info))


def _version(fs: AbstractFileSystem, info: dict[str, Any]) -> str | None:
    if is_local(fs):
        return str(os.stat(info["name"]).st_mtime_ns)  # fsspec's own is a float, which rounds
    return s3.version_of(info)


def _as_url(fs: AbstractFileSystem, path: str, like: str) -> str:
    return path if is_local(fs) else f"{like.split('://')[0]}://{path.lstrip('/')}"


def _create_local(path: Path, data: bytes) -> None:
    if path.exists():
        raise FileExistsError(f"{path} is already there")
    with _temporary_beside(path, data) as temporary:
        os.link(temporary, path)  # atomic, and fails if another writer was first


@contextlib.contextmanager
def _temporary_beside(path: Path, data: bytes):
    """The data in a file of the same folder, durable, gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
