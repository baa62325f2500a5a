"""`data retrieval`: how well are the tools found that the plans of a file call?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tinyagent_fast.config import Config, DataConfig, RetrieverKind, check_config

_DEFAULT = DataConfig()


@dataclass(frozen=True, kw_only=True)
class RetrievalFlags:
    """Flags of `data retrieval`."""

    file: Annotated[Path, tyro.conf.Positional]
    """Training file in the published schema."""
    test: Path | None = None
    """Data file whose plans are measured too; its queries are not trained on."""
    recall: float = _DEFAULT.retrieval_recall
    """Share of queries for which all tools should be found; higher lists more tools."""
    retriever: RetrieverKind = _DEFAULT.retriever
    """What scores the tools: linear classifiers over TF-IDF, or a fine-tuned encoder."""
    retriever_encoder: str = _DEFAULT.retriever_encoder
    """Folder or hub name of the encoder; its weights must be safetensors."""
    retriever_epochs: int = _DEFAULT.retriever_epochs
    """Passes of the encoder over the queries."""
    retriever_learning_rate: float = _DEFAULT.retriever_learning_rate
    """Peak learning rate of the encoder; larger encoders need a lower one."""
    seed: int = _DEFAULT.seed
    """Seed of the encoder."""
    catalogue: Path | None = None
    """YAML file with tools of your own; None takes TinyAgent's 16."""
    out: Path | None = None
    """Folder for the trained retriever, such as that of a model; None writes nothing."""


def run(arguments: Sequence[str]) -> int:
    """Train a retriever and measure it; gives 0 when that is done."""
    flags = tyro.cli(RetrievalFlags, args=list(arguments), prog="tinyagent-fast data retrieval")
    from rich.console import Console

    from tinyagent_fast.data.cache import load_examples
    from tinyagent_fast.data.generation.catalogue import plan_tools
    from tinyagent_fast.data.splits import without_leaks
    from tinyagent_fast.display import Display, size_text
    from tinyagent_fast.errors import ConfigError
    from tinyagent_fast.models.encoder import EncoderTraining
    from tinyagent_fast.plans.tools import TINYAGENT
    from tinyagent_fast.prompts.retrieval import train_retriever

    if not 0 < flags.recall < 1:
        raise ConfigError(f"--recall {flags.recall:g}", "it is a share in (0, 1)", "such as 0.98")
    data = DataConfig(
        retriever=flags.retriever,
        retriever_encoder=flags.retriever_encoder,
        retriever_epochs=flags.retriever_epochs,
        retriever_learning_rate=flags.retriever_learning_rate,
        seed=flags.seed,
    )
    check_config(Config(data=data))
    train = load_examples(flags.file, on_bad_entry="error")
    test = load_examples(flags.test, on_bad_entry="error") if flags.test else None
    held_out = test.column("query") if test else []
    queries = train.column("query")
    rows = without_leaks(range(len(queries)), queries, held_out, "drop")
    known = plan_tools(flags.catalogue) or TINYAGENT
    display = Display(Console(stderr=True))
    with display.working("training the tool retriever", "steps") as update:
        retriever, _ = train_retriever(
            train.select(rows),
            recall=flags.recall,
            known=known,
            encoder=EncoderTraining.of(data),
            on_progress=update,
        )
    print(f"{flags.file}, cross-validation: {retriever.figures.sentence()}")
    if test is not None:
        with display.working("retrieving tools"):
            print(f"{flags.test}: {retriever.rewrite(test).figures().sentence()}")
    if flags.out is not None:
        flags.out.mkdir(parents=True, exist_ok=True)
        for path in retriever.save(flags.out):
            print(f"written: {path} ({size_text(path.stat().st_size)})")
    return 0
