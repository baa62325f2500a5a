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
    from rich.console import Console

    from tinyagent_fast.data.download import download_dataset
    from tinyagent_fast.display import Display

    flags = tyro.cli(DownloadFlags, args=list(arguments), prog="tinyagent-fast data download")
    print(f"downloading {flags.repo} at revision {flags.revision} to {flags.out}/")
    with Display(Console(stderr=True)).working("data download", "bytes of this file") as update:
        files = download_dataset(
            flags.out, revision=flags.revision, repo=flags.repo, on_progress=update
        )
    for file in files:
        print(f"{file.path}: {file.size_bytes:,} bytes, sha256 {file.sha256} ({file.note})")
    return 0
