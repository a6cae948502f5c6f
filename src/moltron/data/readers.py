"""Records out of FASTA, CSV/TSV and .smi files: every record with its file and line, nothing dropped in silence.

    "x[000..049]" ──expand──> paths ──Source: hash, decompress, decode──> lines ──parse──> Record | Reject

Compression (.gz .bz2 .xz .zst) is recognised by content, the format by the name, or by content where the name does not
say. A record that cannot be used is a Reject and reading goes on; a file that cannot be read to its end (truncated,
damaged, not what its name says) is a ValueError, for what follows is lost. Windows line ends, byte order marks and text
outside ASCII are read. Knows nothing of what a letter means: tokenizers.clean does.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
import lzma
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, product
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard
from Bio.SeqIO.FastaIO import SimpleFastaParser
from xopen import xopen

FASTA = (".fasta", ".fa", ".faa", ".fas")
TABLES = (".csv", ".tsv", ".txt")
SMILES = (".smi", ".smiles")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_MAGIC = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zst"}
_FRAMES: dict[str, Callable[[], Any]] = {
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
    "zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}
_RANGE = re.compile(r"\[(\d+)\.\.(\d+)\]|\((\d+)\.\.(\d+)\)|<(\d+)\.\.(\d+)>|_OP_(\d+)\.\.(\d+)_CL_")


class Record(NamedTuple):
    id: str  # the first word of a FASTA header
    sequence: bytes  # as written, without line ends; clean() comes later
    source: str  # file
    line: int  # where the record starts, from 1


class Reject(NamedTuple):
    id: str  # "" where it has none
    reason: str
    source: str
    line: int


def read_records(
    path: str | Path, id_column: str | None = None, sequence_column: str | None = None
) -> Iterator[Record | Reject]:
    """All records of a file, folder, range or standard input (`-`), in order. Raises: ValueError, see the module."""
    for file in expand_inputs(path):
        with Source(file, id_column, sequence_column) as source:
            yield from source.records()


# ---------------------------------------------------------------------------------------------------------- which files


def expand_inputs(path: str | Path) -> list[str]:
    """Files that a user's input names: itself, a folder's files in order, or a range with its numbers filled in.

    A range is `x[000..049]`, `x(000..049)`, `x<000..049>` or `x_OP_000..049_CL_`, anywhere in the path, more than once
    if need be; where a file is not there as written, the usual extensions are tried. Raises: ValueError naming what is
    missing.
    """
    path = str(path)
    if path == "-":
        return [path]
    if Path(path).is_dir():
        known = (*FASTA, *TABLES, *SMILES)
        files = sorted(str(p) for p in Path(path).iterdir() if p.is_file() and _suffix(p.name) in known)
        if not files:
            raise ValueError(f"{path} is a folder without any {', '.join(known)} file (or such a file compressed)")
        return files
    names = [path] if Path(path).exists() else _fill_ranges(path)
    found = [_with_extension(name) for name in names]
    missing = [name for name, file in zip(names, found) if file is None]
    if missing:
        which = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        of = f"{len(missing)} of the {len(names)} files of {path} are missing" if len(names) > 1 else "no such file"
        raise ValueError(f"{of}: {which} (also tried: .csv, .fasta and their like, compressed or not)")
    return [file for file in found if file is not None]


def _fill_ranges(path: str) -> list[str]:
    pieces, choices, end = [], [], 0
    for match in _RANGE.finditer(path):
        first, last = (group for group in match.groups() if group is not None)
        if int(first) > int(last):
            raise ValueError(f"{path}: the range {match.group()} runs backwards")
        pieces.append(path[end : match.start()])
        choices.append([str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)])
        end = match.end()
    return ["".join(chain(*zip(pieces, numbers), [path[end:]])) for numbers in product(*choices)]


def _with_extension(name: str) -> str | None:
    if Path(name).exists():
        return name
    known = (*TABLES, *FASTA, *SMILES)
    found = [name + suffix + packed for suffix in known for packed in ("", *COMPRESSED)]
    found = [file for file in found if Path(file).is_file()]
    if len(found) > 1:
        raise ValueError(f"{name} could be {' or '.join(found)}: write the extension too")
    return found[0] if found else None


def _suffix(name: str) -> str:
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


# ------------------------------------------------------------------------------------------------------------- one file


class Source:
    """One open input: `kind` "protein" or "molecule"; while it is read, `line` and `bytes_read` (compressed ones) grow.

    plain: only lines() and rows() will be used. After the last record, `sha256` is the hash of the whole file.
    """

    def __init__(
        self, path: str, id_column: str | None = None, sequence_column: str | None = None, plain: bool = False
    ) -> None:
        self.path = path
        self.size = None if path == "-" else Path(path).stat().st_size
        self._stem = Path(path).name.split(".")[0]
        self.line = 0
        self.num_records = 0
        self._columns = (id_column, sequence_column)
        self._tee = _Tee(sys.stdin.buffer if path == "-" else open(path, "rb"))  # noqa: SIM115
        self._binary = _decompress(io.BufferedReader(self._tee, 1 << 20))
        try:
            self.format = "lines" if plain else self._find_format()
            # csv wants its line ends as they are: a quoted cell may hold some
            newline = "" if self.format == "table" else None
            self._text = io.TextIOWrapper(self._binary, "utf-8-sig", "surrogateescape", newline)
            self._lines = self.lines()
            self.kind = "molecule" if self.format == "smiles" else "protein"
            if self.format == "table":
                self._open_table()
        except BaseException:
            self.close()
            raise

    @property
    def bytes_read(self) -> int:
        return self._tee.count

    @property
    def sha256(self) -> str:
        while self._tee.read(1 << 20):  # what a decompressor left unread, e.g. padding
            pass
        return self._tee.digest.hexdigest()

    def records(self) -> Iterator[Record | Reject]:
        parse = {"fasta": self._read_fasta, "table": self._read_table, "smiles": self._read_smiles}[self.format]
        for item in parse():
            if isinstance(item, Record):
                if not item.id.isprintable():
                    shown = item.id.encode("utf-8", "replace").decode()
                    item = Reject(shown, "the id has control characters or is not UTF-8", item.source, item.line)
                elif not item.sequence.strip():
                    item = Reject(item.id, "no sequence", item.source, item.line)
                elif not item.id:
                    item = Reject("", "no id", item.source, item.line)
                else:
                    self.num_records += 1
            yield item

    def lines(self) -> Iterator[str]:
        """Raises: ValueError with what was read so far where the file is truncated or damaged."""
        try:
            for line in self._text:
                self.line += 1
                yield line
        except Exception as error:  # each decompressor has errors of its own
            raise self._damage(error) from error

    def _damage(self, error: Exception) -> ValueError:
        return ValueError(
            f"{self.path} is truncated or damaged: reading stopped after line {self.line}, {self.num_records} records "
            f"({type(error).__name__}: {error}); get the file again"
        )

    def rows(
        self, delimiter: str, quoted: bool = True, lines: Iterator[str] | None = None
    ) -> Iterator[tuple[int, list[str]]]:
        """(line, cells) of a table, blank lines left out."""
        csv.field_size_limit(1 << 30)  # the default stops at 128 KiB; titin and cluster members are longer
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        reader = csv.reader(lines or self._lines, delimiter=delimiter, strict=True, quoting=quoting)
        before = 0
        try:
            for row in reader:
                if row:
                    yield before + 1, row
                before = reader.line_num
        except csv.Error as error:
            raise ValueError(f"{self.path}, line {before + 1}: not a table row ({error}): mend its quotes") from error

    def close(self) -> None:
        self._tee.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _find_format(self) -> str:
        suffix = _suffix(self.path)
        for name, suffixes in (("fasta", FASTA), ("table", TABLES), ("smiles", SMILES)):
            if suffix in suffixes:
                return name
        try:
            start = self._binary.peek(4096)[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
        except Exception as error:
            raise ValueError(f"{self.path} is truncated or damaged: {error}") from error
        if start.startswith(b">"):
            return "fasta"
        if b"," in start or b"\t" in start:
            return "table"
        raise ValueError(
            f"{self.path} is neither FASTA (first character `>`) nor a table: give it .fasta, .csv or .smi"
        )

    def _read_fasta(self) -> Iterator[Record | Reject]:
        headers: deque[int] = deque()
        junk = None

        def lines() -> Iterator[str]:  # like self.lines(), which would cost a tenth of the time of preparing
            nonlocal junk
            began = False
            try:
                for number, line in enumerate(self._text, 1):
                    self.line = number
                    if line[0] == ">":
                        began = True
                        headers.append(number)
                    elif not began:
                        junk = junk or (number if line.strip() else None)
                    elif " " in line:
                        line = line.replace(" ", "\t")  # the parser would remove blanks before they can be counted
                    yield line
            except Exception as error:
                raise self._damage(error) from error

        title = None
        for title, sequence in SimpleFastaParser(lines()):
            if junk:
                yield Reject("", "text before the first header", self.path, junk)
                junk = None
            words = title.split(None, 1)
            yield Record(words[0] if words else "", _bytes(sequence), self.path, headers.popleft())
        if title is None:
            where = f"line {junk} is text, but" if junk else "it is empty:"
            raise ValueError(f"{self.path} is not FASTA: {where} no line starts with `>`")

    def _open_table(self) -> None:
        header = next(self._lines, "")
        if not header.strip():
            raise ValueError(f"{self.path} is empty: its first line must name the columns")
        self._rows = self.rows(
            "\t" if header.count("\t") > header.count(",") else ",", lines=chain([header], self._lines)
        )
        _, names = next(self._rows)
        names = [name.strip() for name in names]
        lower = [name.lower() for name in names]
        id_column, sequence_column = self._columns
        for wanted in filter(None, self._columns):
            if wanted not in names:
                raise ValueError(f"{self.path} has no column {wanted!r}; it has {', '.join(names)}")
        if sequence_column:
            sequence = names.index(sequence_column)
        else:
            sequence = next((lower.index(name) for name in ("sequence", "smiles") if name in lower), 1)
        if sequence >= len(names):
            raise ValueError(
                f"{self.path} has one column ({names[0]}): name it sequence or smiles, or set sequence_column"
            )
        if re.fullmatch(r"[A-Z*]{12,}", names[sequence]):
            raise ValueError(
                f"{self.path}, line 1: a sequence where the names of the columns are expected: add a header"
            )
        if id_column:
            self._id: int | None = names.index(id_column)
        else:
            named = [i for i, name in enumerate(lower) if name == "id" or name.endswith("_id")]
            self._id = next((i for i in [*named, 0] if i != sequence), None)
        self._sequence = sequence
        if lower[sequence] == "smiles":
            self.kind = "molecule"

    def _read_table(self) -> Iterator[Record | Reject]:
        need = max(self._sequence, self._id or 0)
        for line, row in self._rows:
            if len(row) <= need:
                yield Reject(row[0], f"fewer than {need + 1} columns", self.path, line)
                continue
            name = self._made_id(line) if self._id is None else row[self._id].strip()
            yield Record(name, _bytes(row[self._sequence]), self.path, line)

    def _read_smiles(self) -> Iterator[Record | Reject]:
        for line in self._lines:
            words = line.split(None, 1)
            if words and not (self.line == 1 and words[0].lower() == "smiles"):
                name = words[1].strip() if len(words) > 1 else self._made_id(self.line)
                yield Record(name, _bytes(words[0]), self.path, self.line)

    def _made_id(self, line: int) -> str:
        return f"{self._stem}:{line}"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


class _Tee(io.RawIOBase):
    """Passes a file on, hashing and counting it: so that a file is read once."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self.digest = hashlib.sha256()
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer) or 0  # type: ignore[attr-defined]
        self.digest.update(memoryview(buffer)[:count])
        self.count += count
        return count

    def close(self) -> None:
        if self._raw is not sys.stdin.buffer:
            self._raw.close()
        super().close()


class _Frames(io.RawIOBase):
    """Decompresses bzip2, xz or zstd frames in a row, and knows when a file ends inside one.

    zstandard's own reader takes a truncated file for a short one, bz2's and lzma's ignore a damaged second frame.
    """

    def __init__(self, source: io.BufferedReader, make: Callable[[], Any]) -> None:
        self._source = source
        self._make = make
        self._frame = None
        self._rest = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._rest or self._source.read1(1 << 16)
            self._rest = b""
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends inside a compressed frame")
                return 0
            if self._frame is None:
                chunk = chunk.lstrip(b"\0")  # padding between xz frames
                if not chunk:
                    continue
                self._frame = self._make()
            self._ready = self._frame.decompress(chunk)
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _decompress(source: io.BufferedReader) -> io.BufferedReader:
    start = source.peek(6)
    packing = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
    if packing is None:
        return source
    if packing == "gz":  # threads=0: in this process, where a truncated file is an error and not a helper's exit code
        raw: Any = xopen(source, "rb", threads=0, format="gz")
    else:
        raw = _Frames(source, _FRAMES[packing])
    return io.BufferedReader(raw, 1 << 20)
