"""From a request's body to a picture, with a sentence for everything that is none."""

from __future__ import annotations

import ctypes
import sys
from datetime import datetime, timezone
from pathlib import Path

from csad.data import image_files
from csad.errors import UserError
from csad.inference.engines import Engine
from csad.inference.inspection import InMemory, Picture, read_picture
from csad.station.gate import RequestError

from fastapi import Request
from PIL import UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

MAX_NAME = 200  # characters of a picture's name
SENT = image_files.Wording("picture", "send another one", "send each as a file of its own")


def plain_name(text: str) -> Path:
    """What a sender calls a picture, without folders and whatever does not print; of one without a name, when it came (UTC)."""
    last = text.replace("\\", "/").rstrip("/").rpartition("/")[2]
    name = "".join(letter for letter in last if letter.isprintable())[-MAX_NAME:].strip()
    if name in ("", ".", ".."):
        name = f"picture-{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}"
    return Path(name)


async def received_from(request: Request) -> tuple[bytes, str]:
    """The picture's bytes and the file name that comes with them."""
    name = ""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data":
        try:
            form = await request.form(max_files=1, max_fields=10)
        except (HTTPException, ClientDisconnect):
            raise
        except Exception as problem:  # a character set that is none, a header that the parser did not expect
            raise RequestError(
                400, "the form cannot be read; send one file as multipart/form-data"
            ) from problem
        try:
            file = next((value for value in form.values() if isinstance(value, UploadFile)), None)
            if file is None:
                raise RequestError(422, "there is no file in the form; send the picture as a file")
            content, name = await file.read(), file.filename or ""
        finally:
            await form.close()
    else:
        content = await request.body()
    if not content:
        raise RequestError(422, "there is no picture: the body is empty")
    return content, name


def decoded_bytes(content: bytes, name: Path, max_pixels: int) -> int:
    """Bytes of a picture once decoded, from its header.

    Args:
        max_pixels: limit; the limit on bytes is that of as many pixels in 8-bit RGBA.

    Raises:
        RequestError: the picture is larger, has an unsupported format or a damaged header.
    """
    try:
        with image_files.opened(InMemory(content, name, SENT)) as image:
            (width, height), size = image.size, image_files.decoded_bytes(image)
    except UserError as problem:
        if isinstance(problem, image_files.TooLarge):
            raise RequestError(413, str(problem)) from problem
        status = 415 if isinstance(problem.__cause__, UnidentifiedImageError) else 422
        raise RequestError(status, str(problem)) from problem
    if width * height > max_pixels:
        raise RequestError(
            413, f"picture {name} has {width} x {height} pixels, more than {max_pixels}; make it smaller"
        )
    if size > 4 * max_pixels:
        raise RequestError(
            413,
            f"picture {name} has {width} x {height} pixels and takes {size / 1e6:.0f} MB when decoded, "
            f"more than {4 * max_pixels / 1e6:.0f}; make it smaller, or send it with 8 bits per channel",
        )
    return size


def decoded(content: bytes, name: Path, engine: Engine, shown_side: int | None) -> Picture:
    """Decode a picture; RequestError if it is damaged, or neither it nor the model says which value is
    white."""
    picture = read_picture(InMemory(content, name, SENT), name, engine, shown_side)
    if picture.view is None:
        raise RequestError(422, picture.problem)
    return picture


def decoded_alone(content: bytes, name: Path, engine: Engine, shown_side: int | None) -> Picture:
    """`decoded`, then give freed memory back to the system, which glibc would keep: for large pictures."""
    try:
        return decoded(content, name, engine, shown_side)
    finally:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        if trim is not None:
            trim(0)
