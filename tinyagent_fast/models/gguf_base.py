"""A GGUF file of a known family as a base model: dequantised into a folder as transformers has it.

What cannot be read exactly is refused with its reason: a key, a tensor or a way to cut words that
is passed over would make another model. transformers reads such files too, but takes its tokenizer
from the architecture's name, so that ids differ, and cannot save what it read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tinyagent_fast.errors import ModelError, reading
from tinyagent_fast.export.checkpoints import Floats, NewTensor, write_safetensors
from tinyagent_fast.export.conversion import llama3_divisors
from tinyagent_fast.export.vocabulary import PRE_TOKENIZERS, byte_level_words
from tinyagent_fast.models.families import FAMILIES, Family, ModelShape, Tensor
from tinyagent_fast.models.older_readers import write_for_older_readers
from tinyagent_fast.prompts.loading import sentencepiece_bpe
from tinyagent_fast.runs import whole_folder, write_json

_KEYS: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Keys of a file, behind its architecture, and their names in config.json."""
_READ_APART = (
    *("vocab_size", "attention.value_length", "rope.dimension_count"),
    *("rope.freq_base", "rope.scaling.type", "rope.scaling.factor"),
)
_SPECIAL: Mapping[str, str] = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Special tokens as transformers and as GGUF calls them."""
_FIX = "take the model as a folder with config.json and weights, or another file"
_MOST_VALUES = 2**24
"""More than any vocabulary or its merges have."""
_LLAMA_3_CONTEXTS_TOKENS = [2**power for power in range(6, 20)]
"""A file has only what each frequency is divided by; these are tried as the original context."""


def base_from_gguf(
    path: Path,
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Write the model of a GGUF file as a folder with config.json, weights and tokenizer.

    Args:
        path: The file; quantised weights are dequantised to f32, f16 and bf16 ones stay as they
            are.
        folder: Written beside its place and moved there when it is whole.
        on_progress: Called with the tensors written and their number.

    Raises:
        ModelError: It is no GGUF file, of no known family, or has what cannot be read exactly.
    """
    with reading(f"{path}: it is no whole GGUF file", _FIX):
        file = _GgufFile(path)
        config = file.config()
        tokenizer = file.tokenizer()
        tensors = file.tensors(ModelShape.from_config(config, str(path)), on_progress)
    with whole_folder(folder) as part:
        write_json(part / "config.json", config)
        write_safetensors(part / "model.safetensors", tensors)
        tokenizer.save_pretrained(str(part))
        write_for_older_readers(part)


def gguf_shape(path: Path) -> ModelShape:
    """Read the sizes of the model in a GGUF file.

    Raises:
        ModelError: As `base_from_gguf`.
    """
    with reading(f"{path}: it is no whole GGUF file", _FIX):
        return ModelShape.from_config(_GgufFile(path).config(), str(path))


