"""A list of URLs into a folder, e.g. ZINC15's tranches: several at a time, tried again, resumed, hashes checked.

    "URL [sha256 or md5]" a line ──read_list──> Items ──threads: NAME.partial, Range──hash──rename──> OUTPUT/NAME
                                                    └── what failed ──> OUTPUT/failed.urls, itself such a list

A file that is there under its name is whole: the same command again fetches only what is missing. One command at a
time has the folder. Knows nothing of what is in the files.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from moltron.common.lock import locked
from moltron.common.logging import Progress, get_logger

FAILED = "failed.urls"  # not a name that `moltron prepare` reads from a folder
CONNECTIONS, TRIES, TIMEOUT = 8, 5, 60  # TIMEOUT: seconds without a byte
_HASH = re.compile(r"(?:(sha256|md5):)?([0-9a-f]{32}|[0-9a-f]{64})", re.IGNORECASE)
log = get_logger(__name__)


class Item(NamedTuple):
    url: str
    name: str  # of the file
    digest: str  # hex, lower case: 64 digits of SHA-256, 32 of MD5, or ""


class Refused(Exception):
    """Trying again would not help."""


def fetch_list(path: str | Path, output: str | Path, wait: float = 1.0) -> Path:
    """Downloads what `path` lists into the folder `output`. wait: seconds before the second try, then doubled.

    Raises: ValueError for a list that cannot be read, a folder that another process has, or naming the number of files
    that failed, when all were tried.
    """
    items, folder = read_list(path), Path(output)
    with locked(folder / ".lock", 0, lambda problem: problem):
        log.info("%d files of %s into %s", len(items), path, folder)
        failed = _fetch_all(items, folder, wait)
        (folder / FAILED).unlink(missing_ok=True)
        if failed:
            lines = [f"{i.url} {i.digest} # {failed[i.url]}\n" for i in items if i.url in failed]
            (folder / FAILED).write_text("".join(lines), encoding="utf-8")
            raise ValueError(
                f"{len(failed)} of {len(items)} files failed, e.g. {': '.join(next(iter(failed.items())))}; "
                f"{folder / FAILED} has all. The same command tries these again"
            )
    return folder


def _fetch_all(items: list[Item], folder: Path, wait: float) -> dict[str, str]:
    """-> {URL: why it failed}."""
    failed: dict[str, str] = {}
    with Progress("files", len(items)) as progress, ThreadPoolExecutor(CONNECTIONS) as threads:
        tasks = {threads.submit(_fetch, item, folder, wait): item for item in items}
        try:
            for done, task in enumerate(as_completed(tasks), 1):
                if reason := task.result():
                    failed[tasks[task].url] = reason
                progress.update(done, f"{len(failed)} failed")
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return failed


def read_list(path: str | Path) -> list[Item]:
    """One URL a line, a hash before or after it if there is one; `#` begins a remark. A URL twice counts once.

    Raises: ValueError with the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"urls={path} cannot be read: {error}") from error
    digests: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = re.split(r"[\s,]+", re.sub(r"(^|\s)#.*", "", line).strip())
        if words == [""]:
            continue
        urls = [word for word in words if re.match(r"(https?|ftp)://[^/]+/", word)]
        hashes = [match[2].lower() for word in words if (match := _HASH.fullmatch(word))]
        if len(urls) != 1 or len(hashes) > 1 or len(urls) + len(hashes) != len(words) or not _name(urls[0]):
            raise ValueError(
                f"{path}, line {number}: expected a URL of a file (http, https or ftp) and at most one hash "
                f"(SHA-256 or MD5, hex), found {line.strip()[:100]!r}"
            )
        digest = hashes[0] if hashes else ""
        if digests.setdefault(urls[0], digest) != digest:
            raise ValueError(f"{path}, line {number}: another hash than in an earlier line for {urls[0]}")
    if not digests:
        raise ValueError(f"{path} has no URLs: one a line is expected")
    names = Counter(_name(url).lower() for url in digests)  # some disks ignore case
    items = []
    for url, digest in digests.items():
        name = _name(url)
        if names[name.lower()] > 1:  # of several folders
            name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
        items.append(Item(url, name, digest))
    return items


def _name(url: str) -> str:
    """The last part of a URL's path as a safe name, "" where it has none."""
    last = urllib.parse.unquote(urllib.parse.urlparse(url).path.rsplit("/", 1)[-1])
    return re.sub(r"[^\w.+-]", "_", last).lstrip(".")


def _fetch(item: Item, folder: Path, wait: float) -> str | None:
    """TRIES times, unless the server refuses -> why it failed, or None."""
    target = folder / item.name
    if target.is_file() and _has(target, item.digest):
        return None
    partial, reason = target.with_name(f"{target.name}.partial"), ""
    for attempt in range(TRIES):
        time.sleep(wait * 2 ** (attempt - 1) if attempt else 0)
        try:
            _transfer(item.url, partial, bool(item.digest))
            if _has(partial, item.digest):
                partial.replace(target)
                _validator(partial).unlink(missing_ok=True)
                return None
            partial.unlink()
            reason = "its content has another hash than the list says"
        except Refused as error:
            return str(error)
        except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
            reason = f"{type(error).__name__}: {error}"
    return " ".join(reason.split())


def _transfer(url: str, partial: Path, hashed: bool) -> None:
    """Appends what `partial` lacks. It goes on only from the same version: by If-Range, or where a hash will tell."""
    validator = _validator(partial)
    begin = partial.stat().st_size if partial.is_file() else 0
    known = validator.read_text() if validator.is_file() else ""
    request = urllib.request.Request(url, headers={"User-Agent": "moltron", "Accept-Encoding": "identity"})
    if begin and (known or hashed) and url.startswith("http"):
        request.add_header("Range", f"bytes={begin}-")
        if known:
            request.add_header("If-Range", known)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing of that range: it is another file, or it was whole
            partial.unlink()
        elif 400 <= error.code < 500 and error.code not in (408, 425, 429):
            raise Refused(f"HTTP {error.code} {error.reason}") from error
        raise
    with response:
        status, headers = getattr(response, "status", None), response.headers
        goes_on = status == 206 and headers.get("Content-Range", "").startswith(f"bytes {begin}-")
        etag = headers.get("ETag", "")
        validator.write_text(etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", ""))
        size = headers.get("Content-Length")
        expected = None if size is None else int(size) + (begin if goes_on else 0)
        with open(partial, "ab" if goes_on else "wb") as file:
            while chunk := response.read(1 << 18):
                file.write(chunk)
        got = partial.stat().st_size
    if expected is not None and got != expected:
        raise OSError(f"the connection ended after {got:,} of {expected:,} bytes")


def _validator(partial: Path) -> Path:
    """Beside a partial file: the ETag or date of the version it is a part of."""
    return partial.with_name(f"{partial.name}-of")


def _has(file: Path, digest: str) -> bool:
    if not digest:
        return True
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256" if len(digest) == 64 else "md5").hexdigest() == digest
