"""The data of a config: whether the files are there and whole.

The quick part looks at both ends of a file. The thorough part hashes it, compares that with the
record of the download, and checks the first entries; `data check` reads all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from itertools import islice
from pathlib import Path

from tinyagent_fast.config import Config
from tinyagent_fast.data.cache import SCHEMA_VERSION, cache_folder
from tinyagent_fast.data.reading import entry_from_json
from tinyagent_fast.data.schema import Entry
from tinyagent_fast.doctor.findings import Finding, failure, ok, warning
from tinyagent_fast.doctor.resources import PUBLISHED_BYTES, dataset_in_hub_cache, hub_cache
from tinyagent_fast.errors import DataError
from tinyagent_fast.presets import REAL_TRAIN

_FIRST_ENTRIES = 20
_END_BYTES = 64
_TRUE = ("1", "ON", "YES", "TRUE")
_DOWNLOAD = "tinyagent-fast data download"


def offline() -> bool:
    """Say whether the hub's library has been told to stay off the network.

    Returns:
        Whether HF_HUB_OFFLINE or, without it, TRANSFORMERS_OFFLINE is set.
    """
    told = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return told.upper() in _TRUE


def check_data(config: Config, *, thorough: bool) -> list[Finding]:
    """Look at the data files of a config.

    Args:
        config: The run's config.
        thorough: Whether to hash the files and check their first entries.

    Returns:
        One finding a file; a missing or damaged one is a failure.
    """
    data = config.data
    found = []
    if data.catalogue is not None:
        found.append(_catalogue(data.catalogue))
    if data.train is None:
        text = f"{data.generated_entries:,} entries are generated on the spot"
        return [*found, ok("data", text)]
    if data.train == REAL_TRAIN and not REAL_TRAIN.exists():
        return [*found, _to_download()]
    files = [path for path in (data.train, data.test) if path is not None]
    return [*found, *(_file(path, config, thorough=thorough) for path in files)]


def _catalogue(path: Path) -> Finding:
    from tinyagent_fast.data.generation.catalogue import load_catalogue

    try:
        tools = len(load_catalogue(path).tools)
    except DataError as error:
        return failure("catalogue", f"{error.what}: {error.why}", error.fix)
    return ok("catalogue", f"{path}: {tools} tools")


def _to_download() -> Finding:
    size = sum(PUBLISHED_BYTES.values()) / 1e6
    text = f"{REAL_TRAIN} is not there: training downloads the published files ({size:.0f} MB)"
    if dataset_in_hub_cache(hub_cache(os.environ)):
        return ok("data", f"{REAL_TRAIN} is not there: training takes it from the hub's cache")
    if offline():
        return failure(
            "data",
            f"{REAL_TRAIN} is not there, and HF_HUB_OFFLINE forbids to download it",
            f"unset HF_HUB_OFFLINE and run {_DOWNLOAD}, or copy the files as data/README.md says",
        )
    return ok("data", text)


def _file(path: Path, config: Config, *, thorough: bool) -> Finding:
    published = path in PUBLISHED_BYTES
    fix = _DOWNLOAD if published else f"tinyagent-fast data check {path} says more"
    problem = damage(path)
    if problem is not None:
        absent = _DOWNLOAD if published else "name another with --data.train and --data.test"
        return failure("data", f"{path} {problem}", absent if not path.is_file() else fix)
    text = f"{path}: {path.stat().st_size / 1e6:,.1f} MB"
    if not thorough:
        return ok("data", text)
    problem = first_problem(path)
    if problem is not None and config.data.on_bad_entry == "error":
        return failure("data", f"{text}; {problem}", f"tinyagent-fast data check {path}")
    if problem is not None:
        return warning("data", f"{text}; {problem}", f"tinyagent-fast data check {path}")
    sha256 = _sha256(path)
    recorded = _recorded_sha256(path)
    if recorded is not None and recorded != sha256:
        text += f"; sha256 {sha256[:12]} is not that of the download ({recorded[:12]})"
        return warning("data", text, f"move it away, then {_DOWNLOAD}")
    text += f", sha256 {sha256[:12]}" + (" as downloaded" if recorded else "")
    entries = _cached_entries(sha256, config.data.on_bad_entry)
    text += f", {entries:,} entries" if entries is not None else ", first entries good"
    return ok("data", text)


def damage(path: Path) -> str | None:
    """Look at both ends of a data file.

    Args:
        path: The file.

    Returns:
        What is wrong, to stand behind the file's name; none where it looks whole.
    """
    if not path.exists():
        return "is not there"
    if not path.is_file():
        return "is no file"
    try:
        with path.open("rb") as stream:
            head = stream.read(_END_BYTES).lstrip()
            stream.seek(max(0, path.stat().st_size - _END_BYTES))
            tail = stream.read().rstrip()
    except OSError as error:
        return f"cannot be read: {error}"
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the data"
    if not head.startswith(b"{"):
        return "is no JSON object"
    return None if tail.endswith(b"}") else "is cut off: its JSON object is not closed"


def first_problem(path: Path) -> str | None:
    """Check the first entries of a data file against the schema.

    Args:
        path: A file that looks whole.

    Returns:
        What is wrong with the first bad one; none where all are good.
    """
    import ijson

    with path.open("rb") as stream:
        try:
            for key, value in islice(ijson.kvitems(stream, "", use_float=True), _FIRST_ENTRIES):
                entry = entry_from_json(key, value)
                if not isinstance(entry, Entry):
                    return f"entry {key}: {entry[0].field or 'entry'} {entry[0].reason}"
        except (ijson.JSONError, UnicodeDecodeError) as error:
            return f"it is no valid JSON: {str(error).splitlines()[0]}"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _recorded_sha256(path: Path) -> str | None:
    """Give what `data download` has written down about the file."""
    record = path.with_name(f".{path.name}.source.json")
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cached_entries(sha256: str, on_bad_entry: str) -> int | None:
    """Give the count of entries from an earlier reading of the same file."""
    about = cache_folder() / f"{sha256}-v{SCHEMA_VERSION}-{on_bad_entry}.json"
    try:
        return int(json.loads(about.read_text(encoding="utf-8"))["report"]["entries"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
