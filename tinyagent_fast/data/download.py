"""Fetches the published dataset into a folder, each file placed only when it is complete.

`huggingface_hub` fetches into its own cache, where a broken transfer is resumed. Ours is what it
does not do: it overwrites a user's own file in the target folder, compares no sha256, and tries
for minutes when there is no network.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinyagent_fast.data.reading import check_head, is_incomplete
from tinyagent_fast.errors import DataError, plainly
from tinyagent_fast.runs import sha256_of

DATASET_REPOSITORY = "squeeze-ai-lab/TinyAgent-dataset"
DATASET_FILES = ("training_data.json", "testing_data.json")
_FIRST_ANSWER_S = 8.0


@dataclass(frozen=True, slots=True)
class DownloadedFile:
    """One file in its place; `note` says how it came there."""

    path: Path
    size_bytes: int
    sha256: str
    note: str


@dataclass(frozen=True, slots=True)
class _Source:
    """A file of a dataset repository, and where it goes."""

    repo: str
    revision: str
    target: Path

    @property
    def record_path(self) -> Path:
        """Where it is written down what was fetched, beside the target."""
        return self.target.with_name(f".{self.target.name}.source.json")

    @property
    def by_hand(self) -> str:
        """Say how the file is had without this program."""
        return (
            f"or by hand: on the Hugging Face page of the dataset {self.repo}, under 'Files and "
            f"versions', download {self.target.name} and save it as {self.target}"
        )

    def record(self) -> dict[str, str]:
        """Read what is known of the file that is there; empty if nothing is."""
        try:
            found = json.loads(self.record_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_record(self, sha256: str) -> None:
        """Write down where the file comes from, and its hash."""
        record = {"repo": self.repo, "revision": self.revision, "sha256": sha256}
        self.record_path.write_text(json.dumps(record), encoding="utf-8")

    def found(self, sha256: str, note: str) -> DownloadedFile:
        """Describe the file that is there."""
        return DownloadedFile(self.target, self.target.stat().st_size, sha256, note)


def download_dataset(
    target_dir: str | Path,
    *,
    revision: str,
    repo: str = DATASET_REPOSITORY,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> list[DownloadedFile]:
    """Place training_data.json and testing_data.json in a folder.

    A file that is there already and complete is kept. A broken transfer goes on where it
    stopped when the command is given again.

    Args:
        target_dir: The folder; made if it is not there.
        revision: Branch, tag or commit of the repository.
        repo: Dataset repository on the hub.
        on_progress: Called with bytes of the file under way that are there, and in all.

    Raises:
        DataError: A file cannot be fetched or placed, or another file is in its place; the
            message names the manual route.
    """
    folder = Path(target_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be made", plainly(error), "name a folder that you can write"
        ) from error
    return [_place(_Source(repo, revision, folder / name), on_progress) for name in DATASET_FILES]


def _place(source: _Source, on_progress: Callable[[int, int], None]) -> DownloadedFile:
    target, revision, record = source.target, source.revision, source.record()
    there = sha256_of(target) if target.is_file() else None
    ours = there is not None and there == record.get("sha256")
    if ours and (record.get("repo"), record.get("revision")) == (source.repo, revision):
        return source.found(str(there), f"already there, fetched at {revision}")
    try:
        reachable, published = _published_sha256(source)
        if there is not None and not is_incomplete(target):
            if there == published:
                source.write_record(there)
                return source.found(there, f"already there, same as {revision}")
            if published is None:
                check_head(target)
                note = f"already there; the hub did not say whether it is that of {revision}"
                return source.found(there, note)
            if not ours:
                raise DataError(
                    f"{target}: another file is in place",
                    f"its sha256 is {there}, not that of revision {revision}, so it may be "
                    "your own",
                    "move it away or delete it, or name another folder",
                )
        fetched = _fetch(source, on_progress, offline=not reachable)
        sha256 = sha256_of(fetched)
        if published not in (None, sha256):
            raise DataError(
                f"{target.name}: the fetched file is damaged",
                f"its sha256 is {sha256}, the repository says {published}",
                f"remove it from the hub cache and fetch it again; {source.by_hand}",
            )
        _copy_into_place(fetched, target)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DataError(
            f"{target.name}: cannot be placed in {target.parent}",
            "the disk is full" if full else plainly(error),
            "free at least 2 GiB in this folder and in the hub cache (HF_HOME), then try again"
            if full
            else "check the rights of this folder and of the hub cache (HF_HOME)",
        ) from error
    source.write_record(sha256)
    return source.found(sha256, f"fetched at {revision}")


def _published_sha256(source: _Source) -> tuple[bool, str | None]:
    """Ask the hub in one short request whether it can be reached, and for the file's sha256."""
    import httpx
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        url = hf_hub_url(
            source.repo, source.target.name, repo_type="dataset", revision=source.revision
        )
        etag = get_hf_file_metadata(url, timeout=_FIRST_ANSWER_S).etag
    except errors.HfHubHTTPError as error:
        if error.response.status_code >= 500:
            return False, None
        raise _explained(error, source) from error
    except (errors.OfflineModeIsEnabled, httpx.HTTPError, OSError):
        return False, None
    except ValueError as error:
        raise DataError(
            f"{source.repo}: is no repository name", str(error), "give owner/name"
        ) from error
    return True, etag if etag and len(etag) == 64 else None


