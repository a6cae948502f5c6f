"""Records out of FASTA, CSV/TSV and .smi files: every record with its file and line, nothing dropped in silence.

    "x[000..049]" ──expand──> paths ──Source: hash, decompress, decode──> lines ──parse──> Record | Reject

Compression (.gz .bz2 .xz .zst) is recognised by content, the format by the name, or by content where the name does not
say. A record that cannot be used is a Reject and reading goes on; a file that cannot be read to its end (truncated,
damaged, not what its name says) is a ValueError, for what follows is lost. Windows line ends, byte order marks and text
outside ASCII are read. What a letter means, a tokenizer knows.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
import lzma
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import zstandard
from isal import isal_zlib

from moltron.common.logging import get_logger
from moltron.tokenizers import Tokenizer

log = get_logger(__name__)
FASTA = (".fasta", ".fa", ".faa", ".fas")
TABLES = (".csv", ".tsv", ".txt")
SMILES = (".smi", ".smiles")
KNOWN = (*TABLES, *FASTA, *SMILES)
GENERATED = "id,input,sample,smiles,valid"  # how a table of `moltron generate` begins
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_FRAMES: dict[bytes, Callable[[], Any]] = {  # by the first bytes of a file
    b"\x1f\x8b": lambda: isal_zlib.decompressobj(31),  # 31: gzip's header and checksum
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\x00": lzma.LZMADecompressor,
    b"\x28\xb5\x2f\xfd": lambda: zstandard.ZstdDecompressor().decompressobj(),
}
_RANGE = re.compile(r"(?:[\[(<]|_OP_)(\d+)\.\.(\d+)(?:[\])>]|_CL_)")
_IDS = ("id", ".*[ _]id", "(.*[ _])?(name|accession|entry)")  # names of columns: of ids, the first that there is;
_ID = re.compile("|".join(_IDS), re.IGNORECASE)
_SEQUENCE = re.compile(r".*smiles(?!_?id).*|.*sequence", re.IGNORECASE)  # of sequences;
_DATA = re.compile(  # what is none, but a sequence or a SMILES
    r"[A-Z*-]+|[A-Za-z*-]{12,}|(Cl|Br|Si|Se|As|Te|Sn|Na|Li|Mg|Al|Ca|Zn|[KBCNOPSFIHbcnops0-9=#()\[\]@+/\\%.-])+"
)
_FIRST = 100  # records of a file by which its alphabet is judged


class Record(NamedTuple):
    id: str  # the first word of a FASTA header
    sequence: bytes  # as written, without line ends; clean() comes later
    source: str  # file
    line: int  # where the record starts, from 1


class Reject(NamedTuple):
    source: str
    line: int
    id: str  # "" where it has none
    reason: str


def read_records(
    path: str | Path,
    id_column: str | None = None,
    sequence_column: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Record | Reject]:
    """All records of a file, folder, range or standard input (`-`), in order. Raises: ValueError, see the module, and
    where a file is not of the tokenizer's alphabet."""
    for file in expand_inputs(path):
        with Source(file, id_column, sequence_column) as source:
            if tokenizer and source.kind not in (None, tokenizer.alphabet):
                wanted = f"{tokenizer.alphabet}s are wanted"
                raise ValueError(f"{file} holds {source.kind}s, {wanted}: give another file or model")
            yield from source.records() if tokenizer is None else check_alphabet(source.records(), tokenizer)


def check_alphabet(records: Iterator[Record | Reject], tokenizer: Tokenizer) -> Iterator[Record | Reject]:
    """The same records. Raises: ValueError where the first ones can hardly be of the tokenizer's alphabet."""
    first = list(islice(records, _FIRST))
    found = [record for record in first if isinstance(record, Record)]
    if problem := tokenizer.foreign(record.sequence for record in found):
        raise ValueError(
            f"{found[0].source}, from line {found[0].line} on: {problem}: look for the right column "
            "(sequence_column=), file, model or kind"
        )
    yield from chain(first, records)


