"""A small encoder, fine-tuned to give each text a probability for each label, and kept as a folder.

Labels do not exclude each other. Weights are kept in 16 bits, and an encoder is always used as its
folder has it, so one that was just trained says what it will say in every later process.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyagent_fast.config import ENCODER, DataConfig
from tinyagent_fast.errors import ModelError, TrainingError, reading
from tinyagent_fast.models.libraries import quieten
from tinyagent_fast.prompts.loading import hub_folder
from tinyagent_fast.runs import sha256_of, whole_folder

if TYPE_CHECKING:
    import numpy as np

_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")
_WEIGHTS = "model.safetensors"
_BATCH = 32
_LIKE_LENGTH_BATCHES = 8
"""Batches over which texts are sorted, so that few places are padding."""
_MOST_TOKENS = 512
_FEW = 64
"""So many texts are scored on the CPU, where they take no memory of a planner's GPU."""


@dataclass(frozen=True, kw_only=True)
class EncoderTraining:
    """Which encoder is fine-tuned, and how."""

    encoder: str
    """Folder or hub name; its weights are safetensors."""
    epochs: int
    learning_rate: float
    """The highest one: it rises over a tenth of the steps, and falls to 0."""
    seed: int

    @classmethod
    def of(cls, data: DataConfig) -> EncoderTraining | None:
        """Take the settings of a run; None where no encoder scores the tools."""
        if data.retriever == "tfidf":
            return None
        return cls(
            encoder=data.retriever_encoder,
            epochs=data.retriever_epochs,
            learning_rate=data.retriever_learning_rate,
            seed=data.seed,
        )

    def steps(self, texts: int) -> int:
        """Count the steps that training on so many texts takes."""
        return self.epochs * math.ceil(texts / _BATCH)


@dataclass(frozen=True)
class Encoder:
    """A trained encoder in a folder, loaded when it is first asked."""

    folder: Path
    sha256: str
    """Of its weights."""

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Give [texts, labels]; a text longer than the encoder's context is read in pieces.

        Raises:
            ModelError: Its folder is damaged.
        """
        import numpy as np
        import torch

        tokenizer, model = self._loaded
        pieces, text_of = _pieces(tokenizer, model, texts)
        device = "cuda" if len(text_of) > _FEW and torch.cuda.is_available() else "cpu"
        order = sorted(range(len(text_of)), key=lambda at: len(pieces["input_ids"][at]))
        found = np.zeros((len(texts), model.config.num_labels))
        model.to(device)
        with torch.no_grad():
            for start in range(0, len(order), _BATCH):
                batch = order[start : start + _BATCH]
                logits = model(**_padded(tokenizer, pieces, batch).to(device)).logits
                shares = torch.sigmoid(logits.double()).cpu().numpy()
                np.maximum.at(found, [text_of[at] for at in batch], shares)
        if device == "cuda":
            model.to("cpu")
            torch.cuda.empty_cache()
        return found

    def save(self, folder: Path) -> list[Path]:
        """Copy its files into a folder, which gets its place when it is whole.

        Returns:
            The copies.
        """
        if folder.resolve() != self.folder.resolve():
            with whole_folder(folder) as part:
                shutil.copytree(self.folder, part, dirs_exist_ok=True)
        return sorted(folder.iterdir())

    @classmethod
    def in_folder(cls, folder: Path) -> Encoder:
        """Take the encoder that a folder holds."""
        return cls(folder, sha256_of(folder / _WEIGHTS))

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        fix = "delete it, with retriever.json where that lies beside it, and it is trained anew"
        with reading(f"encoder in {self.folder}", fix):
            if sha256_of(self.folder / _WEIGHTS) != self.sha256:
                raise ValueError(f"{_WEIGHTS} is not the one that was saved")
        return _load(self.folder, fix)


def encoder_folder(name: str) -> Path:
    """Find a base encoder's files, as `hub_folder` does."""
    return hub_folder("encoder", name, None, _FILES)


