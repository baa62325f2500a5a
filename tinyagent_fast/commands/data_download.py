"""`data download`: fetch the published dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DownloadFlags:
    """Flags of `data download`."""

    out: Path = Path("data")
    """Folder for training_data.json and testing_data.json."""
    revision: str = "main"
    """Branch, tag or commit of the dataset's repository; a commit pins the data."""
    repo: str = "squeeze-ai-lab/TinyAgent-dataset"
    """Dataset repository on the hub."""


def run(arguments: Sequence[str]) -> int:
    """Fetch both files, unless they are there."""
    import tyro

    from tinyagent_fast.data.download import download_dataset

    flags = tyro.cli(DownloadFlags, args=list(arguments), prog="tinyagent-fast data download")
    print(f"downloading {flags.repo} at revision {flags.revision} to {flags.out}/")
    for file in download_dataset(flags.out, revision=flags.revision, repo=flags.repo):
        print(f"{file.path}: {file.size_bytes:,} bytes, sha256 {file.sha256} ({file.note})")
    return 0
