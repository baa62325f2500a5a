"""Fetches the published dataset into a folder, each file placed only when it is complete.

Stands before the data flow: what it places is read by `reading`. The one module of this folder
that uses the network; huggingface_hub is imported on first use.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tinyagent_fast.errors import DataError

DATASET_REPOSITORY = "squeeze-ai-lab/TinyAgent-dataset"
DATASET_FILES = ("training_data.json", "testing_data.json")
# The hub client retries for up to minutes once it has begun, so one short request goes first.
_PROBE_TIMEOUT_S = 8.0


@dataclass(frozen=True, slots=True)
class DownloadedFile:
    """One file in its place; `note` says how it came there."""

    path: Path
    size_bytes: int
    sha256: str
    note: str


@dataclass(frozen=True, slots=True)
class _Remote:
    """What the hub says about a file; None where it does not say."""

    size_bytes: int | None
    sha256: str | None


def download_dataset(
    target_dir: str | Path, *, revision: str, repo: str = DATASET_REPOSITORY
) -> list[DownloadedFile]:
    """Place training_data.json and testing_data.json in a folder.

    A file that is there already and complete is kept. A broken transfer goes on where it
    stopped when the command is given again.

    Args:
        target_dir: The folder; made if needed.
        revision: The branch, tag or commit of the dataset repository.
        repo: Another dataset repository with files of the same names.

    Returns:
        One record per file with its size and sha256.

    Raises:
        DataError: A file cannot be fetched or placed, or another file is in its place; the
            message names the manual route.
    """
    folder = Path(target_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be made", str(error), "name a folder that you can write"
        ) from error
    return [_place(name, folder, revision, repo) for name in DATASET_FILES]


def _place(name: str, folder: Path, revision: str, repo: str) -> DownloadedFile:
    target = folder / name
    kept = _kept_by_record(target, revision, repo)
    if kept is not None:
        return kept
    try:
        remote = _probe(name, revision, repo)
        if target.exists():
            kept = _kept_by_comparison(target, remote, revision, repo)
            if kept is not None:
                return kept
        cached = _fetch(name, revision, repo, offline=remote is None)
        digest = _sha256(cached)
        if remote is not None and remote.sha256 not in (None, digest):
            raise DataError(
                f"{name}: the fetched file is damaged",
                f"its sha256 is {digest}, the repository says {remote.sha256}",
                "remove it from the hub cache and fetch it again" + _manual(name, target, repo),
            )
        _copy_into_place(cached, target)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DataError(
            f"{name}: cannot be placed in {folder}",
            "the disk is full" if full else str(error),
            "free at least 2 GB in this folder and in the hub cache (HF_HOME), then try again"
            if full
            else "check the rights of this folder and of the hub cache (HF_HOME)",
        ) from error
    _write_record(target, repo, revision, digest)
    return DownloadedFile(target, target.stat().st_size, digest, f"fetched at {revision}")


def _manual(name: str, target: Path, repo: str) -> str:
    return (
        f"; or by hand: on the Hugging Face page of the dataset {repo}, under 'Files and "
        f"versions', download {name} and save it as {target}"
    )


def _probe(name: str, revision: str, repo: str) -> _Remote | None:
    """Ask the hub about a file in one short request; None if the hub cannot be reached."""
    import httpx
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        url = hf_hub_url(repo, name, repo_type="dataset", revision=revision)
        found = get_hf_file_metadata(url, timeout=_PROBE_TIMEOUT_S)
    except errors.HfHubHTTPError as error:
        if error.response.status_code >= 500:
            return None
        raise _refusal(error, name, revision, repo) from error
    except (errors.OfflineModeIsEnabled, httpx.HTTPError, OSError):
        return None
    except ValueError as error:
        raise DataError(f"{repo}: is no repository name", str(error), "give owner/name") from error
    sha256 = found.etag if found.etag and len(found.etag) == 64 else None
    return _Remote(found.size, sha256)


def _refusal(error: Exception, name: str, revision: str, repo: str) -> DataError:
    from huggingface_hub import errors

    by_hand = _manual(name, Path("data") / name, repo)
    if isinstance(error, errors.RevisionNotFoundError):
        return DataError(
            f"{repo}: has no revision {revision}",
            "the hub knows no such branch, tag or commit",
            "set the revision to main or to a commit of the repository" + by_hand,
        )
    if isinstance(error, errors.EntryNotFoundError):
        return DataError(
            f"{repo}: has no file {name} at revision {revision}",
            "the file was moved, or this is another dataset",
            "set another revision" + by_hand,
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return DataError(
            f"{repo}: there is no such dataset, or it needs a login",
            "the hub answers that it is not there for you",
            "check the name, or log in with `hf auth login`" + by_hand,
        )
    return DataError(
        f"{name}: the hub refused the request",
        str(error).split("\n")[0],
        "try again later" + by_hand,
    )


def _fetch(name: str, revision: str, repo: str, *, offline: bool) -> Path:
    """Return the file's place in the hub cache, fetching what is missing there."""
    import httpx
    from huggingface_hub import errors, hf_hub_download

    try:
        found = hf_hub_download(
            repo, name, repo_type="dataset", revision=revision, local_files_only=offline
        )
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(name, repo) from error
    except errors.HfHubHTTPError as error:
        raise _refusal(error, name, revision, repo) from error
    except (errors.OfflineModeIsEnabled, httpx.HTTPError) as error:
        raise _unreachable(name, repo) from error
    except RuntimeError as error:  # The chunked transfer of the hub client reports so.
        raise DataError(
            f"{name}: the transfer failed",
            str(error).split("\n")[0],
            "check the free disk space and try again; it goes on where it stopped"
            + _manual(name, Path("data") / name, repo),
        ) from error
    return Path(found).resolve()


