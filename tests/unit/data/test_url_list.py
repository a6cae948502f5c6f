"""moltron download urls=…: against a server of our own that breaks, forgets ranges, or changes its files."""

import hashlib
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from moltron.cli.commands import download
from moltron.common.lock import locked
from moltron.config.schema import DownloadConfig
from moltron.data.prepare import url_list
from moltron.data.prepare.url_list import FAILED, fetch_list, read_list
from moltron.data.readers import expand_inputs


class Server:
    """files: path -> content; faults: path -> statuses to answer with first, or "cut": half of what is asked for."""

    def __init__(self):
        self.files, self.faults, self.requests = {}, {}, []
        self.ranges, self.etags = True, True
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def handler(outer):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
                outer.requests.append((self.path, asked))
                fault = outer.faults.get(self.path, []).pop(0) if outer.faults.get(self.path) else None
                content = outer.files.get(self.path)
                if isinstance(fault, int) or content is None:
                    return self.send_error(fault or 404)
                etag = f'"{hashlib.md5(content).hexdigest()}"'
                begin = int(asked[6:-1]) if asked and outer.ranges and condition in (None, etag) else 0
                if begin and begin >= len(content):
                    return self.send_error(416)
                self.send_response(206 if begin else 200)
                if begin:
                    self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
                if outer.etags:
                    self.send_header("ETag", etag)
                self.send_header("Content-Length", str(len(content) - begin))
                self.end_headers()
                body = content[begin:]
                self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
                return None

        return Handler


@pytest.fixture
def server():
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def run(tmp_path, server):
    def run(*lines):
        (tmp_path / "list.txt").write_text("".join(line.replace("@", server.url) + "\n" for line in lines))
        return fetch_list(tmp_path / "list.txt", tmp_path / "out", wait=0.01)

    return run


BIG = bytes(range(256)) * 5_000


def test_downloads_once_and_leaves_nothing_else(server, run, tmp_path):
    server.files = {"/2D/AA/AAAA.txt": b"smiles zinc_id\n", "/2D/AB/AAAB.txt.gz": BIG}
    sha, md5 = hashlib.sha256(BIG).hexdigest(), hashlib.md5(b"smiles zinc_id\n").hexdigest()
    lines = ["# tranches", "", f"@/2D/AA/AAAA.txt md5:{md5.upper()}", f"{sha}  @/2D/AB/AAAB.txt.gz", "@/2D/AA/AAAA.txt"]
    with pytest.raises(ValueError, match="line 5: another hash than in an earlier line"):
        run(*lines)
    lines[-1] = lines[2]
    folder = run(*lines)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {"AAAA.txt": b"smiles zinc_id\n", "AAAB.txt.gz": BIG}
    assert len(server.requests) == 2
    run(*lines)
    assert len(server.requests) == 2
    (folder / "AAAA.txt").write_text("changed")  # has a hash, so it is seen
    run(*lines)
    assert (folder / "AAAA.txt").read_bytes() == b"smiles zinc_id\n"


def test_tries_again_and_resumes(server, run):
    server.files, server.faults = {"/a": BIG}, {"/a": ["cut", 503, "cut"]}
    folder = run("@/a")
    assert (folder / "a").read_bytes() == BIG
    assert [asked for _, asked in server.requests] == [None, "bytes=640000-", "bytes=640000-", "bytes=960000-"]


@pytest.mark.parametrize("what", ["no ranges", "another version", "nothing to tell versions by"])
def test_never_joins_two_files(server, run, tmp_path, what):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.partial").write_bytes(b"of another version")
    (tmp_path / "out" / "a.partial-of").write_text("" if what.startswith("nothing") else '"old"')
    server.files, server.ranges, server.etags = {"/a": BIG}, what != "no ranges", not what.startswith("nothing")
    assert (run("@/a") / "a").read_bytes() == BIG
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["a"]


