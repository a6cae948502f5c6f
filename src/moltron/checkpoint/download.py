"""Published weights by a short name, from the Hugging Face hub, into its cache; hashes checked, offline afterwards.

    name[@revision] ──> repository ──hub: files and hashes──> big files, resumed, verified ──> snapshot folder

The cache is huggingface_hub's own (HF_HOME, or cache_dir), shared with every other program that uses it, and filled by
it, save that its client verifies no hash and starts anew after a kill: so big files are put there by `_fetch_blob`.
Beside the snapshot a record of the verified hashes is kept: with it, nothing asks the hub again. Knows nothing of
models.
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils.sha import git_hash

from moltron.common.manifest import read_json, sha256_file, write_json
from moltron.config.schema import DownloadConfig

REPOSITORIES = {
    "esm2_8M": "facebook/esm2_t6_8M_UR50D",
    "esm2_35M": "facebook/esm2_t12_35M_UR50D",
    "esm2_150M": "facebook/esm2_t30_150M_UR50D",
    "esm2_650M": "facebook/esm2_t33_650M_UR50D",
    "esm2_3B": "facebook/esm2_t36_3B_UR50D",
    "esm2_15B": "facebook/esm2_t48_15B_UR50D",
    "esm1b": "facebook/esm1b_t33_650M_UR50S",
}
PATTERNS = ["*.safetensors", "*.json", "vocab.txt"]
log = logging.getLogger(__name__)


def download(config: DownloadConfig) -> Path | None:
    """`moltron download`: fetch, verify every file again, say where it lies. Without a name: list the names.

    Raises: ValueError, see fetch.
    """
    if not config.name:
        print("\n".join(f"{name:12} {repository}" for name, repository in REPOSITORIES.items()))
        return None
    folder = fetch(config.name, config.cache_dir, config.offline, config.endpoint)
    _verify(folder, read_json(_record(folder)))
    print(folder)
    return folder


def fetch(name: str, cache_dir: str | Path | None = None, offline: bool = False, endpoint: str | None = None) -> Path:
    """The folder with the weights of `name` or `name@revision`, downloaded if need be.

    Raises ValueError if the name is unknown, the hub cannot be reached, the repository has no safetensors files, or a
    file does not match the hub's hash (that file is removed from the cache, so that the next call fetches it anew).
    """
    short, _, revision = name.partition("@")
    if short not in REPOSITORIES:
        raise ValueError(f"name={short} is unknown; there are: {', '.join(REPOSITORIES)}")
    repository, revision = REPOSITORIES[short], revision or "main"
    store = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    store /= repo_folder_name(repo_id=repository, repo_type="model")
    reference = store / "refs" / revision  # a file with the commit, unless `revision` is one
    folder = store / "snapshots" / (reference.read_text() if reference.is_file() else revision)
    if _record(folder).is_file() and all((folder / file).is_file() for file in read_json(_record(folder))):
        return folder
    if offline:
        raise ValueError(
            f"{repository} is not (or not wholly) in the cache {cache_dir or '(HF_HOME)'} and offline=true: run "
            f"`moltron download name={name}` where there is a network and copy the cache"
        )
    try:
        info = HfApi(endpoint=endpoint).model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:  # the hub client's errors come from three libraries
        raise ValueError(f"{repository}@{revision}: the hub does not answer as it should: {error}") from error
    siblings = [s for s in info.siblings or [] if any(Path(s.rfilename).match(p) for p in PATTERNS)]
    if not any(s.rfilename.endswith(".safetensors") for s in siblings):
        raise ValueError(
            f"{repository}@{revision} has no safetensors files: fetch its pytorch_model.bin with `hf download "
            f"{repository}` and run `moltron convert input=FOLDER output=DIR`, which reads it without executing code"
        )
    hashes = {s.rfilename: f"sha256:{s.lfs.sha256}" if s.lfs else f"git:{s.blob_id}" for s in siblings}
    size = sum(s.size or 0 for s in siblings)
    log.info("Downloading %s@%s: %d files, %.2f GB", repository, info.sha, len(hashes), size / 1e9)
    try:
        for sibling in siblings:
            if sibling.lfs is not None:
                url = hf_hub_url(repository, sibling.rfilename, revision=info.sha, endpoint=endpoint)
                _fetch_blob(url, store / "blobs" / sibling.lfs.sha256, sibling.lfs.size)
        snapshot = snapshot_download(
            repository, revision=revision, cache_dir=store.parent, endpoint=endpoint, allow_patterns=list(hashes)
        )
    except Exception as error:  # httpx's, the hub client's or the disk's
        raise ValueError(f"{repository}: download interrupted ({error}); the same command resumes it") from error
    folder = Path(snapshot)
    if folder.name != info.sha:
        raise ValueError(f"{repository}@{revision} changed on the hub during the download: run the command again")
    _verify(folder, hashes)
    _record(folder).parent.mkdir(exist_ok=True)
    write_json(_record(folder), hashes)
    return folder


def _fetch_blob(url: str, blob: Path, size: int) -> None:
    """Download to `blob`, going on where an earlier try, or a killed process, stopped."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{blob.name}.moltron-partial")
    with open(partial, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # one of several processes downloads, the others find the blob
        if not blob.is_file():
            if file.seek(0, os.SEEK_END) > size:  # not what the hub describes
                file.seek(file.truncate(0))
            http_get(url, file, resume_size=file.tell(), expected_size=size)
            partial.rename(blob)
    partial.unlink(missing_ok=True)


def _record(folder: Path) -> Path:
    """Beside, not in, the snapshot: <cache>/models--owner--name/moltron/<commit>.json."""
    return folder.parent.parent / "moltron" / f"{folder.name}.json"


def _verify(folder: Path, hashes: dict[str, str]) -> None:
    for name, expected in hashes.items():
        file = folder / name
        kind, _, digest = expected.partition(":")
        if (sha256_file(file) if kind == "sha256" else git_hash(file.read_bytes())) != digest:
            blob = file.resolve()
            file.unlink()
            blob.unlink(missing_ok=True)
            raise ValueError(f"{file}: does not match the hub's {expected}; removed, the same command fetches it again")
