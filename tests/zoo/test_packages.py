import functools
import hashlib
import http.server
import io
import subprocess
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from permprune.errors import PermpruneError
from permprune.zoo import packages
from permprune.zoo.packages import Package, fetch

METADATA = "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n"


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder that stands for the registry."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return shelf


@pytest.fixture
def wheel(shelf):
    file = shelf / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("thing/data/words.txt", "words")
        archive.writestr("thing/more.txt", "more")
        archive.writestr("thing/__init__.py", "raise SystemExit('never run this')")
        archive.writestr("thing-1.0.dist-info/METADATA", METADATA)
        archive.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("thing-1.0.dist-info/RECORD", "")
    return _package(file)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments):
        pass


@pytest.fixture
def index(shelf, monkeypatch):
    """A server of the files on the shelf, with a page of links for the package "thing"."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=shelf))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/")
    (shelf / "thing").mkdir()
    (shelf / "thing" / "index.html").write_text(
        '<a href="/thing-0.9.tar.gz#sha256=1">old</a><a href="../thing-1.0.tar.gz#sha256=2&amp;x">thing-1.0.tar.gz</a>'
    )
    yield shelf
    server.shutdown()
    server.server_close()


@pytest.fixture
def source(index):
    file = index / "thing-1.0.tar.gz"
    members = {"PKG-INFO": METADATA, "data/words.txt": "words"}
    with tarfile.open(file, "w:gz") as archive:
        directory = tarfile.TarInfo("thing-1.0/data")
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        for name, text in members.items():
            member = tarfile.TarInfo(f"thing-1.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return replace(_package(file), source=True)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def _package(file: Path) -> Package:
    return Package("thing", "1.0", hashlib.sha256(file.read_bytes()).hexdigest(), 1, "MIT")


def test_takes_the_members_of_a_wheel_alone(wheel, folder):
    files = fetch(wheel, ["thing/more.txt", "thing/data/words.txt"], folder)
    assert files == [folder / "more.txt", folder / "words.txt"]
    assert [file.read_text() for file in files] == ["more", "words"]
    assert sorted(folder.iterdir()) == sorted(files)


def test_takes_the_members_of_a_source_archive(source, folder):
    (file,) = fetch(source, ["thing-1.0/data/words.txt"], folder)
    assert file.read_text() == "words"
    assert list(folder.iterdir()) == [file]


def test_a_source_archive_with_another_digest(source, folder):
    with pytest.raises(PermpruneError, match=f"thing==1.0 is not the expected file, its SHA-256 is not {'0' * 64}"):
        fetch(replace(source, sha256="0" * 64), ["thing-1.0/data/words.txt"], folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "version", "reason"), [("thing", "2.0", r"it has no thing-2\.0\.tar\.gz"), ("other", "1.0", "404")]
)
def test_a_source_archive_that_the_index_does_not_have(source, folder, name, version, reason):
    with pytest.raises(
        PermpruneError, match=f"cannot fetch {name}=={version} from .*{reason}.*check the network"
    ) as caught:
        fetch(replace(source, name=name, version=version), ["thing-1.0/data/words.txt"], folder)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []


def test_certificates_that_are_missing(source, folder, monkeypatch):
    monkeypatch.setenv("PIP_CERT", str(folder / "none.pem"))
    with pytest.raises(PermpruneError, match=r"cannot fetch thing==1\.0 from .*No such file.*check the network"):
        fetch(source, ["thing-1.0/data/words.txt"], folder)


def test_a_source_archive_is_not_taken_for_a_wheel(source, folder):
    with pytest.raises(PermpruneError, match=r"cannot fetch thing==1\.0"):
        fetch(replace(source, source=False), ["thing-1.0/data/words.txt"], folder)


def test_wrong_digest(wheel, folder):
    with pytest.raises(PermpruneError, match="check the package index") as caught:
        fetch(replace(wheel, sha256="0" * 64), ["thing/more.txt"], folder)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []


def test_absent_member_of_a_wheel(wheel, folder):
    with pytest.raises(PermpruneError, match="holds no thing/other"):
        fetch(wheel, ["thing/more.txt", "thing/other"], folder)


@pytest.mark.parametrize("member", ["thing-1.0/other", "thing-1.0/data"])
def test_absent_member_of_a_source_archive(source, folder, member):
    with pytest.raises(PermpruneError, match=f"holds no {member}"):
        fetch(source, [member], folder)


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (
            "WARNING: retrying\nERROR: No matching distribution\nERROR: more\n",
            r"\(No matching distribution\)",
        ),
        ("python: No module named pip\n", "No module named pip"),
        ("", "no message"),
    ],
)
def test_pip_fails(monkeypatch, wheel, folder, stderr, reason):
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(packages.subprocess, "run", lambda *_args, **_options: failed)
    with pytest.raises(PermpruneError, match=f"cannot fetch thing==1.0 .*{reason}.*check the network") as caught:
        fetch(wheel, ["thing/more.txt"], folder)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []
