"""Rows of a table as its file has them, read once, in a stream: CSV, TSV, JSON lines, .npz, a folder of images."""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
LISTS = ("metadata.csv", "metadata.tsv", "metadata.jsonl")  # in a folder of images: what names them


class Row(NamedTuple):
    """A row of a table: where it stands, for messages, and its values by column, as they are."""

    where: str
    values: dict[str, Any]


def read_rows(path: Path, columns: Sequence[str], image: str | None = None) -> Iterator[Row]:
    """Read a table row by row; other columns than those named may be there.

    Args:
        path: ``.csv``, ``.tsv`` (no quoting), ``.jsonl``, ``.npz`` (an array a column), or a folder of images: with a
            ``metadata.csv`` (.tsv, .jsonl) beside them that names files, or laid out as ``label/subject/image`` or
            ``label/image``, where the image's name is the subject.
        columns: names; one that ends in ``*`` stands for all with that prefix. Of a folder without metadata: three,
            of subject, input and label, or the input's alone.
        image: the column whose values may be names of image files beside the table.

    Raises:
        ValueError: the file cannot be read as what it is; names the file, and the row (from 1) where there is one.
    """
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl}
    folder = path.parent
    if path.is_dir():
        listed = [path / name for name in LISTS if (path / name).is_file()]
        if not listed:
            yield from _walk(path, columns)
            return
        folder, path = path, listed[0]
    if path.suffix == ".npz":
        yield from _npz(path, columns)
        return
    if path.suffix not in readers:
        allowed = ", ".join([*readers, ".npz"])
        raise ValueError(f"table: expected a file ending in {allowed}, or a folder of images, got {path.name!r}")
    starred = [column for column in columns if column.endswith("*")]
    if starred and path.suffix == ".jsonl":
        raise ValueError(f"schema.input: expected a list of columns for {path.name}, whose rows have no common order")
    try:
        for row in readers[path.suffix](path):
            name = row.values.get(image) if image else None
            if isinstance(name, str) and name.lower().endswith(IMAGES):
                row.values[str(image)] = folder / name
            yield row
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{_undecodable(path)}: expected UTF-8, got the byte 0x{byte:02x}; save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"table: cannot read {path.name}: {error}") from None


def _undecodable(path: Path) -> str:
    """Name the first row that is not UTF-8: text is decoded in blocks, so that the error does not tell."""
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        table = path.suffix != ".jsonl"
        rows = filter(None, csv.reader(lines, **_rule(path))) if table else filter(str.strip, lines)
        for number, row in enumerate(rows, not table):
            try:
                "".join(row).encode()
            except UnicodeEncodeError:
                return f"{path.name}, row {number}" if number else f"{path.name}, names of columns"
    return path.name


def _rule(path: Path) -> dict[str, Any]:
    return {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    with path.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines, **_rule(path))
        header = list(reader.fieldnames or ())
        if len(set(header)) != len(header):
            raise ValueError(f"{path.name}: expected distinct columns, got {header[:12]}")
        for number, values in enumerate(reader, 1):
            where = f"{path.name}, row {number}"
            if None in values or None in values.values():
                raise ValueError(f"{where}: expected {len(header)} cells, got another number")
            yield Row(where, values)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(filter(str.strip, lines), 1):
            where = f"{path.name}, row {number}"
            try:
                values = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{where}: expected a JSON object, got {error}") from None
            if not isinstance(values, dict):
                raise ValueError(f"{where}: expected a JSON object, got {line.strip()[:40]!r}")
            yield Row(where, values)


def _walk(folder: Path, columns: Sequence[str]) -> Iterator[Row]:
    if len(columns) not in (1, 3):
        raise ValueError(
            f"table: expected one of {', '.join(LISTS)} in {folder.name} for the columns {list(columns)}, got none"
        )
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES):
        inner = path.relative_to(folder)
        if len(columns) == 1:
            yield Row(f"{folder.name}, {inner}", {columns[0]: path})
            continue
        if len(inner.parts) not in (2, 3):
            raise ValueError(f"{folder.name}: expected label/image or label/subject/image, got {inner}")
        subject = inner.parts[1] if len(inner.parts) == 3 else inner.stem
        values = (subject, path, inner.parts[0])
        yield Row(f"{folder.name}, {inner}", dict(zip(columns, values, strict=True)))


# .npz


def _npz(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        with ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(path))
            arrays = {name: stack.enter_context(_Array(archive, name)) for name in _named(archive, path, columns)}
            lengths = {name: array.length for name, array in arrays.items()}
            if len(set(lengths.values())) != 1:
                raise ValueError(f"{path.name}: expected arrays of equal length, got {lengths}")
            for number, row in enumerate(zip(*arrays.values(), strict=True), 1):
                yield Row(f"{path.name}, row {number}", dict(zip(arrays, row, strict=True)))
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise errors of many classes for a file that is no .npz
        if isinstance(error, ValueError) and path.name in str(error):
            raise
        raise ValueError(f"table: cannot read {path.name} as .npz: {error}") from None


def _named(archive: zipfile.ZipFile, path: Path, columns: Sequence[str]) -> list[str]:
    there = [name.removesuffix(".npy") for name in archive.namelist()]
    found: list[str] = []
    for column in columns:
        named = [n for n in there if n.startswith(column[:-1])] if column.endswith("*") else [column]
        if not named or not set(named) <= set(there):
            raise ValueError(f"{path.name}: column {column!r} is missing; the arrays are {there[:8]}")
        found += named
    return found


class _Array:
    """One array of an .npz, read row by row: the file may be larger than memory."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self.file: IO[bytes] = archive.open(f"{name}.npy")
        major, _ = np.lib.format.read_magic(self.file)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, self.fortran, self.dtype = read(self.file)
        if self.dtype.hasobject or not shape:
            raise ValueError(f"array {name!r}: expected numbers or text, a row a record, got {self.dtype} {shape}")
        self.length, self.shape = shape[0], shape[1:]
        self.bytes = int(np.prod(self.shape)) * self.dtype.itemsize

    def __enter__(self) -> _Array:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        if self.fortran:  # column after column: no row is whole before the end
            data = self._read(self.length * self.bytes)
            yield from np.frombuffer(data, self.dtype).reshape(*self.shape[::-1], self.length).T
            return
        block = max(1, (1 << 20) // max(1, self.bytes))  # rows of a megabyte
        for start in range(0, self.length, block):
            count = min(block, self.length - start)
            data = self._read(count * self.bytes)
            yield from np.frombuffer(data, self.dtype).reshape(count, *self.shape)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.file.read(size - len(data))
            if not more:
                raise ValueError("it ends too early")
            data += more
        return data


# Images


def read_image(path: Path, shape: Sequence[int], where: str) -> np.ndarray:
    """Read an image as whole numbers of 0 to 255, (channels, height, width): one channel is grey, three are RGB.

    Raises:
        ValueError: it cannot be read, has another size than declared (nothing is resized), or Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ValueError("table: images need Pillow: pip install pillow") from None
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"schema.shape: expected [1 or 3, height, width] for images, got {list(shape)}")
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if shape[0] == 1 else "RGB"))
    except Exception as error:  # Pillow raises errors of many classes for a file that is no image
        raise ValueError(f"{where}: cannot read the image {path}: {error}") from None
    pixels = pixels[None] if shape[0] == 1 else pixels.transpose(2, 0, 1)  # (channels, height, width)
    if pixels.shape != tuple(shape):
        raise ValueError(f"{where}: expected an image of {shape[2]} x {shape[1]} pixels, got {pixels.shape[::-1][:2]}")
    return pixels