class _GgufFile:
    """Keys and tensors of a file, and the family that they belong to."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader, GGUFValueType

        class Reader(GGUFReader):  # type: ignore[misc]
            """It takes what lies behind the end for empty, and counts on for hours."""

            def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **o: Any) -> Any:
                found = super()._get(offset, dtype, count, *order, **o)
                if len(found) != count:
                    raise ValueError("it ends too early, or a length in it is wrong")
                return found

            def _get_field_parts(self, offset: int, kind: int) -> Any:
                if kind == GGUFValueType.ARRAY:
                    inner, length = self._get(offset, np.uint32), self._get(offset + 4, np.uint64)
                    if inner[0] == GGUFValueType.ARRAY or length[0] > _MOST_VALUES:
                        raise ValueError(f"a list of {length[0]} values of the kind {inner[0]}")
                return super()._get_field_parts(offset, kind)

        self.path = path
        reader = Reader(path)
        self.keys: dict[str, Any] = {name: f.contents() for name, f in reader.fields.items()}
        self.stored = {one.name: one for one in reader.tensors}
        architecture = self.keys.get("general.architecture")
        found = [one for one in FAMILIES.values() if one.gguf_architecture == architecture]
        if not found:
            known = ", ".join(one.name for one in FAMILIES.values())
            why = f"the project knows the families {known}"
            raise self._refused(f"it holds a model of the architecture {architecture!r}", why)
        self.family: Family = found[0]

    def _refused(self, what: str, why: str) -> ModelError:
        return ModelError(f"{self.path}: {what}", why, _FIX)

    def config(self) -> dict[str, Any]:
        """Write config.json from the keys, each of which must be understood."""
        prefix = f"{self.family.gguf_architecture}."
        own = {k.removeprefix(prefix): v for k, v in self.keys.items() if k.startswith(prefix)}
        windows = ("attention.sliding_window",) if self.family.full_attention_every > 1 else ()
        strange = own.keys() - _KEYS.keys() - {*_READ_APART, *windows}
        if strange:
            what = f"it has the key {prefix}{min(strange)}"
            raise self._refused(what, "the project does not know what it changes")
        config: dict[str, Any] = {
            "architectures": [self.family.causal_lm],
            "model_type": self.family.model_type,
            **{name: own[key] for key, name in _KEYS.items() if key in own},
            "vocab_size": len(self.keys.get("tokenizer.ggml.tokens", ())),
            "tie_word_embeddings": "output.weight" not in self.stored,
            "dtype": "float32",
            **self.family.config_values,
            **{key.removeprefix("attention."): own[key] for key in windows if key in own},
        }
        for name, key in _SPECIAL.items():
            config[f"{name}_token_id"] = self.keys.get(f"tokenizer.ggml.{key}_token_id")
        # Stored in 32 bits; the shortest number that gives the same is the one that was meant.
        if "rms_norm_eps" in config:
            config["rms_norm_eps"] = float(str(np.float32(config["rms_norm_eps"])))
        shape = ModelShape.from_config(config, str(self.path))
        config["head_dim"] = shape.head_dim
        config |= {key: config[other] for key, other in self.family.equal_values.items()}
        for key in ("attention.value_length", "rope.dimension_count"):
            if own.get(key, shape.head_dim) != shape.head_dim:
                raise self._refused(f"{prefix}{key} is {own[key]}", f"heads have {shape.head_dim}")
        rope = self._rope(own, shape)
        if windows:  # of the layers that see everything; the base of the others is the family's own
            return {**config, "rope_theta": rope["rope_theta"]}
        return {**config, "rope_parameters": rope}

    def _rope(self, own: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
        """Say how positions are rotated."""
        base = float(own.get("rope.freq_base", self.family.rope_base))
        kind = own.get("rope.scaling.type", "none")
        if kind == "linear":
            factor = float(own["rope.scaling.factor"])
            return {"rope_type": "linear", "rope_theta": base, "factor": factor}
        if kind != "none":
            raise self._refused(f"its RoPE scaling is {kind!r}", "it cannot be read exactly")
        if "rope_freqs.weight" not in self.stored:
            return {"rope_type": "default", "rope_theta": base}
        divisors = np.array(self.stored["rope_freqs.weight"].data)
        rope: dict[str, Any] = {"rope_type": "llama3", "rope_theta": base}
        rope |= {"factor": float(divisors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        for context in _LLAMA_3_CONTEXTS_TOKENS:
            rope["original_max_position_embeddings"] = context
            if np.allclose(divisors, llama3_divisors(base, shape.head_dim, rope), rtol=1e-5):
                return rope
        raise self._refused("it scales RoPE frequencies", "not as the Llama 3 models do")

    def tensors(
        self, shape: ModelShape, on_progress: Callable[[int, int], None]
    ) -> list[NewTensor]:
        """List the weights as transformers names them; all of the file's must be among them."""
        wanted = list(self.family.tensors(shape))
        strange = self.stored.keys() - {one.gguf for one in wanted} - {"rope_freqs.weight"}
        if strange:
            what = f"it has the tensor {min(strange)}"
            raise self._refused(what, f"a plain {self.family.name} has none of that name")
        found = []
        for at, one in enumerate(wanted, start=1):
            stored = self.stored.get(one.gguf)
            if stored is None or tuple(stored.shape[::-1]) != one.shape:
                has = "none" if stored is None else f"shape {tuple(stored.shape[::-1])}"
                what = f"the tensor {one.gguf} should have shape {one.shape}"
                raise self._refused(what, f"the file has {has}")
            kind = stored.tensor_type.name
            kind = kind if kind in ("F16", "BF16") else "F32"
            blocks = self._blocks(one, partial(on_progress, at, len(wanted)))
            found.append(NewTensor(one.source, kind, one.shape, blocks))
        return found

    def _blocks(self, wanted: Tensor, when_written: Callable[[], None]) -> Iterator[Floats]:
        """Dequantise a tensor, with rows and values as transformers stores them."""
        from gguf.quants import dequantize

        stored = self.stored[wanted.gguf]
        values: Floats = np.asarray(dequantize(stored.data, stored.tensor_type), np.float32)
        if wanted.head_rows:
            pairs = values.reshape(-1, wanted.head_rows // 2, 2, *wanted.shape[1:])
            values = pairs.swapaxes(1, 2)
        yield values.reshape(wanted.shape) - np.float32(wanted.shift)
        when_written()

    def tokenizer(self) -> Any:
        """Build the tokenizer that gives the ids that llama.cpp gives for this file."""
        from gguf import TokenType
        from transformers import PreTrainedTokenizerFast

        keys = {k.removeprefix("tokenizer."): v for k, v in self.keys.items()}
        keys = {k.removeprefix("ggml."): v for k, v in keys.items()}
        tokens = list(zip(keys["tokens"], keys["token_type"], strict=True))
        special = [text for text, kind in tokens if kind == TokenType.CONTROL]
        names = {
            f"{name}_token": keys["tokens"][keys[f"{key}_token_id"]]
            for name, key in _SPECIAL.items()
            if keys.get(f"{key}_token_id") is not None
        }
        if keys.get("model") == "llama":
            pieces = list(zip(keys["tokens"], keys["scores"], keys["token_type"], strict=True))
            unknown = [text for text, kind in tokens if kind == TokenType.UNKNOWN]
            core = sentencepiece_bpe(
                pieces,
                unk=names.get("unk_token"),
                added=[*unknown, *special],
                space_prefix=keys.get("add_space_prefix", True),
            )
        elif keys.get("model") == "gpt2":
            core = self._byte_level(keys, tokens, special)
        else:
            what = f"its tokenizer is of the kind {keys.get('model')!r}"
            raise self._refused(what, "only Llama's SentencePiece and byte-level BPE are known")
        from tokenizers import AddedToken

        typed = [text for text, kind in tokens if kind == TokenType.USER_DEFINED]
        core.add_tokens([AddedToken(text, special=False, normalized=False) for text in typed])
        built = PreTrainedTokenizerFast(tokenizer_object=core, **names)
        built.chat_template = keys.get("chat_template")
        return built

    def _byte_level(
        self, keys: Mapping[str, Any], tokens: list[tuple[str, int]], special: list[str]
    ) -> Any:
        """Build a byte-level BPE that cuts text into words as the file's name for that says."""
        from gguf import TokenType
        from tokenizers import AddedToken, Tokenizer, decoders, models

        if keys.get("pre") not in PRE_TOKENIZERS:
            what = f"its text is cut into words by {keys.get('pre')!r}"
            raise self._refused(what, "the project does not know this pattern")
        patterns, ignore_merges = PRE_TOKENIZERS[keys["pre"]]
        vocab = {
            text: index for index, (text, kind) in enumerate(tokens) if kind != TokenType.UNUSED
        }
        merges = [tuple(pair.split(" ", 1)) for pair in keys["merges"]]
        core = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
        core.pre_tokenizer = byte_level_words(patterns)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
        return core
