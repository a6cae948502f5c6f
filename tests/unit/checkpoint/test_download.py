"""Downloads against a hub of our own on localhost: whole, cut off and resumed, damaged, offline."""

import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
from transformers import EsmConfig, EsmForMaskedLM

from moltron.checkpoint.download import REPOSITORIES, _fetch_blob, download, fetch
from moltron.checkpoint.weights import load_pretrained, resolve
from moltron.config.schema import DownloadConfig

COMMIT = "a" * 40
CHUNK = 1_000_000  # what a kill or a dropped line loses at most; the hub client's own is 10 MB, these files are as big


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """The endpoints that huggingface_hub asks: model info, tree, and files with ranges. `requests` records them."""

    def __init__(self, files, claimed=None):
        self.files, self.claimed = files, claimed or {}
        self.requests, self.stop_after, self.closing = [], None, threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def entry(self, name, key):
        content = self.claimed.get(name, self.files[name])
        entry = {key: name, "size": len(content), "blobId": git_hash(content), "oid": git_hash(content)}
        if name.endswith((".safetensors", ".bin")):
            sha = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": sha, "oid": sha, "size": len(content), "pointerSize": 130}
        return entry

    def handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def reply(self, status, body=b"", **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                url = urlparse(self.path)
                hub.requests.append((self.command, url.path, self.headers.get("Range")))
                if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", url.path):
                    repository, revision = match.groups()
                    if repository not in REPOSITORIES.values() or revision not in ("main", COMMIT):
                        return self.reply(404, b"{}", X_Error_Code="RevisionNotFound")
                    names = [hub.entry(name, "rfilename") for name in hub.files]
                    if "blobs" not in parse_qs(url.query):
                        names = [{"rfilename": name["rfilename"]} for name in names]
                    info = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": names}
                    return self.json(info)
                if re.fullmatch(rf"/api/models/[^/]+/[^/]+/tree/{COMMIT}", url.path):
                    return self.json([{"type": "file", **hub.entry(name, "path")} for name in hub.files])
                if match := re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", url.path):
                    return self.file(match[1])
                return self.reply(404, b"{}")

            def json(self, content):
                self.reply(200, json.dumps(content).encode(), Content_Type="application/json")

            def file(self, name):
                content, entry = hub.files[name], hub.entry(name, "path")
                headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{entry["blobId"]}"', "Accept_Ranges": "bytes"}
                if "lfs" in entry:
                    headers |= {"X_Linked_ETag": f'"{entry["lfs"]["sha256"]}"', "X_Linked_Size": entry["size"]}
                begin = 0
                if wanted := self.headers.get("Range"):
                    begin = int(re.match(r"bytes=(\d+)-", wanted)[1])
                    headers["Content_Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
                body = content[begin:]
                if self.command == "GET" and hub.stop_after is not None and len(body) > hub.stop_after:
                    self.send_response(206 if wanted else 200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body[: hub.stop_after])  # and then nothing more: the line is dead
                    self.wfile.flush()
                    hub.closing.wait(60)
                    return None
                return self.reply(206 if wanted else 200, body, **headers)

        return Handler


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    config = EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=320, num_hidden_layers=2, num_attention_heads=20,
        intermediate_size=1280, position_embedding_type="rotary", token_dropout=True, layer_norm_eps=1e-5,
    )  # fmt: skip
    EsmForMaskedLM(config).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(files["model.safetensors"]) > 9_000_000
    return files | {"README.md": b"# model", "pytorch_model.bin": b"not wanted", "vocab.txt": VOCABULARY}


VOCABULARY = "\n".join(
    ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
).encode()


@pytest.fixture
def hub(model_files):
    hub = Hub(dict(model_files))
    yield hub
    hub.closing.set()
    hub.server.shutdown()
    hub.server.server_close()


def fetched(hub):
    """Files whose content was sent, with the Range asked for."""
    return [
        (Path(path).name, wanted) for command, path, wanted in hub.requests if command == "GET" and "/resolve/" in path
    ]


def test_download_load_and_offline(tmp_path, hub, monkeypatch, capsys):
    folder = download(DownloadConfig(name="esm2_8M", cache_dir=str(tmp_path), endpoint=hub.endpoint))
    assert capsys.readouterr().out.strip() == str(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]
    assert sorted(fetched(hub)) == [("config.json", None), ("model.safetensors", None), ("vocab.txt", None)]
    hub.requests.clear()
    assert fetch("esm2_8M", tmp_path, offline=True) == folder
    assert fetch("esm2_8M", tmp_path, endpoint=hub.endpoint) == folder
    assert hub.requests == []  # what is whole and verified is not asked for again
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = load_pretrained("esm2_8M")
    assert loaded.config.hidden_size == 320
    assert loaded.source == str(folder)


def test_a_revision_can_be_pinned(tmp_path, hub, monkeypatch):
    folder = fetch(f"esm1b@{COMMIT}", tmp_path, endpoint=hub.endpoint)
    assert folder.name == COMMIT
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve(f"esm1b@{COMMIT}") == ("huggingface", folder)
    assert fetch(f"esm1b@{COMMIT}", tmp_path, offline=True).name == COMMIT
    with pytest.raises(ValueError, match=r"@v9: the hub does not answer"):
        fetch("esm1b@v9", tmp_path, endpoint=hub.endpoint)


def test_killed_and_resumed(tmp_path, hub):
    hub.stop_after = 5_000_000
    call = f"fetch('esm2_8M', {str(tmp_path)!r}, endpoint={hub.endpoint!r})"
    chunk = f"from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}"
    code = f"{chunk}; from moltron.checkpoint.download import fetch; {call}"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(p.stat().st_size >= 4_000_000 for p in tmp_path.rglob("*-partial")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    with pytest.raises(ValueError, match="not wholly"):
        fetch("esm2_8M", tmp_path, offline=True)
    hub.stop_after = None
    hub.requests.clear()
    folder = fetch("esm2_8M", tmp_path, endpoint=hub.endpoint)
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    (wanted,) = [wanted for name, wanted in fetched(hub) if name == "model.safetensors"]
    assert int(re.match(r"bytes=(\d+)-", wanted)[1]) >= 4_000_000
    assert not list(tmp_path.rglob("*-partial"))


def test_a_line_that_drops_and_one_that_is_dead(tmp_path, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.stop_after = 3_000_000  # each request brings no more than that
    folder = fetch("esm2_8M", tmp_path / "a", endpoint=hub.endpoint)
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    begins = [wanted for name, wanted in fetched(hub) if name.endswith("tensors")]
    assert begins == [None, "bytes=3000000-", "bytes=6000000-", "bytes=9000000-"]
    hub.stop_after = 0
    with pytest.raises(ValueError, match=r"download interrupted.*the same command resumes it"):
        fetch("esm2_35M", tmp_path / "b", endpoint=hub.endpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt"])
def test_a_damaged_file_is_refused_and_fetched_anew(tmp_path, hub, name):
    original = hub.files[name]
    hub.claimed[name] = original
    hub.files[name] = original[:-1] + bytes([original[-1] ^ 1])
    with pytest.raises(ValueError, match=rf"{name}: does not match the hub's (sha256|git):"):
        fetch("esm2_8M", tmp_path, endpoint=hub.endpoint)
    assert not list(tmp_path.rglob("model.safetensors")) or name == "vocab.txt"  # no other program finds it either
    with pytest.raises(ValueError, match="offline=true"):
        fetch("esm2_8M", tmp_path, offline=True)
    hub.files[name] = original
    folder = fetch("esm2_8M", tmp_path, endpoint=hub.endpoint)
    assert (folder / name).read_bytes() == original
    blob = (folder / name).resolve()
    blob.write_bytes(b"rot" + original[3:])  # damage on our own disk: the command looks again
    with pytest.raises(ValueError, match="does not match"):
        download(DownloadConfig(name="esm2_8M", cache_dir=str(tmp_path), offline=True))
    assert (fetch("esm2_8M", tmp_path, endpoint=hub.endpoint) / name).read_bytes() == original


def test_more_than_the_file_in_the_partial(tmp_path, hub):
    content = hub.files["model.safetensors"]
    blob = tmp_path / "models--facebook--esm2_t6_8M_UR50D" / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir(parents=True)
    blob.with_name(f"{blob.name}.moltron-partial").write_bytes(content + b"more")
    folder = fetch("esm2_8M", tmp_path, endpoint=hub.endpoint)
    assert (folder / "model.safetensors").read_bytes() == content


def test_several_at_once_download_once(tmp_path, hub):
    content = hub.files["model.safetensors"]
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    url = f"{hub.endpoint}/facebook/esm/resolve/main/model.safetensors"
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: _fetch_blob(url, blob, len(content)), range(3)))
    assert blob.read_bytes() == content
    assert len(fetched(hub)) == len(list(blob.parent.iterdir())) == 1


def test_only_bin_files(tmp_path, hub):
    del hub.files["model.safetensors"]
    with pytest.raises(ValueError, match=r"no safetensors files: fetch its pytorch_model\.bin.*moltron convert"):
        fetch("esm2_8M", tmp_path, endpoint=hub.endpoint)
    assert fetched(hub) == []


def test_clear_errors(tmp_path, hub, capsys):
    with pytest.raises(ValueError, match=r"is not \(or not wholly\) in the cache.*moltron download name=esm2_3B"):
        fetch("esm2_3B", tmp_path, offline=True)
    with pytest.raises(ValueError, match=r"name=esm3 is unknown; there are: esm2_8M"):
        fetch("esm3", tmp_path)
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(ValueError, match="the hub does not answer"):
        fetch("esm2_3B", tmp_path, endpoint=hub.endpoint)
    assert download(DownloadConfig()) is None
    assert "esm2_650M    facebook/esm2_t33_650M_UR50D" in capsys.readouterr().out
