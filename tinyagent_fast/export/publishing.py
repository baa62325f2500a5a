"""Send an export to the Hugging Face hub, or say what would be sent.

Only proved exports go out: one whose gates failed or were not run is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tinyagent_fast.errors import GateError, ModelError
from tinyagent_fast.export.companions import CARD

_COMPANIONS = ("Modelfile", "llama-server.sh", "plan.gbnf", "export.json", "report.md")


def _files_to_publish(folder: Path, content: Mapping[str, Any]) -> dict[str, Path]:
    """List what goes out, by place: card, merged folder at the top, GGUF files, companions.

    The app's Configuration.json stays, because it holds a path of this machine.
    """
    places = {"README.md": folder / CARD, "SERVING.md": folder / "README.md"}
    places |= {name: folder / name for name in _COMPANIONS}
    for artefact in content["artefacts"]:
        path = folder / artefact["path"]
        if artefact["kind"] == "merged":
            places |= {p.name: p for p in sorted(path.iterdir()) if p.is_file()}
        else:
            places[artefact["path"]] = path
    return {place: path for place, path in places.items() if path.exists()}


def publish(
    folder: Path,
    content: Mapping[str, Any],
    repository: str,
    *,
    dry_run: bool,
    say: Callable[[str], None],
) -> None:
    """Create a private repository, `owner/name`, and put the export there in one commit.

    A dry run says what would go, and sends nothing; it needs no token. `content` is what
    export.json holds.

    Raises:
        GateError: The export is not proved.
        ModelError: The hub refuses, for lack of a token or of rights.
    """
    files = _files_to_publish(folder, content)
    sizes = {place: path.stat().st_size for place, path in files.items()}
    for place, size in sizes.items():
        say(f"  {size / 2**20:10,.1f} MiB  {place}")
    total = sum(sizes.values()) / 2**30
    line = f"{len(files)} files, {total:.2f} GiB for {repository} (private)"
    if dry_run:
        say(f"dry run: {line}; nothing was sent")
        return
    if content["passed"] is not True:
        raise GateError(f"{folder} is not proved (passed: {content['passed']}); nothing was sent")
    say(f"sending {line}")
    say(f"published: {_send(files, repository)}")


def _send(files: Mapping[str, Path], repository: str) -> str:
    from httpx import HTTPError
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi()
    try:
        url = str(api.create_repo(repository, private=True, exist_ok=True))
        api.create_commit(
            repository,
            [CommitOperationAdd(place, str(path)) for place, path in files.items()],
            commit_message="Export by tinyagent_fast",
        )
    except (HTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"repository {repository}",
            f"the hub refused: {error}",
            "log in with `hf auth login` or set HF_TOKEN to a token that may write; or --dry-run",
        ) from error
    return url