def _unreachable(name: str, repo: str) -> DataError:
    return DataError(
        f"{name}: cannot be fetched",
        "the Hugging Face hub cannot be reached, and the hub cache does not have the file",
        "check the network and try again; a broken transfer goes on where it stopped"
        + _manual(name, Path("data") / name, repo),
    )


def _copy_into_place(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)  # The hub cache is on another file system.
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _record_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.source.json")


def _write_record(target: Path, repo: str, revision: str, sha256: str) -> None:
    record = {"repo": repo, "revision": revision, "sha256": sha256}
    _record_path(target).write_text(json.dumps(record), encoding="utf-8")


def _kept_by_record(target: Path, revision: str, repo: str) -> DownloadedFile | None:
    """Return the file in place if an earlier download of this revision left it there."""
    try:
        record = json.loads(_record_path(target).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not target.is_file() or record.get("repo") != repo or record.get("revision") != revision:
        return None
    digest = _sha256(target)
    if digest != record.get("sha256"):
        return None
    size_bytes = target.stat().st_size
    return DownloadedFile(target, size_bytes, digest, f"already there, fetched at {revision}")


def _kept_by_comparison(
    target: Path, remote: _Remote | None, revision: str, repo: str
) -> DownloadedFile | None:
    """Decide about a file in place that no download of this revision left there.

    Kept if the hub names its sha256, or if the hub cannot say and the file looks complete.
    Replaced (None) if an earlier download left it unchanged, or if it is a mere beginning or a
    git-lfs pointer. Anything else is the user's own and is not overwritten.
    """
    size_bytes, digest = target.stat().st_size, _sha256(target)
    if remote is not None and remote.sha256 == digest:
        _write_record(target, repo, revision, digest)
        return DownloadedFile(target, size_bytes, digest, f"already there, same as {revision}")
    with target.open("rb") as file:
        head = file.read(64).lstrip()
        file.seek(max(0, size_bytes - 64))
        closed = file.read().rstrip().endswith(b"}")
    if head.startswith(b"{") and closed and (remote is None or remote.sha256 is None):
        note = f"already there; the hub did not say whether it is that of {revision}"
        return DownloadedFile(target, size_bytes, digest, note)
    try:
        ours = json.loads(_record_path(target).read_text(encoding="utf-8")).get("sha256") == digest
    except (OSError, ValueError):
        ours = False
    cut_off = head.startswith(b"{") and not closed
    if ours or cut_off or not head or head.startswith(b"version https://git-lfs"):
        return None
    raise DataError(
        f"{target}: another file is in place",
        f"its sha256 is {digest}, not that of revision {revision}, so it may be your own",
        "move it away or delete it, or name another folder",
    )


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1024 * 1024):
            sha256.update(chunk)
    return sha256.hexdigest()
