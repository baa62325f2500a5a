"""A merged Llama folder to a GGUF file that llama.cpp reads, in blocks of rows.

Nothing is converted that this module does not know: another architecture, a bias, another RoPE
scaling or a tensor too many is refused, because llama.cpp would run such a file and answer wrongly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tinyagent_fast.errors import ModelError
from tinyagent_fast.export.checkpoints import (
    VALUE_BYTES,
    Checkpoint,
    StoredTensor,
    open_checkpoint,
    row_blocks,
)
from tinyagent_fast.export.llama import (
    OUTPUT,
    LlamaShape,
    Rope,
    llama_tensors,
    read_rope,
    read_shape,
    refused,
)
from tinyagent_fast.export.rounding import OverflowInF16, count_zeros, encode_values
from tinyagent_fast.export.vocabulary import GgufVocabulary, read_vocabulary

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray

FileType = Literal["f32", "f16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What was written, and what a reader of the file should know."""

    path: Path
    file_type: FileType
    tensors: int
    parameters: int
    size_bytes: int
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Target:
    """One tensor of the GGUF; `head_rows` is set where the rows of each head are reordered."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: StoredTensor | NDArray[np.float32]
    head_rows: int | None = None

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * VALUE_BYTES[self.dtype]


def convert_to_gguf(
    source: Path,
    target: Path,
    *,
    file_type: FileType,
    name: str,
    chat_template: str | None,
    extra: Mapping[str, str | int | float | bool],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConversionReport:
    """Convert a Llama model folder to one GGUF file.

    Args:
        source: Model folder as transformers saves it, adapter merged, not quantised.
        target: The file; it gets this name only when it is whole.
        file_type: Number format of the matrices; norms are always f32.
        name: Written as general.name.
        chat_template: Jinja text for llama.cpp's chat endpoint; none to write no template.
        extra: Further keys, such as `tinyagent_fast.prompt_format`.
        on_progress: Called with the bytes of weights written and all of them.

    Returns:
        What was written.

    Raises:
        ModelError: A model or tokenizer that llama.cpp would run otherwise than transformers, or
            weights that are not finite or too large for f16.

    Source: llama.cpp, conversion/llama.py (names, order of q and k rows, rope_freqs).
    """
    started = time.perf_counter()
    checkpoint = open_checkpoint(source)
    shape = read_shape(checkpoint)
    rope = read_rope(checkpoint, shape.head)
    targets, notes = _plan(checkpoint, shape, file_type.upper())
    parameters = sum(math.prod(target.shape) for target in targets)
    if rope.frequency_divisors is not None:
        targets.append(_rope_tensor(rope.frequency_divisors))
    vocabulary = read_vocabulary(source, shape.vocabulary)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _partial(target) as writer:
        _add_model_keys(writer, shape, rope, file_type, name)
        _add_vocabulary_keys(writer, vocabulary)
        if chat_template is not None:
            writer.add_chat_template(chat_template)
        _add_extra_keys(writer, extra)
        zeros = _write(writer, targets, on_progress)
    if zeros:
        notes.append(f"{zeros:,} values are too small for f16 and became 0")
    return ConversionReport(
        path=target,
        file_type=file_type,
        tensors=len(targets),
        parameters=parameters,
        size_bytes=target.stat().st_size,
        seconds=time.perf_counter() - started,
        notes=(*notes, *vocabulary.notes),
    )


@contextmanager
def _partial(target: Path) -> Iterator[GGUFWriter]:
    """Give a writer for a file beside the target, which gets its name only when it is whole."""
    from gguf import GGUFWriter

    part = target.with_name(target.name + ".part")
    writer = GGUFWriter(part, "llama")
    try:
        yield writer
        writer.close()
        part.replace(target)
    finally:
        writer.close()
        part.unlink(missing_ok=True)


def _plan(checkpoint: Checkpoint, shape: LlamaShape, dtype: str) -> tuple[list[_Target], list[str]]:
    """List the tensors to write; every tensor of the model must be used, and none be missing."""
    left = {n: t for n, t in checkpoint.tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    notes = []
    if shape.tied and OUTPUT in left:
        del left[OUTPUT]
        notes.append(f"{OUTPUT} is left out: config.json ties it to the embeddings")
    targets = []
    for wanted in llama_tensors(shape):
        tensor = left.pop(wanted.source, None)
        if tensor is None:
            raise refused(checkpoint, f"no tensor {wanted.source}", "the weights are not complete")
        if tensor.shape != wanted.shape:
            what = f"{wanted.source} has shape {tensor.shape}"
            raise refused(checkpoint, what, f"config.json asks for {wanted.shape}")
        targets.append(
            _Target(
                name=wanted.name,
                shape=wanted.shape,
                dtype=dtype if len(wanted.shape) > 1 else "F32",
                source=tensor,
                head_rows=wanted.head_rows,
            )
        )
    if left:
        raise refused(
            checkpoint,
            f"{len(left)} tensors that a Llama has not ({', '.join(sorted(left)[:3])})",
            "they would be left out, so the file would be another model",
        )
    return targets, notes


def _rope_tensor(divisors: tuple[float, ...]) -> _Target:
    """Make the tensor that llama.cpp divides the frequencies of RoPE by."""
    import numpy as np

    values = np.array(divisors, np.float32)
    return _Target(name="rope_freqs.weight", shape=values.shape, dtype="F32", source=values)


def _add_model_keys(
    writer: GGUFWriter,
    shape: LlamaShape,
    rope: Rope,
    file_type: FileType,
    name: str,
) -> None:
    """Write what llama.cpp builds the model from."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

    types = {
        "f32": LlamaFileType.ALL_F32,
        "f16": LlamaFileType.MOSTLY_F16,
        "bf16": LlamaFileType.MOSTLY_BF16,
    }
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(types[file_type])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_dimension_count(shape.head)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_rope_freq_base(rope.base)
    if rope.linear_factor is not None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.linear_factor)


