"""What predict.py --ray scores: images in folders, lists and object stores, and why the rest is left out."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from csad.data.files import from_csv_text
from csad.data.image_files import SUFFIXES
from csad.errors import UserError
from csad.inference.folders import images_in, is_url, no_images
from csad.inference.inspection import InMemory, state_of

LISTS = (".csv", ".parquet")
ROWS = 10_000  # of a Parquet list, read at once
LARGEST_OBJECT = 2**29  # bytes; objects are read into memory


class Image(NamedTuple):
    """A path or URL, and what tells whether it is still the same file; None where nothing does."""

    name: str
    bytes: int | None
    changed_ns: int | None


class Sources:
    """The images of all places, each once, in the order of the places; folders are sorted.

    Args:
        places: images, folders, lists and URLs of these.
        column: of lists, in which an image's path (relative to the current folder) or URL stands.
        output: what lies there is our own.

    Attributes:
        images: to be scored.
        left_out: names of what is not, by the reason.
        found: number of all these.

    Raises:
        UserError: a place or column does not exist or cannot be read, or there is no image.
    """

    def __init__(self, places: Sequence[Path | str], column: str, output: Path):
        self.images: list[Image] = []
        self.left_out: dict[str, list[str]] = {}
        self._seen: set[str] = set()
        for place in places:
            suffix = PurePosixPath(urlsplit(place).path if is_url(place) else place).suffix.lower()
            if suffix in LISTS:
                self._add_list(place, suffix, column)
            elif is_url(place):
                self._add_url(place)
            else:
                self._add_path(place, output)
        del self._seen
        self.found = len(self.images) + sum(map(len, self.left_out.values()))
        if not self.images:
            raise no_images(places)

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
                raise UserError(f"there is no {path}; name an image, a list or a folder of images")
            self._add(str(path), *state_of(path).values())
            return
        listed, others = images_in(path, output)
        for image, state in listed.items():
            self._add(str(image), *state)
        for other in others:
            self._leave_out(str(other), "they are no images")

    def _add_url(self, url: str) -> None:
        with problems_of(url):
            from pyarrow import fs

            files, path = file_system(url)
            info = files.get_file_info(path)
            if info.type == fs.FileType.NotFound:
                raise UserError(f"there is no {url}; name an image, a list or a folder of images")
            if info.type == fs.FileType.File:
                self._add(url, info.size, info.mtime_ns)
                return
            below = files.get_file_info(fs.FileSelector(path, recursive=True))
        base, mark, query = url.partition("?")
        for info in sorted((one for one in below if one.type == fs.FileType.File), key=lambda one: one.path):
            relative = info.path[len(path.rstrip("/")) + 1 :]
            name = f"{base.rstrip('/')}/{quote(relative)}{mark}{query}"
            if relative.lower().endswith(SUFFIXES):
                self._add(name, info.size, info.mtime_ns)
            else:
                self._leave_out(name, "they are no images")

    def _add_list(self, place: Path | str, suffix: str, column: str) -> None:
        rows = _csv if suffix == ".csv" else _parquet
        for number, name in enumerate(rows(place, column), 1):
            if name:
                # Of a URL nothing more is asked: that would be a request for each.
                self._add(name, *((None, None) if is_url(name) else state_of(Path(name)).values()))
            else:
                self._leave_out(f"row {number} of {place}", "their row in the list is empty")


def source_of(name: str) -> Path | InMemory:
    """What `read_picture` takes for an image's path or URL.

    Raises:
        UserError: an object cannot be read.
    """
    if not is_url(name):
        return Path(name)
    with problems_of(f"image {name}"):
        files, path = file_system(name)
        with files.open_input_stream(path) as stream:
            content = stream.read(LARGEST_OBJECT + 1)
    if len(content) > LARGEST_OBJECT:
        raise UserError(f"image {name} is larger than {LARGEST_OBJECT // 2**20} MB; make it smaller")
    return InMemory(content, name)


def is_passing(problem: BaseException | None) -> bool:
    """Whether it is the object store's or the network's, rather than the object's: then no image is called unreadable."""
    of_object = isinstance(problem, (FileNotFoundError, PermissionError)) or any(
        words in str(problem).lower() for words in ("denied", "a directory", "non-file")
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


class problems_of:
    """Tell in a sentence why a list or an object store cannot be read; pyarrow's errors are OSError and ValueError."""

    def __init__(self, place: Path | str):
        self.place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, problem: Any, traceback: Any) -> None:
        if isinstance(problem, FileNotFoundError):
            raise UserError(f"{self.place} is missing") from problem
        if isinstance(problem, (OSError, ValueError, NotImplementedError, csv.Error)):
            raise UserError(
                f"{self.place} cannot be read ({str(problem).splitlines()[0][:200]})"
            ) from problem


def _opened(place: Path | str) -> Any:
    if not is_url(place):
        return open(place, "rb")
    files, path = file_system(place)
    return files.open_input_file(path)


def _csv(place: Path | str, column: str) -> Iterator[str]:
    with (
        problems_of(place),
        io.TextIOWrapper(_opened(place), "utf-8-sig", "surrogateescape", newline="") as handle,
    ):
        rows = csv.DictReader(handle)
        _require_column(column, rows.fieldnames or [], place)
        for row in rows:
            yield from_csv_text(row[column] or "")


def _parquet(place: Path | str, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    with problems_of(place), _opened(place) as handle:
        table = parquet.ParquetFile(handle)
        _require_column(column, table.schema_arrow.names, place)
        for rows in table.iter_batches(ROWS, columns=[column]):
            for name in rows.column(0).cast(pyarrow.string()).to_pylist():
                yield name or ""


def _require_column(column: str, names: Sequence[str], place: Path | str) -> None:
    if column not in names:
        raise UserError(
            f"{place} has no column '{column}', but {', '.join(names) or 'none at all'}; name the one with the "
            "images' paths or URLs with --column"
        )
