from __future__ import annotations

import io
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import create_autospec

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from torch.utils.data import DataLoader

from aligndet.data import addresses, tars
from aligndet.data.images import ImageError, StoredImage, read_image, read_image_size
from aligndet.data.listing import list_images
from aligndet.data.sources import ImageSource
from aligndet.data.views import TwoViewDataset
from aligndet.proposals.storage import read_proposals
from aligndet.proposals.table import ImageProposals, ProposalTable
from aligndet.training import StepSampler
from aligndet.workers import worker_settings


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of these files, each with a file beside it that is no image, as WebDataset has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            for member, data in ((name, content), (f"{name}.json", b"{}")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def pictures(sample: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((sample / "train").glob("*.jpg"))}


@pytest.fixture
def shards(pictures: dict[str, bytes], tmp_path: Path) -> Path:
    """The sample's images in two tars, one in a subfolder, in an order that is not that of the names."""
    names = sorted(pictures)
    write_tar(tmp_path / "shards" / "a.tar", {f"./{name}": pictures[name] for name in reversed(names[:7])})
    write_tar(tmp_path / "shards" / "b" / "c.tar", {name: pictures[name] for name in names[7:]})
    return tmp_path / "shards"


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    files = MemoryFileSystem()
    yield files
    files.store.clear()


class Ranges(SimpleHTTPRequestHandler):
    """Python's server of files, with ranges."""

    protocol_version = "HTTP/1.1"

    def send_head(self) -> Any:
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        if wanted is None or not path.is_file():
            return super().send_head()
        content = path.read_bytes()
        first, last = (int(number or len(content) - 1) for number in wanted.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return io.BytesIO(part)

    def list_directory(self, path: Any) -> None:
        self.send_error(403)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def served(folder: Path, kind: type[SimpleHTTPRequestHandler] = Ranges) -> Iterator[str]:
    """The address of a web server that has a folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(kind, directory=str(folder))) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture(params=[Ranges])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with served(tmp_path, request.param) as address:
        yield address


def content(source: ImageSource, name: str) -> bytes:
    image = source / name
    return image.read_bytes() if isinstance(image, Path) else image.content


def check_same(source: ImageSource, pictures: dict[str, bytes], listed: Path | None = None) -> None:
    names = source.names(listed)
    assert [name.rsplit("/")[-1] for name in names] == sorted(pictures)
    for name in names:
        assert content(source, name) == pictures[name.rsplit("/")[-1]]


def test_a_local_folder_gives_paths_as_before(sample: Path) -> None:
    for place in (sample / "train", str(sample / "train")):
        source = ImageSource(place)
        assert source.names() == list_images(sample / "train")
        assert source / "00000.jpg" == sample / "train" / "00000.jpg"
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        ImageSource(sample / "nowhere").names()


def test_images_are_selected_by_lists(sample: Path, tmp_path: Path) -> None:
    source, listed, others = ImageSource(sample / "train"), tmp_path / "listed.txt", tmp_path / "others.txt"
    names = source.names()
    listed.write_text("\n".join([names[4], "gone.jpg", names[1]]))
    others.write_text("\n".join([names[1], "gone.jpg", names[0]]))
    assert source.select(names) == names
    assert source.select(names, only=listed) == [names[1], names[4]]
    assert source.select(names, exclude=others) == names[2:]
    assert source.select(names, only=listed, exclude=others) == [names[4]]
    for wrong, message in ((["gone.jpg"], "names none of the"), (names, "names all of the")):
        others.write_text("\n".join(wrong))
        with pytest.raises(ValueError, match=rf"others\.txt: {message} {len(names)} images \({names[0]}"):
            source.select(names, exclude=others)
    listed.write_text("gone.jpg")
    for some in (names, []):
        with pytest.raises(ValueError, match=rf"listed\.txt: names none of the {len(some)} images"):
            source.select(some, only=listed)


def test_a_tar_in_the_root_folder() -> None:
    assert ImageSource("/data.tar")._root == "/"
    assert ImageSource("data.tar")._root == "."


def test_tars_are_folders(
    shards: Path, sample: Path, pictures: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ImageSource(shards)
    names = source.names()
    assert names[0] == "a.tar/00000.jpg"
    assert names[-1] == "b/c.tar/00011.jpg"
    check_same(source, pictures)
    assert read_image_size(source / names[0]) == read_image_size(sample / "train" / "00000.jpg")
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 1000
    assert content(copy, names[3]) == content(source, names[3])
    single = ImageSource(shards / "b" / "c.tar")
    assert single.names() == [f"{number:05d}.jpg" for number in range(7, 12)]
    assert content(single, "00009.jpg") == pictures["00009.jpg"]
    # the second time, no tar is gone through
    monkeypatch.setattr(tars, "scan_tar", None)
    assert ImageSource(str(shards)).names() == names


def test_hard_links_in_a_tar_are_images(pictures: dict[str, bytes], tmp_path: Path) -> None:
    name, content_of_both = next(iter(pictures.items()))
    (tmp_path / name).write_bytes(content_of_both)
    (tmp_path / "linked.jpg").hardlink_to(tmp_path / name)
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for path in (tmp_path / name, tmp_path / "linked.jpg"):
            archive.add(path, f"./{path.name}")
        assert archive.getmembers()[1].islnk()
    source = ImageSource(tmp_path / "all.tar")
    assert source.names() == sorted([name, "linked.jpg"])
    assert content(source, "linked.jpg") == content_of_both


def test_a_folder_named_like_a_tar_is_a_folder(pictures: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "a.tar").mkdir()
    (tmp_path / "a.tar" / "1.jpg").write_bytes(pictures["00000.jpg"])
    assert ImageSource(tmp_path).names() == ["a.tar/1.jpg"]
    assert ImageSource(tmp_path) / "a.tar/1.jpg" == tmp_path / "a.tar" / "1.jpg"
    assert ImageSource(tmp_path / "a.tar").names() == ["1.jpg"]


def test_a_tar_that_has_changed_is_looked_up_anew(pictures: dict[str, bytes], tmp_path: Path) -> None:
    source = ImageSource(tmp_path)
    write_tar(tmp_path / "a.tar", {"1.jpg": pictures["00000.jpg"]})
    assert source.names() == ["a.tar/1.jpg"]
    write_tar(tmp_path / "a.tar", {"0.jpg": pictures["00001.jpg"], "1.jpg": pictures["00002.jpg"]})
    assert source.names() == ["a.tar/0.jpg", "a.tar/1.jpg"]
    assert content(source, "a.tar/1.jpg") == pictures["00002.jpg"]
    write_tar(tmp_path / "a.tar", {"1.jpg": pictures["00002.jpg"], "0.jpg": pictures["00001.jpg"]})
    os.utime(tmp_path / "a.tar", (1, 1))  # of the same size
    assert source.names() == ["a.tar/0.jpg", "a.tar/1.jpg"]
    assert content(source, "a.tar/1.jpg") == pictures["00002.jpg"]


def test_a_tar_is_known_however_it_was_asked_for(
    shards: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 tells more of a file alone than of the same one in a list."""
    memory.put(str(shards), "/asked", recursive=True)
    asked = 0

    def info(self: MemoryFileSystem, path: str, **_: Any) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        known = {"name": path, "size": 5, "type": "file", "ETag": '"abc"'}
        return {**known, "VersionId": asked} if asked % 2 else known

    ImageSource("memory://asked").names()
    scanned = create_autospec(tars.scan_tar, side_effect=tars.scan_tar)
    monkeypatch.setattr(tars, "scan_tar", scanned)
    monkeypatch.setattr(MemoryFileSystem, "info", info)
    ImageSource("memory://asked").names()
    first = scanned.call_count  # the tars look other than before
    ImageSource("memory://asked").names()
    assert first == scanned.call_count > 0


def test_names_in_a_file_system_without_a_root(pictures: dict[str, bytes], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("cat/1.jpg", "2.jpg"):
            archive.writestr(name, pictures["00001.jpg"])
    source = ImageSource(f"zip://::{tmp_path}/x.zip")
    assert source.names() == ["2.jpg", "cat/1.jpg"]
    assert content(source, "cat/1.jpg") == pictures["00001.jpg"]


def test_a_broken_index_is_made_anew(shards: Path, cache: Path, pictures: dict[str, bytes]) -> None:
    ImageSource(shards).names()
    for index in cache.rglob("*.arrow"):
        index.write_bytes(index.read_bytes()[:100])
    tars.tar_index.cache_clear()
    check_same(ImageSource(shards), pictures)


def test_an_address(shards: Path, pictures: dict[str, bytes], memory: MemoryFileSystem) -> None:
    memory.pipe({f"/plain/{name}": data for name, data in pictures.items()})
    memory.pipe({"/plain/.hidden/1.jpg": b"", "/plain/notes.txt": b""})
    check_same(ImageSource("memory://plain/"), pictures)
    memory.put(str(shards), "/tars", recursive=True)
    check_same(ImageSource("memory://tars"), pictures)
    assert ImageSource("memory://tars/b/c.tar").names()[0] == "00007.jpg"
    assert read_image(ImageSource("memory://tars/b/c.tar") / "00007.jpg").shape[0] == 3
    check_same(ImageSource(shards.as_uri()), pictures)
    with pytest.raises(ValueError, match="memory://nothing: holds no image"):
        ImageSource("memory://nothing").names()


@pytest.mark.slow
def test_an_object_store(
    shards: Path, pictures: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3's protocol, spoken with a server of its own."""
    s3fs, moto = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
        monkeypatch.setenv(f"AWS_{name}", "us-east-1")
    store = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    store.start()
    try:
        host, port = store.get_host_and_port()
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}"})
        monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", f"http://{host}:{port}")  # for other processes
        files = s3fs.S3FileSystem()
        files.mkdir("bucket")
        files.pipe({f"bucket/plain/{name}": data for name, data in pictures.items()})
        files.put(str(shards), "bucket/tars", recursive=True)
        check_same(ImageSource("s3://bucket/plain"), pictures)
        check_same(ImageSource("s3://bucket/tars"), pictures)
        for place in ("plain", "tars/a.tar"):
            with pytest.raises(ImageError, match=r"none\.jpg: no such (file|image)"):
                content(ImageSource(f"s3://bucket/{place}"), "none.jpg")
        with pytest.raises(ValueError, match="s3://bucket/nothing: holds no image"):
            ImageSource("s3://bucket/nothing").names()
        # a process of its own: those that read images have the environment of the first that was started
        command = [sys.executable, "-m", "aligndet", "propose", "s3://bucket/tars"]
        subprocess.run([*command, f"--output={tmp_path / 'proposals'}", "--workers=2"], check=True)
        assert len(read_proposals(tmp_path / "proposals")) == len(pictures)
    finally:
        store.stop()


def test_a_web_server_wants_a_list(
    server: str, shards: Path, pictures: dict[str, bytes], tmp_path: Path
) -> None:
    for name, data in pictures.items():
        (tmp_path / f"a #1 {name}").write_bytes(data)
    with pytest.raises(ValueError, match="--names FILE"):
        ImageSource(server).names()
    (tmp_path / "list.txt").write_text("\n".join(f"a #1 {name}" for name in pictures) + "\n\n")
    source = ImageSource(server)
    assert content(source, source.names(tmp_path / "list.txt")[3]) == pictures["00003.jpg"]
    pq.write_table(pa.table({"file_name": ["b/c.tar", "a.tar"]}), tmp_path / "list.parquet")
    check_same(ImageSource(f"{server}/shards"), pictures, tmp_path / "list.parquet")
    with pytest.raises(ImageError, match=r"none\.jpg: no such file"):
        content(source, "none.jpg")
    (tmp_path / "list.txt").write_text("../1.jpg")
    with pytest.raises(ValueError, match=r"list\.txt: refuses .*\.\./1\.jpg"):
        source.names(tmp_path / "list.txt")


@pytest.mark.parametrize("server", [SimpleHTTPRequestHandler], indirect=True)
def test_a_web_server_without_ranges_is_named(server: str, shards: Path, tmp_path: Path) -> None:
    source = ImageSource(f"{server}/shards")
    local = ImageSource(shards)
    local.names()
    # an index that was made when the server had ranges
    index = tars._index_path(f"{server}/shards", "a.tar")
    index.parent.mkdir(parents=True, exist_ok=True)
    index.write_bytes(tars._index_path(str(shards), "a.tar").read_bytes())
    with pytest.raises(ImageError, match=r"a\.tar/00000\.jpg: .* ranges"):
        content(source, "a.tar/00000.jpg")


def test_what_is_missing_or_broken_in_a_tar_is_named(
    shards: Path, pictures: dict[str, bytes], tmp_path: Path
) -> None:
    whole = (shards / "a.tar").read_bytes()
    source = ImageSource(tmp_path / "cut")
    (tmp_path / "cut").mkdir()
    for length in (len(whole) // 2, len(whole) // 2 // 512 * 512 + 100, 300):
        (tmp_path / "cut" / "a.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut/a\.tar: broken, truncated"):
            source.names()
    (tmp_path / "cut" / "a.tar").write_bytes(whole[: len(whole) // 2])
    names = [f"a.tar/{number:05d}.jpg" for number in range(7)]
    source.prepare(names, tmp_path)  # a broken image is skipped, and named when it is read
    assert content(source, "a.tar/00006.jpg") == pictures["00006.jpg"]
    with pytest.raises(ImageError, match=r"a\.tar/00000\.jpg: no such image .*truncated"):
        content(source, "a.tar/00000.jpg")
    with pytest.raises(ImageError, match=r"a\.tar/none\.jpg: no such image"):
        content(ImageSource(shards), "a.tar/none.jpg")
    with pytest.raises(ImageError, match=r"none\.tar: no such file"):
        content(ImageSource(shards), "none.tar/1.jpg")
    with pytest.raises(ValueError, match=r"none of its 1 images is in .*none\.tar: no such file"):
        source.prepare(["none.tar/1.jpg"], tmp_path)
    damaged = bytearray(whole)
    with tarfile.open(shards / "a.tar") as archive:
        damaged[archive.getmembers()[4].offset] ^= 255
    (tmp_path / "cut" / "a.tar").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"cut/a\.tar: broken.*no header at byte"):
        source.names()


def test_names_that_lead_out_of_a_tar_are_refused(tmp_path: Path) -> None:
    for number, name in enumerate(("../1.jpg", "/etc/1.jpg", "a/../../1.jpg")):
        write_tar(tmp_path / str(number) / "a.tar", {name: b"x"})
        with pytest.raises(ValueError, match="refuses the file name"):
            ImageSource(tmp_path / str(number)).names()


class Flaky(MemoryFileSystem):
    """Fails a number of times before each success."""

    protocol = "flaky"
    failures, left = 0, 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def _fail(self) -> None:
        type(self).left -= 1
        if self.left >= 0:
            raise TimeoutError("no answer")
        type(self).left = self.failures

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self._fail()
        return super().cat_file(path, start, end)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self._fail()
        return super().info(path)


@pytest.fixture
def flaky(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> type[Flaky]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(Flaky, "failures", 0)
    monkeypatch.setattr(Flaky, "left", 0)
    monkeypatch.setattr(addresses, "PAUSES", (0.001,) * 3)
    return Flaky


@pytest.mark.parametrize("setting", [False, True])
def test_a_web_server_that_says_nothing_is_given_up(setting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Any] = {}
    monkeypatch.setattr(addresses, "PAUSES", ())
    if setting:
        known["http"] = {"client_kwargs": {"timeout": 0.2}}
    else:
        monkeypatch.setattr(addresses, "_SILENCE", 0.2)
    monkeypatch.setattr(addresses, "conf", known)
    monkeypatch.setattr("fsspec.config.conf", known)
    addresses._limit_silence.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        source = ImageSource(f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(ImageError, match=r"1\.jpg: 1 attempts have failed"):
            content(source, "1.jpg")
        assert time.monotonic() - began < 30
    addresses._limit_silence.cache_clear()


def table(source: ImageSource, names: list[str]) -> ProposalTable:
    boxes = np.array([[10, 10, 60, 60]], np.float32)
    sizes = [read_image_size(source / name) for name in names]
    return ProposalTable.of(
        [ImageProposals(name, *size, boxes) for name, size in zip(names, sizes, strict=True)]
    )


def test_a_network_that_comes_back_is_waited_for_and_one_that_does_not_is_named(
    flaky: type[Flaky], shards: Path, pictures: dict[str, bytes], memory: MemoryFileSystem
) -> None:
    memory.put(str(shards), "/data", recursive=True)
    memory.pipe("/data/1.jpg", pictures["00001.jpg"])
    source = ImageSource("flaky://data")
    flaky.failures = flaky.left = 2
    assert content(source, "1.jpg") == pictures["00001.jpg"]
    assert content(source, "a.tar/00003.jpg") == pictures["00003.jpg"]
    source.prepare(["1.jpg", "b/c.tar/00007.jpg"], Path("proposals"))
    for name in ("1.jpg", "a.tar/00003.jpg"):
        flaky.left = 4
        with pytest.raises(ImageError, match=rf"{name}: 4 attempts have failed \(TimeoutError: no answer\)"):
            content(source, name)
    flaky.failures = flaky.left = 0
    boxes = table(source, ["1.jpg", "a.tar/00003.jpg"])
    # in training it is skipped: the first of two fails until the second is asked for
    flaky.failures, flaky.left = 0, 4
    views = TwoViewDataset(source, boxes, min_size=(64, 64), max_size=128)
    item = views[0, 0]
    assert item.file_name == "a.tar/00003.jpg"
    assert "flaky://data/1.jpg: 4 attempts" in item.skipped[0]
    flaky.left = 4
    views.strict = True
    with pytest.raises(ImageError, match=r"1\.jpg: 4 attempts"):
        views[0, 0]


def test_addresses_that_nobody_knows_and_paths_that_were_addresses() -> None:
    with pytest.raises(ValueError, match=r"smoke://a/b: .*smoke"):
        ImageSource("smoke://a/b")
    with pytest.raises(ValueError, match="give an address as a string"):
        ImageSource(Path("s3://bucket/images"))


def test_the_package_for_an_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"class": "package_that_is_not_there.FileSystem", "err": "Install it"}
    monkeypatch.setitem(known_implementations, "absent", known)
    with pytest.raises(ImportError, match=r"absent://a: .*pip install package_that_is_not_there"):
        ImageSource("absent://a")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_reads_the_same_images_of_tars(workers: int, shards: Path, sample: Path) -> None:
    def batches(place: Path, first: int, workers: int = 0) -> list[Any]:
        source = ImageSource(place)
        names = source.names()
        source.prepare(names, place)
        views = TwoViewDataset(source, table(source, names), min_size=(64, 96), max_size=128, strict=True)
        sampler = StepSampler(len(names), batch_size=4, batches=5, seed=3, first=first)
        return list(DataLoader(views, batch_sampler=sampler, collate_fn=list, **worker_settings(workers)))

    plain, whole, resumed = batches(sample / "train", 0), batches(shards, 0), batches(shards, 2, workers)
    for expected, found in (*zip(plain, whole, strict=True), *zip(plain[2:], resumed, strict=True)):
        for a, b in zip(expected, found, strict=True):
            assert b.file_name.endswith(a.file_name)
            assert torch.equal(a.online.image, b.online.image)
            assert torch.equal(a.momentum.proposals, b.momentum.proposals)


def test_a_stored_image_is_read_once_and_named_if_it_is_broken() -> None:
    image = StoredImage("s3://a/1.jpg", lambda: b"")
    with pytest.raises(ImageError, match=r"s3://a/1\.jpg: is empty"):
        read_image(image)
    with pytest.raises(ImageError, match=r"s3://a/2\.jpg: is no image"):
        read_image_size(StoredImage("s3://a/2.jpg", lambda: b"text"))
    answers = iter([b"once"])
    image = StoredImage("s3://a/3.jpg", lambda: next(answers))
    assert image.content == image.content == b"once"
