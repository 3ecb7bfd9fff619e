"""What predict.py --ray scores: images in folders, lists and object stores, and why the rest is left out."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from csad.data.files import from_csv_text
from csad.data.image_files import SUFFIXES
from csad.errors import UserError
from csad.inference.folders import images_in, is_url, no_images, state_of
from csad.inference.inspection import InMemory

LISTS = (".csv", ".parquet")
ROWS = 10_000  # of a Parquet list, read at once
MAX_OBJECT = 2**29  # bytes; objects are read into memory


class Image(NamedTuple):
    """A path or URL, and what tells whether it is still the same file; None where nothing does."""

    name: str
    bytes: int | None
    changed_ns: int | None


class ClusterInputs:
    """The images of all paths, each once, in the order of the paths; folders are sorted.

    Args:
        paths: images, folders, lists and URLs of these.
        column: of lists, in which an image's path (relative to the current folder) or URL stands.
        output: what lies there is our own.

    Attributes:
        images: to be scored.
        left_out: names of what is not, by the reason.
        count: number of all these.

    Raises:
        UserError: a path or column does not exist or cannot be read, or there is no image.
    """

    def __init__(self, paths: Sequence[Path | str], column: str, output: Path):
        self.images: list[Image] = []
        self.left_out: dict[str, list[str]] = {}
        self._seen: set[str] = set()
        for path in paths:
            url = str(path) if is_url(path) else None
            suffix = PurePosixPath(urlsplit(url).path if url else path).suffix.lower()
            if suffix in LISTS:
                self._add_list(path, suffix, column)
            elif url:
                self._add_url(url)
            else:
                self._add_path(Path(path), output)
        del self._seen
        self.count = len(self.images) + sum(map(len, self.left_out.values()))
        if not self.images:
            raise no_images(paths)

    def _add(self, name: str, size: int | None, changed_ns: int | None) -> None:
        if name in self._seen:
            self._leave_out(name, "they are named more than once")
            return
        self._seen.add(name)
        self.images.append(Image(name, size, changed_ns))

    def _leave_out(self, name: str, reason: str) -> None:
        self.left_out.setdefault(reason, []).append(name)

    def _add_path(self, path: Path, output: Path) -> None:
        if not path.is_dir():
            if not path.exists() and not path.is_symlink():
                raise _missing(path)
            self._add(str(path), *state_of(path).values())
            return
        listed, left_out = images_in(path, output)
        for image, state in listed.items():
            self._add(str(image), *state)
        for other in left_out:
            self._leave_out(str(other), "they are not images")

    def _add_url(self, url: str) -> None:
        with problems_of(url):
            from pyarrow import fs

            files, path = file_system(url)
            info = files.get_file_info(path)
            if info.type == fs.FileType.NotFound:
                raise _missing(url)
            if info.type == fs.FileType.File:
                self._add(url, info.size, info.mtime_ns)
                return
            below = files.get_file_info(fs.FileSelector(path, recursive=True))
        base, mark, query = url.partition("?")
        below = [entry for entry in below if entry.type == fs.FileType.File]
        for info in sorted(below, key=lambda entry: entry.path):
            relative = info.path[len(path.rstrip("/")) + 1 :]
            name = f"{base.rstrip('/')}/{quote(relative)}{mark}{query}"
            if relative.lower().endswith(SUFFIXES):
                self._add(name, info.size, info.mtime_ns)
            else:
                self._leave_out(name, "they are not images")

    def _add_list(self, path: Path | str, suffix: str, column: str) -> None:
        rows = _csv if suffix == ".csv" else _parquet
        for number, name in enumerate(rows(path, column), 1):
            if name:
                # Of a URL nothing more is asked: that would be a request for each.
                state = (None, None) if is_url(name) else state_of(Path(name)).values()
                self._add(name, *state)
            else:
                self._leave_out(f"row {number} of {path}", "their row in the list is empty")


def _missing(path: Path | str) -> UserError:
    return UserError(f"there is no {path}; name an image, a list or a folder of images")


def source_of(name: str) -> Path | InMemory:
    """What `read_picture` takes for an image's path or URL; UserError if an object cannot be read."""
    if not is_url(name):
        return Path(name)
    with problems_of(f"image {name}"):
        files, path = file_system(name)
        with files.open_input_stream(path) as stream:
            content = stream.read(MAX_OBJECT + 1)
    if len(content) > MAX_OBJECT:
        raise UserError(f"image {name} is larger than {MAX_OBJECT // 2**20} MB; make it smaller")
    return InMemory(content, name)


def is_passing(problem: BaseException | None) -> bool:
    """Whether it is the object store's or the network's, rather than the object's: then no image is called unreadable."""
    of_object = isinstance(problem, (FileNotFoundError, PermissionError)) or any(
        phrase in str(problem).lower() for phrase in ("denied", "a directory", "non-file")
    )
    return isinstance(problem, OSError) and not of_object


def file_system(url: str) -> tuple[Any, str]:
    """The pyarrow file system of a URL, and the path in it; one for all URLs of a bucket, which keeps its connections.

    Raises:
        UserError: the URL holds a password, which would stand in every line of the output.
        ValueError: it is none that pyarrow reads.
    """
    parts = urlsplit(url)
    if parts.password:
        raise UserError(
            f"a URL of {parts.hostname} holds a password; give it in the environment, as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, on every node"
        )
    files, top = _file_system(parts.scheme, parts.netloc, parts.query)
    return files, f"{top.rstrip('/')}/{unquote(parts.path).lstrip('/')}"


@functools.lru_cache(32)
def _file_system(scheme: str, host: str, query: str) -> tuple[Any, str]:
    from pyarrow import fs

    return fs.FileSystem.from_uri(f"{scheme}://{host}/" + (f"?{query}" if query else ""))


@contextmanager
def problems_of(path: Path | str) -> Iterator[None]:
    """Tell in a sentence why a list or an object store cannot be read; pyarrow's errors are OSError and ValueError."""
    try:
        yield
    except FileNotFoundError as problem:
        raise UserError(f"{path} is missing") from problem
    except (OSError, ValueError, NotImplementedError, csv.Error) as problem:
        raise UserError(f"{path} cannot be read ({str(problem).splitlines()[0][:200]})") from problem


def _opened(path: Path | str) -> Any:
    if not is_url(path):
        return open(path, "rb")
    files, name = file_system(str(path))
    return files.open_input_file(name)


def _csv(path: Path | str, column: str) -> Iterator[str]:
    with (
        problems_of(path),
        io.TextIOWrapper(_opened(path), "utf-8-sig", "surrogateescape", newline="") as handle,
    ):
        rows = csv.DictReader(handle)
        _require_column(column, rows.fieldnames or [], path)
        for row in rows:
            yield from_csv_text(row[column] or "")


def _parquet(path: Path | str, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    with problems_of(path), _opened(path) as handle:
        table = parquet.ParquetFile(handle)
        _require_column(column, table.schema_arrow.names, path)
        for rows in table.iter_batches(ROWS, columns=[column]):
            for name in rows.column(0).cast(pyarrow.string()).to_pylist():
                yield name or ""


def _require_column(column: str, names: Sequence[str], path: Path | str) -> None:
    if column not in names:
        raise UserError(
            f"{path} has no column '{column}', but {', '.join(names) or 'none at all'}; name the one with the "
            "images' paths or URLs with --column"
        )