def train_encoder(
    base: Path,
    texts: Sequence[str],
    labels: np.ndarray,
    names: Sequence[str],
    settings: EncoderTraining,
    folder: Path,
    on_step: Callable[[], None],
) -> Encoder:
    """Fine-tune an encoder with one output a label, in bf16 on a GPU that has it, else in fp32.

    Args:
        base: Folder of the base encoder.
        texts: What to learn from.
        labels: [texts, labels], true or false.
        names: The labels' names, which its config.json keeps.
        settings: How; the seed decides the order of texts, the head's first weights and dropout.
        folder: Is made, and gets config.json, model.safetensors and the tokenizer's files.
        on_step: Called after each of about `settings.steps(len(texts))` steps.

    Returns:
        The encoder in the folder.

    Raises:
        ModelError: The base cannot be loaded.
        TrainingError: Its weights are no longer finite.
    """
    import torch
    from transformers import get_linear_schedule_with_warmup

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    half = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    with torch.random.fork_rng([torch.cuda.current_device()] if cuda else []):
        torch.manual_seed(settings.seed)
        fix = f"--data.retriever-encoder takes one with {_WEIGHTS}, such as {ENCODER}"
        tokenizer, model = _load(base, fix, names)
        pieces, text_of = _pieces(tokenizer, model, texts)
        targets = torch.tensor(labels, dtype=torch.float32)[text_of]
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
        steps = settings.steps(len(text_of))
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        for batch in _batches([len(ids) for ids in pieces["input_ids"]], settings.epochs):
            with torch.autocast(device, torch.bfloat16, enabled=half):
                logits = model(**_padded(tokenizer, pieces, batch).to(device)).logits
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits.float(), targets[batch].to(device)
            )
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            on_step()
    model.half()
    if not all(weights.isfinite().all() for weights in model.parameters()):
        raise TrainingError(
            f"encoder {base}",
            "after training, weights are NaN or infinite in 16 bits",
            f"lower --data.retriever-learning-rate, now {settings.learning_rate:g}",
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model, optimizer
    if cuda:
        torch.cuda.empty_cache()
    return Encoder.in_folder(folder)


def _load(folder: Path, fix: str, names: Sequence[str] | None = None) -> tuple[Any, Any]:
    """Load tokenizer and model, with a new head for labels of these names if there are any."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    quieten()
    disable_progress_bar()
    head: dict[str, Any] = {}
    if names is not None:
        head = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: at for at, name in enumerate(names)},
            "problem_type": "multi_label_classification",
            "ignore_mismatched_sizes": True,
        }
    with reading(f"encoder in {folder}", fix):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer.is_fast or tokenizer.pad_token is None:
            raise ValueError("its tokenizer has no fast form, or no padding token")
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **head,
        )
    # A head's tensors, and those of a pooler before it, may be new.
    body = f"{model.base_model_prefix}."
    missing = [k for k in found["missing_keys"] if k.startswith(body) and "pooler" not in k]
    if missing:
        raise ModelError(
            f"encoder in {folder}",
            f"its files lack {len(missing)} tensors of the model, the first {sorted(missing)[0]}",
            fix,
        )
    return tokenizer, model.eval()


def _pieces(
    tokenizer: Any, model: Any, texts: Sequence[str]
) -> tuple[Mapping[str, Sequence[Any]], list[int]]:
    """Encode texts, long ones as overlapping pieces; and give the text of each piece."""
    positions = getattr(model.config, "max_position_embeddings", _MOST_TOKENS)
    most = min(tokenizer.model_max_length, positions, _MOST_TOKENS)
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=most,
        stride=most // 4,
        return_overflowing_tokens=True,
    )
    text_of = list(encoded.pop("overflow_to_sample_mapping"))
    return encoded, text_of


def _padded(tokenizer: Any, pieces: Mapping[str, Sequence[Any]], batch: Sequence[int]) -> Any:
    chosen = {name: [values[at] for at in batch] for name, values in pieces.items()}
    return tokenizer.pad(chosen, return_tensors="pt")


def _batches(lengths: Sequence[int], epochs: int) -> Iterator[list[int]]:
    """Shuffle anew for each epoch, with texts of like length in a batch."""
    import torch

    for _ in range(epochs):
        batches: list[list[int]] = []
        for chunk in torch.split(torch.randperm(len(lengths)), _BATCH * _LIKE_LENGTH_BATCHES):
            alike = sorted(chunk.tolist(), key=lengths.__getitem__)
            batches += [alike[at : at + _BATCH] for at in range(0, len(alike), _BATCH)]
        for at in torch.randperm(len(batches)).tolist():
            yield batches[at]