def _fetch(source: _Source, on_progress: Callable[[int, int], None], *, offline: bool) -> Path:
    """Return the file's place in the hub cache, fetching what is missing there."""
    import httpx
    from huggingface_hub import errors, hf_hub_download
    from huggingface_hub.utils import tqdm

    class Told(tqdm):  # type: ignore[misc]
        def update(self, n: float = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if self.disable:  # no terminal: it does not count
                self.n += n
            on_progress(int(self.n), int(self.total or 0))
            return shown

    try:
        found = hf_hub_download(
            source.repo,
            source.target.name,
            repo_type="dataset",
            revision=source.revision,
            local_files_only=offline,
            tqdm_class=Told,
        )
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        httpx.HTTPError,
        RuntimeError,  # The chunked transfer of the hub client reports so.
    ) as error:
        raise _explained(error, source) from error
    return Path(found).resolve()


def _explained(error: Exception, source: _Source) -> DataError:
    """Turn an error of the hub client into one with a fix and the manual route."""
    from huggingface_hub import constants, errors

    repo, revision, name = source.repo, source.revision, source.target.name
    refused = isinstance(error, errors.HfHubHTTPError)
    if isinstance(error, errors.RevisionNotFoundError):
        what, why = f"{repo}: has no revision {revision}", "the hub knows no such branch or commit"
        fix = "set the revision to main or to a commit of the repository"
    elif refused and isinstance(error, errors.EntryNotFoundError):
        what = f"{repo}: has no file {name} at revision {revision}"
        why, fix = "the file was moved, or this is another dataset", "set another revision"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = f"{repo}: there is no such dataset, or it needs a login"
        why = "the hub answers that it is not there for you"
        fix = "check the name, or log in with `hf auth login`"
    elif refused:
        what, why = f"{name}: the hub refused the request", str(error).split("\n")[0]
        fix = "try again later"
    elif isinstance(error, RuntimeError):
        what, why = f"{name}: the transfer failed", str(error).split("\n")[0]
        fix = "check the free disk space and try again; it goes on where it stopped"
    elif constants.is_offline_mode():
        what = f"{name}: cannot be fetched"
        why = "HF_HUB_OFFLINE is set, so the hub is not asked, and its cache does not have the file"
        fix = "unset HF_HUB_OFFLINE and try again"
    else:
        what = f"{name}: cannot be fetched"
        why = "the Hugging Face hub cannot be reached, and the hub cache does not have the file"
        fix = "check the network and try again; a broken transfer goes on where it stopped"
    return DataError(what, why, f"{fix}; {source.by_hand}")


def _copy_into_place(fetched: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(fetched, temporary)
        except OSError:
            shutil.copyfile(fetched, temporary)  # The hub cache is on another file system.
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
