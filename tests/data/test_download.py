"""Downloading the dataset, with a hub that is a folder or does not answer."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from tinyagent_fast.data.download import DATASET_FILES, DownloadedFile, download_dataset
from tinyagent_fast.errors import DataError

CONTENT = {name: f'{{"{name}": 1}}'.encode() for name in DATASET_FILES}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    request = httpx.Request("HEAD", "https://hub.example/file")
    return kind("refused", response=httpx.Response(status, request=request))


@dataclass
class Hub:
    """Stands for the hub and its cache folder; records what is asked of it."""

    cache: Path
    probe_error: Exception | None = None
    fetch_error: Exception | None = None
    names_sha256: bool = True
    fetched: list[tuple[str, str, bool]] = field(default_factory=list)

    def metadata(self, url: str, **_: object) -> SimpleNamespace:
        if self.probe_error is not None:
            raise self.probe_error
        content = CONTENT[url.rsplit("/", 1)[1]]
        etag = digest(content) if self.names_sha256 else "abc"
        return SimpleNamespace(size=len(content), etag=etag)

    def download(
        self,
        repo: str,
        name: str,
        *,
        repo_type: str,
        revision: str,
        local_files_only: bool,
        tqdm_class: Any,
    ) -> str:
        assert repo_type == "dataset"
        self.fetched.append((name, revision, local_files_only))
        if self.fetch_error is not None:
            raise self.fetch_error
        blob = self.cache / f"blob-{name}"
        link = self.cache / name
        if not blob.exists():
            if local_files_only:
                raise errors.LocalEntryNotFoundError("not in the cache")
            with tqdm_class(total=len(CONTENT[name]), disable=True) as bar:
                blob.write_bytes(CONTENT[name])
                bar.update(len(CONTENT[name]))
            link.symlink_to(blob)
        return str(link)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    cache = tmp_path / "hub"
    cache.mkdir()
    fake = Hub(cache)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fake.metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    return fake


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow what all tests are forbidden: here nothing is asked but what stands in for the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


def download(folder: Path, revision: str = "main") -> list[DownloadedFile]:
    return download_dataset(folder, revision=revision)


def test_it_is_told_how_far_a_transfer_is(hub: Hub, folder: Path) -> None:
    told: list[tuple[int, int]] = []
    download_dataset(
        folder, revision="main", on_progress=lambda done, total: told.append((done, total))
    )
    sizes = [len(CONTENT[name]) for name in DATASET_FILES]
    assert told == [(size, size) for size in sizes]


def test_both_files_are_placed_with_size_and_sha256(hub: Hub, folder: Path) -> None:
    files = download(folder)
    assert [file.path for file in files] == [folder / name for name in DATASET_FILES]
    for file in files:
        content = CONTENT[file.path.name]
        assert file.path.read_bytes() == content
        assert not file.path.is_symlink()
        assert (file.size_bytes, file.sha256) == (len(content), digest(content))
        assert file.note == "fetched at main"
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*.tmp"))


def test_the_revision_is_passed_on(hub: Hub, folder: Path) -> None:
    download(folder, "abc123")
    assert hub.fetched == [(name, "abc123", False) for name in DATASET_FILES]


def test_a_complete_file_is_not_fetched_again_nor_the_hub_asked(hub: Hub, folder: Path) -> None:
    download(folder)
    hub.fetched.clear()
    hub.probe_error = AssertionError("the hub was asked")
    files = download(folder)
    assert hub.fetched == []
    assert {file.note for file in files} == {"already there, fetched at main"}


def test_the_files_are_copied_where_they_cannot_be_linked(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", no_link)
    assert [file.path.read_bytes() for file in download(folder)] == list(CONTENT.values())


def test_a_file_placed_by_hand_is_kept_if_it_is_the_same(hub: Hub, folder: Path) -> None:
    folder.mkdir()
    (folder / DATASET_FILES[0]).write_bytes(CONTENT[DATASET_FILES[0]])
    files = download(folder)
    assert files[0].note == "already there, same as main"
    assert [name for name, *_ in hub.fetched] == [DATASET_FILES[1]]


@pytest.mark.parametrize("content", [b'{"mine": 2}', b"[1]", b"text"])
def test_another_file_in_place_is_not_overwritten(hub: Hub, folder: Path, content: bytes) -> None:
    folder.mkdir()
    mine = folder / DATASET_FILES[0]
    mine.write_bytes(content)
    with pytest.raises(DataError, match="another file is in place"):
        download(folder)
    assert mine.read_bytes() == content


def test_without_network_only_what_can_be_a_data_file_is_kept(hub: Hub, folder: Path) -> None:
    hub.probe_error = httpx.ConnectError("no route")
    folder.mkdir()
    for name in DATASET_FILES:
        (folder / name).write_bytes(b'{"mine": 2}')
    assert {file.note[:13] for file in download(folder)} == {"already there"}
    (folder / DATASET_FILES[0]).write_bytes(b"text")
    with pytest.raises(DataError, match="is not a JSON object"):
        download(folder)


@pytest.mark.parametrize(
    "content", [b"", b'{"cut": ', b"version https://git-lfs.github.com/spec/v1"]
)
def test_an_incomplete_file_in_place_is_replaced(hub: Hub, folder: Path, content: bytes) -> None:
    folder.mkdir()
    (folder / DATASET_FILES[0]).write_bytes(content)
    assert download(folder)[0].path.read_bytes() == CONTENT[DATASET_FILES[0]]


def test_another_revision_replaces_what_was_fetched(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download(folder, "old")
    for name in DATASET_FILES:
        monkeypatch.setitem(CONTENT, name, b'{"new": 1}')
        (hub.cache / f"blob-{name}").unlink()
        (hub.cache / name).unlink()
    files = download(folder, "new")
    assert [file.path.read_bytes() for file in files] == [b'{"new": 1}'] * 2


def test_a_file_edited_after_the_download_is_not_overwritten(hub: Hub, folder: Path) -> None:
    edited = download(folder)[0].path
    edited.unlink()
    edited.write_bytes(b'{"edited": 1}')
    with pytest.raises(DataError, match="may be your own"):
        download(folder)


def test_a_broken_transfer_leaves_nothing_and_goes_on_later(hub: Hub, folder: Path) -> None:
    hub.fetch_error = httpx.ReadError("connection reset")
    with pytest.raises(DataError, match="cannot be fetched") as caught:
        download(folder)
    assert "goes on where it stopped" in str(caught.value)
    assert list(folder.iterdir()) == []
    hub.fetch_error = None
    assert len(download(folder)) == 2


def test_without_network_the_hub_cache_is_used(hub: Hub, folder: Path) -> None:
    download(folder)
    other = folder.parent / "other"
    hub.probe_error = httpx.ConnectError("no route")
    assert [file.path.read_bytes() for file in download(other)] == list(CONTENT.values())
    assert hub.fetched[-1] == (DATASET_FILES[1], "main", True)


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("Name or service not known"),
        httpx.ConnectTimeout("timed out"),
        http_error(errors.HfHubHTTPError, 503),
    ],
)
def test_without_network_and_cache_the_manual_route_is_named(
    hub: Hub, folder: Path, error: Exception
) -> None:
    hub.probe_error = error
    with pytest.raises(DataError) as caught:
        download(folder)
    message = str(caught.value)
    assert "cannot be reached" in message
    assert "page of the dataset squeeze-ai-lab/TinyAgent-dataset" in message
    assert "download training_data.json and save it as" in message
    assert all(local_only for *_, local_only in hub.fetched)


def test_where_the_hub_may_not_be_asked_the_variable_is_named_and_not_the_network(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.probe_error = errors.OfflineModeIsEnabled("offline")
    with pytest.raises(DataError, match="unset HF_HUB_OFFLINE") as caught:
        download(folder)
    assert "network" not in str(caught.value)
    assert "download training_data.json and save it as" in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_given_up_quickly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise httpx.ConnectError("Connection refused")

    monkeypatch.setattr(httpx.Client, "send", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    started = time.monotonic()
    with pytest.raises(DataError, match="cannot be reached"):
        download(tmp_path / "data")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (http_error(errors.RepositoryNotFoundError, 404), "there is no such dataset"),
        (http_error(errors.GatedRepoError, 403), "it needs a login"),
        (http_error(errors.RevisionNotFoundError, 404), "has no revision main"),
        (http_error(errors.RemoteEntryNotFoundError, 404), "has no file training_data.json"),
        (http_error(errors.HfHubHTTPError, 429), "the hub refused the request"),
    ],
)
@pytest.mark.parametrize("stage", ["probe_error", "fetch_error"])
def test_a_refusal_is_named_with_the_manual_route(
    hub: Hub, folder: Path, stage: str, error: Exception, what: str
) -> None:
    setattr(hub, stage, error)
    with pytest.raises(DataError) as caught:
        download(folder)
    assert what in str(caught.value)
    assert "or by hand" in str(caught.value)


def test_a_full_disk_is_named(hub: Hub, folder: Path) -> None:
    hub.fetch_error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DataError, match="the disk is full"):
        download(folder)


def test_a_failed_chunked_transfer_is_named(hub: Hub, folder: Path) -> None:
    hub.fetch_error = RuntimeError("Data processing error: CAS")
    with pytest.raises(DataError, match="the transfer failed"):
        download(folder)


def test_a_damaged_transfer_is_not_placed(hub: Hub, folder: Path) -> None:
    (hub.cache / f"blob-{DATASET_FILES[0]}").write_bytes(b'{"damaged": 1}')
    (hub.cache / DATASET_FILES[0]).symlink_to(hub.cache / f"blob-{DATASET_FILES[0]}")
    with pytest.raises(DataError, match="the fetched file is damaged"):
        download(folder)
    assert not (folder / DATASET_FILES[0]).exists()


def test_a_folder_that_cannot_be_made_is_refused(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be made"):
        download(tmp_path / "file" / "data")


def test_a_name_that_is_no_repository_is_refused(hub: Hub, folder: Path) -> None:
    hub.probe_error = errors.HFValidationError("Repo id must be in the form")
    with pytest.raises(DataError, match="is no repository name"):
        download_dataset(folder, revision="main", repo="a/b/c")
