"""The output of predict.py --ray: one file for each shard of the images, there as a whole or not at all."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csad.cluster.sources import Image
from csad.data import files
from csad.data.records import digest_lines
from csad.errors import DAMAGED

MAX_IMAGES = 1000  # images in a shard: what is lost where a worker dies
MIN_SHARDS = 64  # of many images, so that many workers have something to do


class Shard(NamedTuple):
    """Images that are scored by one worker and written to one file.

    Attributes:
        images: of each the name, bytes and time of change, as JSON.
        digest: of all that decides what its lines say.
    """

    index: int  # type: ignore[assignment]  # hides the method of tuples
    count: int  # type: ignore[assignment]  # as above
    images: str
    digest: str


def shards_of(
    images: Sequence[Image], batch_size: int, made_with: Sequence[Any], size: int | None = None
) -> Iterator[Shard]:
    """Cut a list into shards of whole batches, which then are the same as without shards.

    Args:
        made_with: what decides the lines besides the images: model, threshold.
        size: images in a shard; None: so many that there are enough shards, and none is too large.
    """
    images_each = size or min(MAX_IMAGES, len(images) // MIN_SHARDS)
    step = max(1, images_each // batch_size) * batch_size
    for index, start in enumerate(range(0, len(images), step)):
        text = json.dumps(images[start : start + step])
        digest = digest_lines([json.dumps([made_with, batch_size, text])])
        yield Shard(index, len(images[start : start + step]), text, digest)


class Shards:
    """Files part-INDEX-DIGEST.jsonl or .parquet in a folder; the digest tells whether one is what this run would write.

    Args:
        kind: jsonl or parquet.
    """

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind

    def path(self, shard: Shard) -> Path:
        return self.folder / f"part-{shard.index:06d}-{shard.digest}.{self.kind}"

    def keep_only(self, shards: Sequence[Shard]) -> None:
        """Remove what earlier runs wrote of other images, or with another model."""
        current = {self.path(shard).name for shard in shards}
        for path in self.folder.glob("part-*") if self.folder.is_dir() else ():
            if path.name not in current:
                path.unlink()

    def verdicts(self, shard: Shard) -> Counter | None:
        """How often each verdict stands in a shard's file; None where there is none, or not the whole."""
        try:
            if self.kind == "jsonl":
                with open(self.path(shard), encoding="utf-8") as lines:
                    counts = Counter(json.loads(line)["verdict"] for line in lines)
            else:
                from pyarrow import parquet

                counts = Counter(
                    parquet.read_table(self.path(shard), columns=["verdict"]).column(0).to_pylist()
                )
        except (OSError, *DAMAGED):
            return None
        return counts if counts.total() == shard.count else None

    def write(self, shard: Shard, lines: bytes) -> None:
        """Write predictions.jsonl's lines, as they are or as a table."""
        files.write_bytes(self.path(shard), lines if self.kind == "jsonl" else as_parquet(lines))


def as_parquet(lines: bytes) -> bytes:
    """predictions.jsonl's lines as a table with the same fields, of the same types in every shard."""
    import pyarrow
    from pyarrow import parquet

    text, number, whole = pyarrow.string(), pyarrow.float64(), pyarrow.int64()
    component = {
        "component": whole,
        "place": text,
        "area": number,
        "normal_area": number,
        "deviation": number,
        "above_all": text,
        "name": text,
        "words": text,
    }
    schema = pyarrow.schema(
        {
            "image": text,
            "verdict": text,
            "score": number,
            "threshold": number,
            "contributions": pyarrow.map_(text, number),
            "alarm": text,
            "unusual": pyarrow.list_(whole),
            "findings": pyarrow.list_(text),
            "components": pyarrow.list_(pyarrow.struct(component)),
            "problem": text,
            "note": text,
            "bytes": whole,
            "changed_ns": whole,
        }
    )
    rows = [json.loads(line) for line in lines.splitlines()]
    for row in rows:
        row["image"], row["problem"] = as_text(row["image"]), row["problem"] and as_text(row["problem"])
        row["findings"] = [as_text(finding) for finding in row["findings"]]
        row["contributions"] = row["contributions"] and list(row["contributions"].items())
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), buffer)
    return buffer.getvalue()


def as_text(name: str) -> str:
    """A name that need not be text as it stands in predictions.csv."""
    return name.encode(errors="backslashreplace").decode()
