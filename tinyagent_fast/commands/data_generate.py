"""`data generate`: write a generated dataset in the published schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tinyagent_fast.data.generation.catalogue import BUILT_IN_CATALOGUE
from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset
from tinyagent_fast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerateFlags:
    """Flags of `data generate`."""

    out: Path = Path("data/generated")
    """Folder for training_data.json and testing_data.json."""
    overwrite: bool = False
    """Replace files that are in that folder."""


def run(arguments: Sequence[str]) -> int:
    """Write both files; the published dataset has the same names, so none is replaced unasked."""
    import tyro

    both = tuple[
        Annotated[GenerationSpec, tyro.conf.arg(name="")],
        Annotated[GenerateFlags, tyro.conf.arg(name="")],
    ]
    try:
        spec, flags = tyro.cli(both, args=list(arguments), prog="tinyagent-fast data generate")
    except ValueError as error:
        raise ConfigError("data generate", str(error), "change the flag") from error
    there = [n for n in ("training_data.json", "testing_data.json") if (flags.out / n).exists()]
    if there and not flags.overwrite:
        raise ConfigError(
            f"data generate --out {flags.out}",
            f"{' and '.join(there)} would be replaced",
            "name another folder with --out, or add --overwrite",
        )
    from rich.console import Console

    from tinyagent_fast.display import Display, size_text

    with Display(Console(stderr=True)).working("generating entries") as update:
        files = generate_dataset(spec, flags.out, update)
    for path, entries in ((files.train, spec.train_entries), (files.test, spec.test_entries)):
        print(f"{path}: {entries} entries, {size_text(path.stat().st_size)}")
    names = [f"--data.train {files.train}"]
    if spec.test_entries:
        names.append(f"--data.test {files.test}")
    if spec.catalogue != BUILT_IN_CATALOGUE:
        names.append(f"--data.catalogue {spec.catalogue}")
    print(f"train on them: make train ARGS='{' '.join(names)}'")
    return 0