def _add_vocabulary_keys(writer: GGUFWriter, vocabulary: GgufVocabulary) -> None:
    """Write the tokenizer."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.token_types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for add, index in (
        (writer.add_bos_token_id, vocabulary.bos_id),
        (writer.add_eos_token_id, vocabulary.eos_id),
        (writer.add_unk_token_id, vocabulary.unk_id),
        (writer.add_pad_token_id, vocabulary.pad_id),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)


def _add_extra_keys(writer: GGUFWriter, extra: Mapping[str, str | int | float | bool]) -> None:
    from gguf import GGUFValueType

    for key, value in extra.items():
        assert key not in writer.kv_data[0], f"{key} is written already"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_int64(key, value)
        elif isinstance(value, float):
            writer.add_float64(key, value)
        else:
            # Not add_string, which leaves an empty text out.
            writer.add_key_value(key, value, GGUFValueType.STRING)


def _write(
    writer: GGUFWriter, targets: list[_Target], on_progress: Callable[[int, int], None]
) -> int:
    """Write header and weights; count the values that became 0."""
    import numpy as np
    from gguf import GGMLQuantizationType

    for target in targets:
        writer.add_tensor_info(
            target.name,
            target.shape,
            np.dtype(np.float32),
            target.size_bytes,
            GGMLQuantizationType[target.dtype],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None, "the header is written"
    file = writer.fout[0]
    total = sum(target.size_bytes for target in targets)
    done = zeros = 0
    for target in targets:
        writer.write_padding(file, file.tell())
        for block in _blocks(target):
            stored = _encode(target, block)
            if target.dtype == "F16" and (found := count_zeros(stored)):
                zeros += found - count_zeros(block)
            file.write(stored.data)
            done += stored.nbytes
            on_progress(done, total)
    writer.write_padding(file, file.tell())
    return zeros


def _blocks(target: _Target) -> Iterator[NDArray[np.float32]]:
    """Give the rows in the order of llama.cpp."""
    if not isinstance(target.source, StoredTensor):
        yield target.source
        return
    head = target.head_rows
    for _, block in row_blocks(target.source, multiple_of_rows=head or 1):
        if head is None:
            yield block
        else:
            # transformers rotates the halves of a head against one another, llama.cpp neighbours.
            pairs = block.reshape(-1, 2, head // 2, block.shape[1])
            yield pairs.swapaxes(1, 2).reshape(block.shape)


def _encode(target: _Target, block: NDArray[np.float32]) -> NDArray[Any]:
    """Round a block to the target's format; refuse what is not finite there."""
    import numpy as np

    if not np.isfinite(block).all():
        raise ModelError(
            f"tensor {target.name}",
            "it has values that are not finite, so the model writes nothing sensible",
            "train again, or take an earlier checkpoint",
        )
    try:
        return encode_values(block, target.dtype)
    except OverflowInF16 as error:
        raise ModelError(
            f"tensor {target.name}", f"{error}", "convert to bf16 or f32 instead"
        ) from error
