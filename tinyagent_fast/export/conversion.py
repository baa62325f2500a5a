"""A merged model folder to a GGUF file that llama.cpp reads, in blocks of rows, quantised or not.

Nothing is converted that the family's row does not describe: another architecture, a bias, another
RoPE scaling or a tensor too many is refused, because llama.cpp would run such a file and answer
wrongly. A quantised file is checked against the folder before it gets its name.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFValueType,
    GGUFWriter,
    RopeScalingType,
    quants,
)
from numpy.typing import NDArray

from tinyagent_fast.errors import GateError, ModelError, UserError
from tinyagent_fast.export.checkpoints import (
    VALUE_BYTES,
    Checkpoint,
    Floats,
    StoredTensor,
    base_folder,
    encode_values,
    open_checkpoint,
    read_rows,
    row_blocks,
)
from tinyagent_fast.export.importance import SOURCE, Importance
from tinyagent_fast.export.quantising import (
    WEIGHTED,
    WORST_RELATIVE_RMSE,
    GgmlLibrary,
    file_type,
    open_ggml,
    stored_bytes,
    tensor_type,
)
from tinyagent_fast.export.vocabulary import GgufVocabulary, read_vocabulary
from tinyagent_fast.models.families import OUTPUT, Family, ModelShape, Tensor, family_of
from tinyagent_fast.models.threads import usable_cores
from tinyagent_fast.prompts.tokens import PromptTokenizer
from tinyagent_fast.runs import whole_file

_CHECKED_EVERY_ROWS = 256
_WINDOWED_BASE = 10000.0


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What was written, and what a reader of the file should know."""

    path: Path
    types: Mapping[str, int]
    """Tensors by ggml type."""
    parameters: int
    bits_per_weight: float
    size_bytes: int
    notes: tuple[str, ...]
    fallbacks: tuple[str, ...]
    """Tensors whose rows did not fit the type wanted, each as `name: wanted -> written`."""
    worst_relative_rmse: Mapping[str, float]
    """By type: the worst of the rows compared with the folder; empty if nothing was quantised."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values for export.json."""
        bits = round(self.bits_per_weight, 2)
        return {**asdict(self), "path": self.path.name, "bits_per_weight": bits}