def test_a_wrong_partial_is_found_by_its_hash(server, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.partial").write_bytes(b"wrong" * 1000)
    server.files, server.etags = {"/a": BIG}, False
    assert (run(f"@/a {hashlib.sha256(BIG).hexdigest()}") / "a").read_bytes() == BIG
    assert [asked for _, asked in server.requests] == ["bytes=5000-", None]
    (tmp_path / "out" / "b.partial").write_bytes(BIG + b"more")
    server.files["/b"] = BIG
    assert (run(f"@/b {hashlib.sha256(BIG).hexdigest()}") / "b").read_bytes() == BIG


def test_failures_are_listed_and_the_rest_is_there(server, run, tmp_path):
    server.files = {"/good": b"g", "/bad": b"b", "/later": b"l"}
    server.faults = {"/later": [500] * 5}
    wrong = "0" * 64
    with pytest.raises(ValueError, match=r"3 of 4 files failed.*failed\.urls has all\. The same command"):
        run("@/good", f"@/bad {wrong}", "@/gone", "@/later")
    assert sorted(f.name for f in (tmp_path / "out").iterdir() if ".partial" not in f.name) == [FAILED, "good"]
    text = (tmp_path / "out" / FAILED).read_text()
    assert "/bad " in text and "another hash" in text and "HTTP 404" in text and "500" in text
    assert sum(path == "/gone" for path, _ in server.requests) == 1  # no use in trying again
    assert [item.url.rsplit("/", 1)[1] for item in read_list(tmp_path / "out" / FAILED)] == ["bad", "gone", "later"]
    assert run("@/later") and not (tmp_path / "out" / FAILED).exists()


HOLD = """
import sys
from pathlib import Path
from moltron.common.lock import locked
with locked(Path(sys.argv[1]), 0, lambda x: x):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_command_is_told(server, run, tmp_path):
    server.files, out = {"/a": b"a"}, tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(out / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=rf"out/\.lock is held by process {holder.pid}"):
            run("@/a")
        assert server.requests == [] and [f.name for f in out.iterdir()] == [".lock"]
        holder.communicate()
    assert [f.name for f in run("@/a").iterdir()] == ["a"]


def test_prepare_reads_only_what_is_whole(server, run, tmp_path):
    server.files, server.faults = {"/a.smi": b"CCO a\n", "/b.smi": b"CCN b\n"}, {"/b.smi": ["cut"] * 5}
    with pytest.raises(ValueError, match="1 of 2 files failed"):
        run("@/a.smi", "@/b.smi")
    out = tmp_path / "out"
    with locked(out / ".lock", 0, lambda x: x):
        assert sorted(f.name for f in out.iterdir()) == [".lock", "a.smi", "b.smi.partial", "b.smi.partial-of", FAILED]
        assert expand_inputs(out) == [str(out / "a.smi")]


def test_names_are_safe_and_different(tmp_path):
    urls = ["http://h/a/x.smi", "http://h/b/x.smi", "http://h/..%2f..%2fetc%2fpasswd", "http://h/.hidden?x=/y"]
    (tmp_path / "l").write_text("\n".join(urls))
    names = [item.name for item in read_list(tmp_path / "l")]
    assert len(set(names)) == 4 and all("/" not in name and not name.startswith(".") for name in names)
    assert names[0].endswith("-x.smi") and names[2:] == ["_.._etc_passwd", "hidden"]


@pytest.mark.parametrize(
    "line", ["file:///etc/passwd", "x", "http://h/", "http://h/a b", f"http://h/a {'0' * 40}", "a http://h/a"]
)
def test_a_line_that_is_no_url(tmp_path, line):
    (tmp_path / "l").write_text(f"http://h/good\n{line}\n")
    with pytest.raises(ValueError, match="line 2: expected a URL"):
        read_list(tmp_path / "l")


def test_as_a_command(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(url_list, "TRIES", 1)
    server.files = {"/a.smi": b"CCO a\n"}
    (tmp_path / "l").write_text(f"{server.url}/a.smi\n")
    assert download(DownloadConfig(urls=str(tmp_path / "l"), output=str(tmp_path / "out"))) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    for wrong in ({"urls": "x"}, {"output": "x"}, {"urls": "x", "output": "y", "name": "esm2_8M"}):
        with pytest.raises(ValueError, match="belong together"):
            download(DownloadConfig(**wrong))
    with pytest.raises(ValueError, match="cannot be read"):
        download(DownloadConfig(urls=str(tmp_path / "none"), output=str(tmp_path / "out")))
