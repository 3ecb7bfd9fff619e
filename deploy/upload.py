"""From a request's body to a picture, with a sentence for everything that is none."""

from __future__ import annotations

from pathlib import Path

from fastapi import Request
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from data import images
from deploy.engines import Engine
from deploy.gate import Refusal
from deploy.inspection import InMemory, Picture, read_picture
from errors import UserError

LONGEST_NAME = 200  # characters of a picture's name


def plain_name(text: str) -> Path:
    """What a sender calls a picture, without folders and whatever does not print."""
    last = text.replace("\\", "/").rstrip("/").rpartition("/")[2]
    name = "".join(letter for letter in last if letter.isprintable())[-LONGEST_NAME:].strip()
    return Path(name if name not in ("", ".", "..") else "unnamed")


async def received_from(request: Request) -> tuple[bytes, str]:
    """The picture's bytes and the file name that comes with them."""
    name = ""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data":
        try:
            form = await request.form(max_files=1, max_fields=10)
        except (HTTPException, ClientDisconnect):
            raise
        except Exception as problem:  # a character set that is none, a header that the parser did not expect
            raise Refusal(400, "the form cannot be read; send one file as multipart/form-data") from problem
        try:
            file = next((value for value in form.values() if isinstance(value, UploadFile)), None)
            if file is None:
                raise Refusal(422, "there is no file in the form; send the picture as a file")
            content, name = await file.read(), file.filename or ""
        finally:
            await form.close()
    else:
        content = await request.body()
    if not content:
        raise Refusal(422, "there is no picture: the body is empty")
    return content, name


def decoded(content: bytes, name: Path, engine: Engine, shown_side: int | None, max_pixels: int) -> Picture:
    """Decode a picture.

    Raises:
        Refusal: it has too many pixels, or it is no picture or a damaged one.
    """
    try:
        with images.opened(InMemory(content, name), "picture", "send another one") as image:
            width, height = image.size
    except UserError as problem:
        status = {UnidentifiedImageError: 415, Image.DecompressionBombError: 413}.get(type(problem.__cause__), 422)
        raise Refusal(status, str(problem)) from problem
    if width * height > max_pixels:
        raise Refusal(413, f"picture {name} has {width} x {height} pixels, more than {max_pixels}; make it smaller")
    picture = read_picture(InMemory(content, name), name, engine, shown_side)
    if picture.view is None:
        raise Refusal(422, picture.problem)
    return picture
