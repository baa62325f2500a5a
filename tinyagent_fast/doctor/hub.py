"""Whether the hub gives the base model and the published data; asked only with `--online`."""

from __future__ import annotations

from tinyagent_fast.config import Config
from tinyagent_fast.data.download import DATASET_FILES, DATASET_REPOSITORY
from tinyagent_fast.doctor.findings import Finding, failure, ok
from tinyagent_fast.presets import REAL_TRAIN

_TIMEOUT_S = 8.0
_FIX = "check the network, a proxy, or HF_ENDPOINT; log in with `hf auth login` if it asks for that"


def check_hub(config: Config, *, base_is_here: bool) -> list[Finding]:
    """Ask the hub for what a run would download.

    Args:
        config: The run's config.
        base_is_here: Whether the base model needs no download.

    Returns:
        One finding a question; without anything to download, the hub is asked for the dataset.
    """
    found = []
    if not base_is_here:
        found.append(_ask(config.model.base, "config.json", None, config.model.revision))
    if base_is_here or (config.data.train == REAL_TRAIN and not REAL_TRAIN.exists()):
        found.append(_ask(DATASET_REPOSITORY, DATASET_FILES[0], "dataset", None))
    return found


def _ask(repo: str, name: str, kind: str | None, revision: str | None) -> Finding:
    """Ask for one file's size."""
    try:
        import httpx
        from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url
    except ImportError as error:
        return failure("hub", f"it cannot be asked: {error}", "make setup")
    try:
        url = hf_hub_url(repo, name, repo_type=kind, revision=revision)
        get_hf_file_metadata(url, timeout=_TIMEOUT_S)
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, httpx.HTTPError) as error:
        return failure("hub", f"{repo} cannot be fetched: {_first_line(error)}", _FIX)
    except (OSError, ValueError) as error:
        return failure("hub", f"{repo} cannot be fetched: {_first_line(error)}", _FIX)
    return ok("hub", f"{repo} can be fetched")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
