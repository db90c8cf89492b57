"""Read CSV files as text: the same way for input, predictions and our own tables, whatever program wrote them.

Ids, labels and groups may look like numbers (007, 1e5, NA) and stay as they are. The caller names columns of numbers.
"""

import codecs
import csv
import io
import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

MAX_BYTES = 2**27  # of a CSV file: a hundred times the competition's
MAX_HEADER = 10_000  # characters of its first line
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# Spreadsheets write semicolons where the comma is the decimal sign, and tabs as "Unicode text".
SEPARATORS = ",;\t"
WHOLE = re.compile(r"([+-]?\d{1,18})(?:\.0*)?", re.ASCII)
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?inf|nan|", re.ASCII | re.IGNORECASE)

Row = tuple[int, list[str]]  # the number of its first line, its fields


class BadTable(ValueError):
    """What is wrong with a CSV file, as a text that follows the file's path in a sentence."""


def read_text_table(
    path: Path, kinds: Callable[[list[str]], dict[str, type]] = lambda header: {}, plain: bool = False
) -> pd.DataFrame:
    """Return a CSV file's columns as text, and the columns of numbers as numbers.

    kinds : function of the header that returns column -> int or float for columns of numbers, and may refuse the header
    plain : refuse what programs may read in different ways: separators other than commas, encodings other than UTF-8,
        blanks around names, empty fields beyond the header; fields keep their blanks
    Without `plain`, blanks around fields, empty lines and empty columns at the end are ignored. Text is returned in
    Unicode's composed form (NFC). Raises BadTable, also for a line whose number of fields is not the header's.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise BadTable(f"has {size / 1e6:.0f} MB; expected a CSV file of at most {MAX_BYTES / 1e6:.0f} MB")
    rows = split(decode(path.read_bytes(), plain), plain)
    header = next(rows, (0, []))[1]
    while header and not header[-1] and not plain:
        header.pop()
    check_header(header)
    wanted = kinds(header)
    columns: list[list[str]] = [[] for _ in header]
    lines, wrong = [], []
    for line, fields in rows:
        if len(fields) != len(header) and (plain or len(fields) < len(header) or any(fields[len(header) :])):
            wrong.append(f"line {line} has {len(fields)}")
            continue
        lines.append(line)
        for column, field in zip(columns, fields, strict=False):
            column.append(field)
    if wrong:
        raise BadTable(f"has {len(header)} fields in its header and others below ({first_of(wrong)})")
    return pd.DataFrame(
        {
            name: numbers(name, column, lines, wanted[name]) if name in wanted else pd.Series(column, dtype=str)
            for name, column in zip(header, columns, strict=True)
        }
    )


def decode(content: bytes, plain: bool) -> str:
    """Return a file's text: UTF-8, or UTF-16 where the file begins with its mark."""
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        if plain and encoding == "utf-16":
            raise BadTable("is UTF-16 text; save it in UTF-8")
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise BadTable(
            f"is not {encoding.removesuffix('-sig').upper()} text (byte {content[error.start]:#04x} in line {line}); "
            "save it as CSV in UTF-8"
        ) from None
    if "\0" in text:
        raise BadTable("holds bytes of value 0, as UTF-16 does; save it as CSV in UTF-8")
    return text


def split(text: str, plain: bool) -> Iterator[Row]:
    """Yield the rows of a table, the header first."""
    file = io.StringIO(text, newline="")
    first = next((line for line in file if line.strip()), "")
    if len(first) > MAX_HEADER:
        raise BadTable(f"has a first line of over {MAX_HEADER} characters; expected the names of a few columns")
    separator = max(SEPARATORS, key=first.count)  # the comma if all are equally frequent
    if plain and separator != ",":
        raise BadTable(f"has the separator {separator!r}; expected commas")
    file.seek(0)
    reader, line = csv.reader(file, delimiter=separator, strict=True, skipinitialspace=not plain), 1
    try:
        for fields in reader:
            fields = [composed(field if plain else field.strip()) for field in fields]
            if any(fields) or plain and fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadTable(f"is not a CSV file ({error} in line {line})") from None


def composed(text: str) -> str:
    """Return text in Unicode's composed form: macOS decomposes file names, but most tables are composed."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def check_header(header: list[str]) -> None:
    """Refuse a header that is empty, repeats a name, or is too long."""
    if not header:
        raise BadTable("is empty; expected a line with the names of columns, and one line per sample")
    if sum(map(len, header)) > MAX_HEADER:
        raise BadTable(f"has a first line of over {MAX_HEADER} characters; expected the names of a few columns")
    if twice := [name for name in header if header.count(name) > 1]:
        raise BadTable(f"has the column {twice[0]!r} {header.count(twice[0])} times; expected once")


def numbers(name: str, column: list[str], lines: list[int], kind: type) -> pd.Series:
    """Return a column's numbers: whole ones, or any (an empty field is an unknown one)."""
    form = WHOLE if kind is int else NUMBER
    wrong = [f"line {line}: {text!r}" for line, text in zip(lines, column, strict=True) if not form.fullmatch(text)]
    if wrong:
        raise BadTable(f"has text in its column {name}, expected {'whole ' * (kind is int)}numbers ({first_of(wrong)})")
    values = (int(text.partition(".")[0]) if kind is int else float(text or math.nan) for text in column)
    return pd.Series(values, dtype=kind)


def first_of(wrong: list[str], limit: int = 5) -> str:
    """Join the first items of a list, and count the rest."""
    return ", ".join(wrong[:limit]) + (f" and {len(wrong) - limit} more lines" if len(wrong) > limit else "")