@dataclass(frozen=True, kw_only=True)
class _Target:
    """One tensor of the file."""

    tensor: Tensor
    kind: str
    """ggml type."""
    source: StoredTensor | Floats
    """Floats are those that are computed here."""
    weights: Floats | None = None
    """Importance of its columns, where it weighs the rounding."""
    fallback: str | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return stored_bytes(self.kind, math.prod(self.tensor.shape))

    @property
    def unit_rows(self) -> int:
        """Rows that are reordered together."""
        return self.tensor.head_rows or 1

    def blocks(self) -> Iterator[Floats]:
        """Give all rows in the order of llama.cpp."""
        if not isinstance(self.source, StoredTensor):
            yield self.source
            return
        for _, block in row_blocks(self.source, multiple_of_rows=self.unit_rows):
            yield self._as_llama_cpp(block)

    def row(self, at: int) -> Floats:
        """Give one row as the file stores it: a row of a matrix, or a whole vector."""
        if not isinstance(self.source, StoredTensor):
            return self.source
        if len(self.tensor.shape) == 1:
            return self._as_llama_cpp(read_rows(self.source, 0, self.source.rows))
        start = at // self.unit_rows * self.unit_rows
        block = self._as_llama_cpp(read_rows(self.source, start, start + self.unit_rows))
        return self.halved(block[at - start])

    def halved(self, block: Floats) -> Floats:
        """Round to f16 before quantising, so that the file is what the f16 file would give."""
        halves: Floats = encode_values(block, "F16", self.tensor.gguf).astype(np.float32)
        return halves

    def _as_llama_cpp(self, block: Floats) -> Floats:
        if self.tensor.shift:
            shifted: Floats = block + np.float32(self.tensor.shift)
            return shifted
        if self.unit_rows == 1:
            return block
        # transformers rotates the halves of a head against one another, llama.cpp neighbours.
        pairs = block.reshape(-1, 2, self.unit_rows // 2, block.shape[1])
        ordered: Floats = pairs.swapaxes(1, 2).reshape(block.shape)
        return ordered


def convert_to_gguf(
    source: Path,
    target: Path,
    *,
    quant: str,
    name: str,
    texts: Mapping[str, str] | None = None,
    importance: Importance | None = None,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> ConversionReport:
    """Convert a model folder to one GGUF file.

    Args:
        source: Model folder as transformers saves it, adapter merged, not quantised.
        target: The file; it gets this name only when it is whole and checked.
        quant: Kind of file, one of `settings.QUANTS`; norms are always f32.
        name: Written as general.name.
        texts: Further keys, such as `tokenizer.chat_template`.
        importance: Weighs the rounding of the types that can be weighed.
        threads: Threads to round with; all usable cores where None.
        on_progress: Called with the bytes of weights written and all of them.

    Raises:
        ModelError: A model or tokenizer that llama.cpp would run otherwise than transformers,
            weights that are not finite or too large for f16, or ggml is missing.
        GateError: What was quantised is not the folder within its type's error.

    Source: llama.cpp, conversion/llama.py (order of q and k rows, rope_freqs).
    """
    model = _open_model(source)
    targets, notes = _plan(model, quant, importance)
    vocabulary = read_vocabulary(source, model.shape.vocab)
    kinds = {one.kind for one in targets} - VALUE_BYTES.keys()
    weighed = importance if any(one.weights is not None for one in targets) else None
    worst: dict[str, float] = {}
    with (
        open_ggml() if kinds else nullcontext(None) as ggml,
        whole_file(target) as part,
        closing(GGUFWriter(part, model.family.gguf_architecture)) as writer,
    ):
        _add_model_keys(writer, model, quant, name)
        _add_vocabulary_keys(writer, vocabulary)
        _add_further_keys(writer, texts or {}, weighed, is_quantised=bool(kinds))
        zeros, offsets = _write(writer, targets, ggml, threads or usable_cores(), on_progress)
        writer.close()
        if kinds:
            worst = _compare_with_source(part, targets, offsets)
    if zeros:
        notes.append(f"{zeros:,} values are too small for f16 and became 0")
    parameters = sum(t.source.values for t in targets if isinstance(t.source, StoredTensor))
    return ConversionReport(
        path=target,
        types=dict(Counter(one.kind for one in targets)),
        parameters=parameters,
        bits_per_weight=8 * sum(one.size_bytes for one in targets) / parameters,
        size_bytes=target.stat().st_size,
        notes=(*notes, *vocabulary.notes),
        fallbacks=tuple(f"{one.tensor.gguf}: {one.fallback}" for one in targets if one.fallback),
        worst_relative_rmse=worst,
    )


@dataclass(frozen=True, kw_only=True)
class _Rope:
    """How positions are rotated."""

    base: float
    linear_factor: float | None = None
    frequency_divisors: Sequence[float] | None = None
    """One for each pair of a head, where low frequencies are scaled as in Llama 3."""


@dataclass(frozen=True, kw_only=True)
class _Model:
    """A model folder that its family's row describes."""

    checkpoint: Checkpoint
    family: Family
    shape: ModelShape
    rope: _Rope


def check_exportable(base: Path, tokenizer: PromptTokenizer) -> None:
    """Refuse a base model of which no GGUF file could be made, before anything is trained on it.

    No weights are read. The tokenizer is that of training, which is what an export writes.

    Raises:
        ModelError: `convert_to_gguf` would refuse the trained model.
    """
    model = _open_model(base)
    _plan(model, "f16", None)
    with TemporaryDirectory() as folder:
        tokenizer.hf.save_pretrained(folder)
        read_vocabulary(Path(folder), model.shape.vocab)


def export_obstacle(base: str, revision: str | None, tokenizer: PromptTokenizer) -> str | None:
    """Say why no GGUF file could be made of a base, for those who go on without one; else None."""
    try:
        check_exportable(base_folder(base, revision), tokenizer)
    except UserError as error:
        return f"{error.what}: {error.why}"
    return None


def _open_model(folder: Path) -> _Model:
    """Open a model folder; refuse what llama.cpp would not compute as transformers does."""
    checkpoint, source = open_checkpoint(folder), str(folder / "config.json")
    family = family_of(checkpoint.config, source)
    shape = ModelShape.from_config(checkpoint.config, source)
    needed = ["max_position_embeddings", "rms_norm_eps"]
    needed += ["sliding_window"] if family.full_attention_every > 1 else []
    for key in needed:
        if not checkpoint.config.get(key):
            what = f"{key} is {checkpoint.config.get(key)!r}"
            raise _refused(checkpoint, what, "llama.cpp needs it")
    rope = _read_rope(checkpoint, family, shape)
    return _Model(checkpoint=checkpoint, family=family, shape=shape, rope=rope)


def _refused(checkpoint: Checkpoint, what: str, why: str) -> ModelError:
    return ModelError(
        f"model in {checkpoint.folder}: {what}",
        why,
        "export a plain model of a family that the project knows, with its adapter merged",
    )


def _plan(
    model: _Model, quant: str, importance: Importance | None
) -> tuple[list[_Target], list[str]]:
    """List the tensors in the file's order; all of the model must be used, and none be missing."""
    checkpoint, family, shape = model.checkpoint, model.family, model.shape
    left = {n: t for n, t in checkpoint.tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    notes = []
    if shape.tied and OUTPUT in left:
        del left[OUTPUT]
        notes.append(f"{OUTPUT} is left out: config.json ties it to the embeddings")
    targets = []
    means = dict(importance.mean_squares) if importance else {}
    for wanted in family.tensors(shape):
        stored = left.pop(wanted.source, None)
        if stored is None:
            raise _refused(checkpoint, f"no tensor {wanted.source}", "the weights are not complete")
        if stored.shape != wanted.shape:
            what = f"{wanted.source} has shape {stored.shape}"
            raise _refused(checkpoint, what, f"config.json asks for {wanted.shape}")
        kind, missed = tensor_type(wanted, quant, shape.layers)
        weights = means.pop(wanted.gguf, None)
        assert weights is None or len(weights) == wanted.shape[-1], f"importance of {wanted.gguf}"
        targets.append(
            _Target(
                tensor=wanted,
                kind=kind,
                source=stored,
                weights=weights if kind in WEIGHTED else None,
                fallback=f"{missed} -> {kind}" if missed else None,
            )
        )
    if left:
        raise _refused(
            checkpoint,
            f"{len(left)} tensors that a {family.name} has not ({', '.join(sorted(left)[:3])})",
            "they would be left out, so the file would be another model",
        )
    assert not means, f"importance of {sorted(means)}, which the model has not"
    if model.rope.frequency_divisors is not None:
        values = np.array(model.rope.frequency_divisors, np.float32)
        computed = Tensor(gguf="rope_freqs.weight", source="", shape=values.shape)
        targets.append(_Target(tensor=computed, kind="F32", source=values))
    if any(one.kind not in VALUE_BYTES for one in targets):
        # llama.cpp's own tool writes tensors layer by layer when it quantises.
        targets.sort(key=lambda one: (one.tensor.layer, one.tensor.gguf))
    return targets, notes


def _read_rope(checkpoint: Checkpoint, family: Family, shape: ModelShape) -> _Rope:
    """Read how positions are rotated, in the spellings of transformers 4 and 5.

    A scaling lost here would give a model that errs only on long prompts.
    """
    config = checkpoint.config
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    windowed = given.get("sliding_attention") or {}
    if windowed.get("rope_theta", _WINDOWED_BASE) != _WINDOWED_BASE or (
        windowed.get("rope_type", "default") != "default"
    ):
        why = f"llama.cpp rotates within a sliding window by the plain base {_WINDOWED_BASE:g}"
        raise _refused(checkpoint, f"RoPE {dict(windowed)}", why)
    given = given.get("full_attention") or given
    base = float(given.get("rope_theta") or config.get("rope_theta") or family.rope_base)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in family.rope_types or given.get("partial_rotary_factor", 1.0) != 1.0:
        why = f"only {', '.join(family.rope_types)} can be converted"
        raise _refused(checkpoint, f"RoPE {dict(given)}", why)
    try:
        if kind == "linear":
            return _Rope(base=base, linear_factor=float(given["factor"]))
        if kind == "llama3":
            return _Rope(base=base, frequency_divisors=llama3_divisors(base, shape.head_dim, given))
    except KeyError as error:
        raise _refused(checkpoint, f"RoPE {dict(given)}", f"it has no {error}") from error
    return _Rope(base=base)


def llama3_divisors(base: float, head_dim: int, given: Mapping[str, Any]) -> list[float]:
    """Compute by what each frequency is divided: 1 for short waves, `factor` for long ones.

    Source: transformers, modeling_rope_utils.py, _compute_llama3_parameters.
    """
    factor = float(given["factor"])
    low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
    context = float(given["original_max_position_embeddings"])
    divisors = []
    for at in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (at / head_dim)
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def _add_model_keys(writer: GGUFWriter, model: _Model, quant: str, name: str) -> None:
    """Write what llama.cpp builds the model from."""
    config, shape, rope = model.checkpoint.config, model.shape, model.rope
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type(quant))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(rope.base)
    if model.family.full_attention_every > 1:
        writer.add_sliding_window(int(config["sliding_window"]))
    if rope.linear_factor is not None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.linear_factor)


def _add_vocabulary_keys(writer: GGUFWriter, vocabulary: GgufVocabulary) -> None:
    """Write the tokenizer."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    tokens = [vocabulary.tokens[index] for index in range(len(vocabulary.tokens))]
    writer.add_token_list([token.text for token in tokens])
    if vocabulary.model == "llama":
        writer.add_token_scores([token.score for token in tokens])
    writer.add_token_types([token.kind for token in tokens])
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special_ids.items():
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.special_ids["bos"] is not None)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)


def _add_further_keys(
    writer: GGUFWriter, texts: Mapping[str, str], weighed: Importance | None, *, is_quantised: bool
) -> None:
    """Write a caller's texts, and what llama.cpp's own tool says last when it quantises."""
    keys = writer.kv_data[0]
    for key, value in texts.items():
        assert key not in keys, f"{key} is written already"
        # Not add_string, which leaves an empty text out.
        writer.add_key_value(key, value, GGUFValueType.STRING)
    for key in ("general.quantization_version", "general.file_type") if is_quantised else ():
        keys[key] = keys.pop(key)
    if weighed is not None:
        writer.add_string("quantize.imatrix.dataset", SOURCE)
        writer.add_uint32("quantize.imatrix.entries_count", len(weighed.mean_squares))
        writer.add_uint32("quantize.imatrix.chunks_count", weighed.chunks)


def _write(
    writer: GGUFWriter,
    targets: Sequence[_Target],
    ggml: GgmlLibrary | None,
    threads: int,
    on_progress: Callable[[int, int], None],
) -> tuple[int, dict[str, int]]:
    """Write header and weights, rounded in threads; count what became 0, and say where they are."""
    for target in targets:
        writer.add_tensor_info(
            target.tensor.gguf,
            target.tensor.shape,
            np.dtype(np.float32),
            target.size_bytes,
            GGMLQuantizationType[target.kind],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None, "the header is written"
    file = writer.fout[0]
    total = sum(target.size_bytes for target in targets)
    done = zeros = 0
    offsets: dict[str, int] = {}
    pending: deque[tuple[_Target, Future[tuple[NDArray[Any], int]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:

        def write_oldest() -> None:
            nonlocal done, zeros
            target, future = pending.popleft()
            stored, lost = future.result()
            if target.tensor.gguf not in offsets:
                writer.write_padding(file, file.tell())
                offsets[target.tensor.gguf] = file.tell()
            file.write(stored.data)
            done, zeros = done + stored.nbytes, zeros + lost
            on_progress(done, total)

        for target in targets:
            for block in target.blocks():
                pending.append((target, pool.submit(_encode, target, block, ggml)))
                if len(pending) > threads:
                    write_oldest()
        while pending:
            write_oldest()
    writer.write_padding(file, file.tell())
    return zeros, offsets


def _encode(target: _Target, block: Floats, ggml: GgmlLibrary | None) -> tuple[NDArray[Any], int]:
    """Turn a block into what the file stores, and count what f16 makes 0 in it."""
    if not np.isfinite(block).all():
        raise ModelError(
            f"tensor {target.tensor.gguf}",
            "it has values that are not finite, so the model writes nothing sensible",
            "train again, or take an earlier checkpoint",
        )
    if target.kind not in VALUE_BYTES:
        assert ggml is not None
        return ggml.rows(target.kind, target.halved(block), target.weights), 0
    stored = encode_values(block, target.kind, target.tensor.gguf)
    if target.kind != "F16":
        return stored, 0
    # Numpy counts 16-bit numbers one by one unless they are integers; the sign is no part of zero.
    zeros = stored.size - np.count_nonzero(stored.view(np.uint16) << 1)
    return stored, int(zeros - (block.size - np.count_nonzero(block))) if zeros else 0


def _compare_with_source(
    path: Path, targets: Sequence[_Target], offsets: Mapping[str, int]
) -> dict[str, float]:
    """Read rows from every part of every tensor of a finished file and compare them.

    A mistake of ggml, of the order of blocks or of an offset shows here, before a file gets its
    name. Rows are decoded by the gguf package. Its reader is not used: it takes 100 MiB for a
    vocabulary of 32,000 tokens and 700 MiB for Llama 3's, more than all the rest.

    Returns:
        The worst relative error by type.

    Raises:
        GateError: A row is further from its source than its type explains.
    """
    worst: dict[str, float] = {}
    with path.open("rb") as file:
        for one in targets:
            count, name = math.prod(one.tensor.shape[:-1]), one.tensor.gguf
            picked, row_bytes, stored = _rows_to_check(count), one.size_bytes // count, []
            for row in picked:
                file.seek(offsets[name] + row * row_bytes)
                stored.append(np.frombuffer(file.read(row_bytes), np.uint8))
            blocks, rows = np.stack(stored), np.stack([one.row(at) for at in picked])
            number = GGMLQuantizationType[one.kind]
            error = _relative_error(rows, quants.dequantize(blocks, number), one.weights)
            if not error <= WORST_RELATIVE_RMSE[one.kind]:
                raise GateError(
                    f"{name} as {one.kind} is not its source: relative error {error:.3g}, "
                    f"at most {WORST_RELATIVE_RMSE[one.kind]} expected"
                )
            if one.kind == "Q8_0" and not np.array_equal(blocks, quants.quantize(rows, number)):
                raise GateError(f"{name} as Q8_0 differs from the reference in numpy")
            worst[one.kind] = max(worst.get(one.kind, 0.0), error)
    return worst


def _rows_to_check(rows: int) -> Sequence[int]:
    """Choose the first and last row, and both sides of every step between them."""
    steps = range(_CHECKED_EVERY_ROWS, rows, _CHECKED_EVERY_ROWS)
    return sorted({0, rows - 1, *steps, *(step - 1 for step in steps)})


def _relative_error(rows: Floats, back: Floats, weights: Floats | None) -> float:
    """Give the relative error: of the worst row, or with weights of all rows together.

    A row counts for at least 1 % of a usual one, as scales of tiny rows (unused tokens) round to
    zero. With weights, a single row may be far off in columns that hardly matter, and one column
    that has nearly all the weight beside larger values; a mistake is far off in all, both ways.
    """
    exact, wrong = rows.astype(np.float64), rows.astype(np.float64) - back
    norms = np.linalg.norm(exact, axis=1)
    usual = float(np.sqrt(np.mean(norms**2)))
    if not exact.any():
        return 0.0 if not wrong.any() else float("inf")
    if weights is None:
        return float(np.max(np.linalg.norm(wrong, axis=1) / np.maximum(norms, 0.01 * usual)))
    shares = [
        float((wrong**2 @ one).sum() / max((exact**2 @ one).sum(), 1e-300))
        for one in (weights.astype(np.float64), np.ones(rows.shape[1]))
    ]
    return math.sqrt(min(shares))
