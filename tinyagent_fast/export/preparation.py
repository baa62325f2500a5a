"""What stands before an export's first file: data, tokenizer, flags, disk and memory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyagent_fast.config import Config
from tinyagent_fast.data.schema import Example
from tinyagent_fast.display import Display
from tinyagent_fast.errors import ConfigError, ModelError
from tinyagent_fast.export.checkpoints import VALUE_BYTES, Checkpoint, open_checkpoint
from tinyagent_fast.export.record import ExportRecord
from tinyagent_fast.export.settings import (
    BITS_PER_WEIGHT,
    FEWEST_BITS,
    ExportSettings,
    QuantSpec,
    quant_specs,
)
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.prompts.tokenizers import hub_folder, load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer
from tinyagent_fast.runs import Run
from tinyagent_fast.training.inputs import load_run_examples

MERGED = "merged"
_GIB = 2**30


def resolve_model_folder(base: str, revision: str | None = None) -> Path:
    """Find the folder with a base model's weights: local, in the hub's cache, or downloaded.

    Args:
        base: A local folder, or a model's name on the hub.
        revision: Revision on the hub.

    Returns:
        A local folder.

    Raises:
        ModelError: There is no such folder and the hub does not give the files.
    """
    patterns = ["*.safetensors", "*.json", "tokenizer.model", "chat_template.jinja"]
    # Training has put it into the cache, so an export needs no network.
    return hub_folder("base model", base, revision, patterns, cached_first=True)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Everything that the steps of an export share."""

    run: Run
    config: Config
    settings: ExportSettings
    base: Path
    """Local folder of the base model."""
    adapter: Path
    stem: str
    specs: Sequence[QuantSpec]
    tokenizer: PromptTokenizer
    validation: Sequence[Example]
    """Plans for the gates; training never saw them."""
    training: Sequence[Example]
    """Plans from which the importance matrix is measured."""
    tools: Mapping[str, Tool] | None
    record: ExportRecord
    display: Display

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return self.record.folder

    @property
    def merged(self) -> Path:
        """The merged Hugging Face folder."""
        return self.folder / MERGED

    def gguf_path(self, spec: QuantSpec) -> str:
        """Name a GGUF file, relative to the folder.

        Args:
            spec: What it is.
        """
        return f"gguf/{self.stem}-{spec.name}.gguf"


def prepare_export(
    run: Run,
    config: Config,
    settings: ExportSettings,
    base: Path,
    adapter: Path,
    tools: Mapping[str, Tool] | None,
    display: Display,
) -> Export:
    """Read what an export needs and refuse what cannot end well.

    Args:
        run: The run.
        config: Its config; eval.sample says how many validation plans there are for the gates.
        settings: The flags.
        base: Local folder of the base model.
        adapter: Folder of the adapter.
        tools: Tools that plans may call; none stands for TinyAgent's own.
        display: Where progress is shown.

    Returns:
        The export, with its folder made.

    Raises:
        UserError: Flags, files, disk or memory do not allow it.
    """
    specs = quant_specs(settings)
    folder = settings.out or run.path / "export"
    folder.mkdir(parents=True, exist_ok=True)
    with display.bar("reading data"):
        examples = load_run_examples(config)
    export = Export(
        run=run,
        config=config,
        settings=settings,
        base=base,
        adapter=adapter,
        stem=settings.name or run.path.name,
        specs=specs,
        tokenizer=PromptTokenizer(load_tokenizer(base), config.model.prompt_format),
        validation=examples.validation,
        training=_spread(examples.train, settings.importance_rows),
        tools=tools,
        record=ExportRecord(folder),
        display=display,
    )
    checkpoint = open_checkpoint(base)
    display.say(refuse_full_disk(folder, _needed_bytes(export, checkpoint)))
    if settings.gates == "on":
        if not examples.validation:
            raise ConfigError(
                "export with gates",
                "the run has no validation plans, so nothing can be compared",
                "train with --data.validation-entries above 0, or export with --gates off",
            )
        # They compare in fp32.
        display.say(refuse_small_memory(int(4.5 * _values(checkpoint)) + _GIB))
    return export


def refuse_full_disk(folder: Path, needed_bytes: Mapping[str, int]) -> str:
    """Compare what artefacts will take with what is free, before any work.

    Args:
        folder: Where they go.
        needed_bytes: Size by artefact; those that are there already count 0.

    Returns:
        One line that says needed and free.

    Raises:
        ModelError: The disk is too small.
    """
    free, needed = shutil.disk_usage(folder).free, sum(needed_bytes.values())
    listed = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in needed_bytes.items() if size)
    line = f"disk: {needed / _GIB:.2f} GiB needed ({listed or 'all there'}), {free / _GIB:.1f} free"
    if needed * 1.02 > free:
        raise ModelError(
            f"export into {folder}",
            f"the disk is too small; {line}",
            "free space, name another folder with --out, or leave files out with --quant",
        )
    return line


def refuse_small_memory(needed_bytes: int) -> str:
    """Compare what the gates need in memory with what is available, before any work.

    Args:
        needed_bytes: Their peak.

    Returns:
        One line that says needed and available.

    Raises:
        ModelError: Too little is available.
    """
    import psutil

    available = psutil.virtual_memory().available
    line = f"memory: {needed_bytes / _GIB:.2f} GiB for the gates, {available / _GIB:.1f} available"
    if needed_bytes > available:
        raise ModelError(
            "export",
            f"there is too little memory; {line}",
            "close other programs, or export with --gates off and compare on a larger machine",
        )
    return line


def _spread(examples: Sequence[Example], count: int) -> list[Example]:
    count = min(count, len(examples))
    return [examples[k * len(examples) // count] for k in range(count)]


def _values(checkpoint: Checkpoint) -> int:
    return sum(tensor.values for tensor in checkpoint.tensors.values())


def _needed_bytes(export: Export, checkpoint: Checkpoint) -> dict[str, int]:
    """Estimate the size of every artefact that is not there yet."""
    values, dtype = _values(checkpoint), export.settings.merged_dtype.upper()
    merged = sum(
        tensor.values * VALUE_BYTES[tensor.dtype if dtype == "BASE" else dtype]
        for tensor in checkpoint.tensors.values()
    )
    sizes = {MERGED: merged}
    for spec in export.specs:
        sizes[export.gguf_path(spec)] = int(
            values * BITS_PER_WEIGHT.get(spec.quant, FEWEST_BITS) / 8
        )
    needed = {
        path: 0 if (export.folder / path).exists() and not export.settings.fresh else size
        for path, size in sizes.items()
    }
    if export.specs and export.settings.gates == "on":
        needed["f32 to compare with (temporary)"] = 4 * values
        if not any(spec.quant == "f16" for spec in export.specs):
            needed["f16 to compare with (temporary)"] = 2 * values
    return needed