def reject_table(file: TextIO, is_new: bool = True) -> Any:
    """A writer of rejects, one a row, below a header if the file is new; open it with newline="", errors="replace"."""
    table = csv.writer(file, "excel-tab", lineterminator="\n")
    if is_new:
        table.writerow(Reject._fields)
    return table


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
        files = sorted(str(p) for p in Path(path).iterdir() if p.is_file() and _suffix(p.name) in KNOWN)
        ours = [file for file in files if _is_ours(file)]
        if ours:
            log.info("%s: not read from this folder, for a command of moltron wrote them: %s", path, ", ".join(ours))
        if ours == files:
            if any(Path(path).glob("*.arrow")):
                raise ValueError(f"{path} is a prepared store: give what it was made of, or evaluate {path}/val.arrow")
            raise ValueError(f"{path} is a folder without any {', '.join(KNOWN)} file (or such a file compressed)")
        return [file for file in files if file not in ours]
    names = [path] if Path(path).exists() else _fill_ranges(path)
    found = {name: _with_extension(name) for name in names}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        which = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        of = f"{len(missing)} of the {len(names)} files of {path} are missing" if len(names) > 1 else "no such file"
        raise ValueError(f"{of}: {which} (also tried: .csv, .fasta and their like, compressed or not)")
    return [file for file in found.values() if file is not None]


def _is_ours(file: str) -> bool:
    """Whether it lists rejects, or is a table that `moltron generate` wrote."""
    with open(file, "rb") as content:
        return file.endswith("rejects.tsv") or content.read(len(GENERATED)) == GENERATED.encode()


def _fill_ranges(path: str) -> list[str]:
    match = _RANGE.search(path)
    if not match:
        return [path]
    first, last = match.groups()
    if int(first) > int(last):
        raise ValueError(f"{path}: the range {match.group()} runs backwards")
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    rests = _fill_ranges(path[match.end() :])
    return [path[: match.start()] + number + rest for number in numbers for rest in rests]


def _with_extension(name: str) -> str | None:
    if Path(name).exists():
        return name
    tried = [name + suffix + packed for suffix in KNOWN for packed in ("", *COMPRESSED)]
    found = [file for file in tried if Path(file).is_file()]
    if len(found) > 1:
        raise ValueError(f"{name} could be {' or '.join(found)}: write the extension too")
    return found[0] if found else None


def _suffix(name: str) -> str:
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


# ------------------------------------------------------------------------------------------------------------- one file


class Source:
    """One open input; while it is read, `line` and `bytes_read` (compressed ones) grow.

    kind: "protein" or "molecule", as the format or the name of the column says; None: it does not say.

    plain: only lines() and rows() will be used.
    """

    def __init__(
        self, path: str, id_column: str | None = None, sequence_column: str | None = None, plain: bool = False
    ) -> None:
        self.path = path
        self.line = self.num_records = self.joined = 0  # joined: the line where quotes first held several together
        self._file = _File(path)
        try:
            binary = io.BufferedReader(self._file, 1 << 20)
            self.format = "lines" if plain else self._find_format(binary)
            # csv wants its line ends as they are: a quoted cell may hold some
            newline = "" if self.format == "table" else None
            self._text = io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape", newline)
            self.kind = {"fasta": "protein", "smiles": "molecule"}.get(self.format)
            if self.format == "table":
                self._open_table(id_column, sequence_column)
        except BaseException:
            self._file.close()
            raise

    @property
    def bytes_read(self) -> int:
        return self._file.count

    def describe(self, records: int | None = None) -> dict[str, Any]:
        """The manifest's entry of a file, after its last line; records: None, those that were not rejected."""
        sha256 = self._file.sha256()  # first, for it reads what is left
        records = self.num_records if records is None else records
        return {"path": self.path, "bytes": self.bytes_read, "sha256": sha256, "records": records}

    def records(self) -> Iterator[Record | Reject]:
        parse = {"fasta": self._read_fasta, "table": self._read_table, "smiles": self._read_smiles}[self.format]
        for item in parse():
            if isinstance(item, Record):
                if not item.id.isprintable():
                    shown = "".join(letter if letter.isprintable() else "?" for letter in item.id)
                    item = Reject(item.source, item.line, shown, "the id has control characters or is not UTF-8")
                elif not item.sequence.strip():
                    item = Reject(item.source, item.line, item.id, "no sequence")
                elif not item.id:
                    item = Reject(item.source, item.line, "", "no id")
                else:
                    self.num_records += 1
            yield item

    def lines(self) -> Iterator[str]:
        """Raises: ValueError with what was read so far where the file is truncated or damaged."""
        with self._damage_is_named():
            for line in self._text:
                self.line += 1
                yield line

    @contextmanager
    def _damage_is_named(self) -> Iterator[None]:
        try:
            yield
        except ValueError:
            raise
        except Exception as error:  # each decompressor has errors of its own
            raise ValueError(
                f"{self.path} is truncated or damaged: reading stopped after line {self.line}, {self.num_records} "
                f"records ({type(error).__name__}: {error}); get the file again"
            ) from error

    def rows(self, delimiter: str | None = None, quoted: bool = True) -> Iterator[tuple[int, list[str]]]:
        """(line, cells) of a table, blank lines left out.

        delimiter: else a tab if line 1 has one, else what it has more of: commas, or Excel's semicolons.
        """
        csv.field_size_limit(1 << 30)  # the default stops at 128 KiB; titin and cluster members are longer
        lines = self.lines()
        first = next((line for line in lines if line.strip()), "")
        before = offset = max(self.line - 1, 0)
        delimiter = delimiter or ("\t" if "\t" in first else max(",;", key=first.count))
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True, quoting=quoting)
        try:
            for row in reader:
                if row:
                    yield before + 1, row
                before, begin = offset + reader.line_num, before
                if before > begin + 1 and not self.joined:
                    self.joined = begin + 1
                    log.warning("%s: quotes join lines %d to %d: is a mark missing?", self.path, self.joined, before)
        except csv.Error as error:
            raise ValueError(f"{self.path}, line {before + 1}: not a table row ({error}): mend its quotes") from error

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _find_format(self, binary: io.BufferedReader[_File]) -> str:
        with self._damage_is_named():
            start = binary.peek(4096)[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
        if start.startswith(b"ARROW1"):
            raise ValueError(f"{self.path} is a split of a prepared store, which only evaluate reads: give its source")
        if b"\0" in start:
            raise ValueError(f"{self.path} is no text in UTF-8: give FASTA, a table (.csv, .tsv) or .smi")
        suffix = _suffix(self.path)
        for name, suffixes in (("fasta", FASTA), ("table", TABLES), ("smiles", SMILES)):
            if suffix in suffixes:
                return name
        if start.startswith(b">"):
            return "fasta"
        if b"," in start or b"\t" in start:
            return "table"
        raise ValueError(
            f"{self.path} is neither FASTA (which begins with `>`) nor a table: name it .fasta, .csv or .smi"
        )

    def _read_fasta(self) -> Iterator[Record | Reject]:
        """A record runs from its `>` to the next one's; what stands before the first is one reject."""
        header, start, parts, junk = None, 0, [], 0
        with self._damage_is_named():
            for number, line in enumerate(self._text, 1):  # not lines(): a tenth of the time of preparing
                if line[0] != ">":
                    parts.append(line[:-1] if line[-1] == "\n" else line)
                    if header is None and not junk and line.strip():
                        junk = number
                    continue
                self.line = number
                if header is not None:
                    yield self._fasta_record(header, parts, start)
                elif junk:
                    yield Reject(self.path, junk, "", "text before the first header")
                header, start, parts = line, number, []
        if header is None:
            where = f"line {junk} is text, but" if junk else "it is empty:"
            raise ValueError(f"{self.path} is not FASTA: {where} no line starts with `>`")
        yield self._fasta_record(header, parts, start)

    def _fasta_record(self, header: str, parts: list[str], line: int) -> Record:
        words = header[1:].split(None, 1)
        return Record(words[0] if words else "", _bytes("".join(parts)), self.path, line)

    def _open_table(self, id_column: str | None, sequence_column: str | None) -> None:
        """Reads the header line: which columns hold ids (None: none does) and sequences."""
        self._rows = self.rows()
        names = [name.strip() for name in next(self._rows, (0, []))[1]]
        if not names:
            raise ValueError(f"{self.path} is empty: its first line must name the columns")
        for wanted in (id_column, sequence_column):
            if wanted and wanted not in names:
                raise ValueError(f"{self.path} has no column {wanted!r}; it has {', '.join(names)}")
        self._width = len(names)
        self._sequence = names.index(sequence_column) if sequence_column else self._find_sequence(names, id_column)
        if "smiles" in names[self._sequence].lower():
            self.kind = "molecule"
        first = [0] if len(names) == 2 and self._sequence and self.kind is None else []  # v1's, whatever their names
        ranks = (
            [i for i, name in enumerate(names) if re.fullmatch(p, name, re.I) and i != self._sequence] for p in _IDS
        )
        found = next((ids for ids in ranks if ids), first)
        self._id = names.index(id_column) if id_column else found[0] if len(found) == 1 else None
        if not id_column and (self._id is None or [names[self._id], names[self._sequence]] != ["id", "sequence"]):
            which = "file and line" if self._id is None else f"column {names[self._id]}"
            log.info("%s: ids are read from %s, sequences from %s", self.path, which, names[self._sequence])

    def _find_sequence(self, names: list[str], id_column: str | None) -> int:
        """The column called sequence or smiles, else the only one whose name says as much, else v1's second of two."""
        lower = [name.lower() for name in names]
        for name in ("sequence", "smiles"):
            if name in lower:
                return lower.index(name)
        named = [i for i, name in enumerate(names) if _SEQUENCE.fullmatch(name)]
        if len(named) == 1:
            return named[0]
        if len(names) != 2 or named:
            what = "more than one" if named else "none"
            raise ValueError(
                f"{self.path}: {what} of its columns ({', '.join(name[:30] for name in names)}) is called sequence or "
                "smiles: set sequence_column=, or where line 1 is a record add their names before it"
            )
        sequence = 1 - names.index(id_column) if id_column else 1
        if _DATA.fullmatch(names[sequence]) and not _ID.fullmatch(names[1 - sequence]):
            raise ValueError(
                f"{self.path}, line 1: a record ({', '.join(name[:30] for name in names)}) where the names of the "
                "columns are expected: add them before it, or set sequence_column= if these are names"
            )
        return sequence

    def _read_table(self) -> Iterator[Record | Reject]:
        need = max(self._sequence, self._id or 0)
        for line, row in self._rows:
            if len(row) <= need:
                yield Reject(self.path, line, row[0], f"fewer than {need + 1} columns")
                continue
            if any(cell.strip() for cell in row[self._width :]):  # which of them is the sequence?
                name = "" if self._id is None else row[self._id].strip()
                yield Reject(self.path, line, name, "more cells than columns: quote what has the separator in it")
                continue
            name = self._made_id(line) if self._id is None else row[self._id].strip()
            yield Record(name, _bytes(row[self._sequence]), self.path, line)

    def _read_smiles(self) -> Iterator[Record | Reject]:
        for line in self.lines():
            words = line.split(None, 1)
            if words and not (self.line == 1 and "smiles" in words[0].lower()):
                name = words[1].strip() if len(words) > 1 else self._made_id(self.line)
                yield Record(name, _bytes(words[0]), self.path, self.line)

    def _made_id(self, line: int) -> str:
        return f"{Path(self.path).name.split('.')[0]}:{line}"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


class _File(io.RawIOBase):
    """A file or standard input as if it were not compressed; hashed and counted as it is, so that it is read once.

    Frames (gzip's members, bzip2's and xz's streams) may follow each other. The libraries' own file objects will not
    do: zstandard's takes a truncated file for a short one, lzma's and bz2's take a damaged next frame for the end.
    """

    def __init__(self, path: str) -> None:
        self._file = sys.stdin.buffer if path == "-" else open(path, "rb")  # noqa: SIM115
        self._digest = hashlib.sha256()
        self.count = 0
        self._rest = self._take()  # read, not decompressed
        self._ready = memoryview(b"")  # decompressed, not asked for yet
        self._make = next((make for magic, make in _FRAMES.items() if self._rest.startswith(magic)), None)
        self._frame: Any = None

    def sha256(self) -> str:
        """Of the whole file; reads what is left of it, e.g. padding."""
        while self._take():
            pass
        return self._digest.hexdigest()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._rest or self._take()
            self._rest = b""
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends inside a compressed frame")
                return 0
            if self._make is None:
                self._ready = memoryview(chunk)
                break
            if self._frame is None:
                chunk = chunk.lstrip(b"\0")  # padding between frames
                if not chunk:
                    continue
                self._frame = self._make()
            self._ready = memoryview(self._frame.decompress(chunk))
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _take(self) -> bytes:
        chunk = self._file.read(1 << 16)
        self._digest.update(chunk)
        self.count += len(chunk)
        return chunk

    def close(self) -> None:
        if self._file is not sys.stdin.buffer:
            self._file.close()
        super().close()
