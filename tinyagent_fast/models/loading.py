"""Load a base with a fresh or trained adapter, by Unsloth or transformers + peft, and save both."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tinyagent_fast.config import Config, ModelConfig, TrainConfig
from tinyagent_fast.distributed import launch_environment
from tinyagent_fast.errors import ModelError, reading
from tinyagent_fast.models.families import nearest_family
from tinyagent_fast.models.libraries import prepare_libraries
from tinyagent_fast.models.older_readers import write_for_older_readers
from tinyagent_fast.models.quantisation_aware import train_quantised
from tinyagent_fast.prompts.loading import (
    load_tokenizer,
    refuse_pickles,
    refuse_pointers,
    resolve_tokenizer_folder,
    switched_off,
)
from tinyagent_fast.prompts.tokens import PromptTokenizer
from tinyagent_fast.runs import ADAPTER_WEIGHTS, whole_folder, write_json, write_text

_SMALL_WEIGHTS = 20_000_000
"""A smaller model gains nothing by bf16 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready for training or generation, the same whichever backend built it."""

    model: Any
    tokenizer: PromptTokenizer
    backend: str
    device: str
    compute_dtype: str
    fused: str = ""
    """How many layers Unsloth's kernels compute; empty where there are no such layers."""
    notes: tuple[str, ...] = ()
    """What was done otherwise than asked, one sentence each; shown to the user."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in 16 bits, even where parts of the model are kept in fp32."""
        import torch

        if self.compute_dtype in ("bfloat16", "float16"):
            return torch.autocast(self.device, dtype=getattr(torch, self.compute_dtype))
        return nullcontext()


def may_take_bf16(loaded: LoadedModel, config: Config) -> bool:
    """Say whether a model on the CPU may be computed in bf16: where asked for, or worth a try.

    That is a model large enough to gain, on a processor that multiplies matrices in bf16.
    """
    import torch

    plain = loaded.device == "cpu" and loaded.backend == "transformers"
    if not plain or config.model.weights == "nf4" or config.train.qat != "off":
        return False
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    large = sum(parameter.numel() for parameter in loaded.model.parameters()) > _SMALL_WEIGHTS
    asked = config.model.cpu_compute
    return asked == "bf16" or bool(asked == "auto" and native and large)


def in_bf16(loaded: LoadedModel) -> LoadedModel:
    """Round the frozen weights of a model to bf16, in place, and let it compute in that."""
    import torch

    for parameter in loaded.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return replace(loaded, compute_dtype="bfloat16")


@dataclass(frozen=True)
class _Choice:
    """How a model is loaded on this machine."""

    backend: str
    device: str
    compute_dtype: str
    checkpointing: str | bool
    notes: list[str]

    @property
    def dtype(self) -> Any:
        """The type to compute in, as torch has it."""
        import torch

        return getattr(torch, self.compute_dtype)

    @property
    def device_map(self) -> dict[str, Any]:
        """The whole model on this process's own GPU, or on the CPU."""
        return {"": launch_environment().local_rank if self.device == "cuda" else "cpu"}


def load_for_training(config: Config, base: str) -> LoadedModel:
    """Load the base, a folder or a hub name, with a fresh adapter, which alone is trainable.

    Raises:
        ModelError: The base, the backend or the tokenizer cannot be had.
    """
    qat = config.train.qat
    how = _choose(replace(config.model, backend="transformers") if qat != "off" else config.model)
    if how.backend == "unsloth":
        if how.device == "cpu":
            how.notes.extend(_unsloth_cpu_notes(config.train))
        model = _unsloth_adapter(_unsloth_base(config, base, how), config, how)
    else:
        model = _peft_adapter(_transformers_base(config.model, base, how), config, how)
        if qat != "off":
            grids = train_quantised(model, qat)
            held = ", ".join(f"{count} as {grid}" for grid, count in sorted(grids.items()))
            how.notes.append(f"computing with weights rounded for {qat}: {held}")
    return _finish(model, config.model, base, how)


def load_for_generation(config: Config, base: str, adapter: Path | None) -> LoadedModel:
    """Load the base, a folder or a hub name, and an adapter if there is one, in evaluation mode.

    Raises:
        ModelError: The base, the adapter or the backend cannot be had.
    """
    how = _choose(config.model)
    if how.backend == "unsloth":
        model = _unsloth_base(config, base, how)
    else:
        model = _transformers_base(config.model, base, how)
    if adapter is not None:
        for name in ("adapter_config.json", ADAPTER_WEIGHTS):
            if not (adapter / name).exists():
                raise ModelError(
                    f"adapter {adapter}",
                    f"it holds no {name}",
                    "let training finish, or name another run",
                )
        from peft import PeftModel

        with reading(f"adapter {adapter}", "train or copy it again, or name another one"):
            model = PeftModel.from_pretrained(model, str(adapter))
        check_adapter(model, adapter)
        if _is_by_unsloth(model):
            from unsloth import FastLanguageModel

            model = FastLanguageModel.patch_peft_model(model, use_gradient_checkpointing=False)
    model.eval()
    loaded = _finish(model, config.model, base, how)
    if may_take_bf16(loaded, config):
        model.requires_grad_(False)
        return in_bf16(loaded)
    return loaded


def check_adapter(model: Any, folder: Path) -> None:
    """Check that an adapter's file has just the tensors of a peft model's adapter, in their shapes.

    peft passes over what is missing or left over, and plans with half an adapter.

    Raises:
        ModelError: A tensor is missing, left over, or of another shape.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    wanted = {name: list(value.shape) for name, value in get_peft_model_state_dict(model).items()}
    with (
        reading(f"adapter {folder}", "train or copy it again, or name another one"),
        safe_open(str(folder / ADAPTER_WEIGHTS), "np") as file,
    ):
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    different = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    if different:
        name = different[0]
        raise ModelError(
            f"adapter {folder}",
            f"{len(different)} of its {len(wanted)} tensors do not fit the base model, the first "
            f"{name}: {found.get(name, 'not there')} instead of {wanted.get(name, 'nothing')}",
            "name the base model that it was trained on, or another adapter",
        )


def choose_backend(config: ModelConfig, *, cuda: bool) -> str:
    """Give the backend, `unsloth` or `transformers`, also where `auto` was asked for."""
    if config.backend != "auto":
        return config.backend
    fits = config.weights != "fp32"  # its kernels are made for 16 bits
    return "unsloth" if cuda and fits and find_spec("unsloth") is not None else "transformers"


def _choose(config: ModelConfig) -> _Choice:
    """Choose backend, device and precision; say whatever differs from what was asked."""
    import torch

    cuda = torch.cuda.is_available()
    notes: list[str] = []
    unsloth_installed = find_spec("unsloth") is not None
    backend = choose_backend(config, cuda=cuda)
    if config.backend == "auto" and cuda and backend == "transformers":
        notes.append(
            "unsloth computes in 16 bits, not fp32: using transformers, which is slower"
            if unsloth_installed
            else "unsloth is not installed: using transformers, which is slower"
        )
    if backend == "unsloth" and not unsloth_installed:
        raise ModelError(
            "backend unsloth",
            "the package unsloth is not installed",
            "make setup installs it where CUDA is present; or use --model.backend transformers",
        )
    if cuda:
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        if config.weights == "bf16" and dtype == "float16":
            notes.append("this GPU has no bf16: weights are held in fp16")
        if config.weights in ("fp16", "fp32"):
            dtype = {"fp16": "float16", "fp32": "float32"}[config.weights]
    else:
        dtype = "float32"
        if config.weights in ("bf16", "fp16"):
            notes.append(f"no GPU: weights are held in fp32 instead of {config.weights}")
    # With `auto` the packed forward pass decides for each micro-batch.
    checkpointing: str | bool = config.gradient_checkpointing not in ("false", "auto")
    if config.gradient_checkpointing == "unsloth":
        if backend == "unsloth":
            checkpointing = "unsloth"
        else:
            notes.append("gradient checkpointing `unsloth` needs that backend: using plain `true`")
    return _Choice(backend, "cuda" if cuda else "cpu", dtype, checkpointing, notes)


def _finish(model: Any, config: ModelConfig, base: str, how: _Choice) -> LoadedModel:
    """Add the tokenizer, after a check that it belongs to the model."""
    folder = resolve_tokenizer_folder(base, config.revision)
    tokenizer = PromptTokenizer(load_tokenizer(folder), config.prompt_format)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer.hf) > rows:
        raise ModelError(
            f"base {base}",
            f"its tokenizer has {len(tokenizer.hf)} tokens but the model only {rows} embeddings",
            "use the tokenizer that belongs to the model; the vocabulary is never resized",
        )
    if off := switched_off(folder):
        how.notes.append(
            f"the base's tokenizer.json switches {' and '.join(off)} on: off here and in exports"
        )
    how.notes.extend(tokenizer.chat.notes if tokenizer.chat else ())
    _refuse_non_finite(model, base)
    model.config.pad_token_id = tokenizer.pad_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_id
    fused, others = _fused_layers(model) if _is_by_unsloth(model) else ("", 0)
    if others:
        how.notes.append(f"Unsloth's kernels compute only a part: {fused}; the rest is slower")
    kinds = {type(parameter).__name__ for parameter in model.parameters()}
    if config.weights == "nf4" and "Params4bit" not in kinds:
        how.notes.append("bitsandbytes could not quantise the weights: they are not in 4 bits")
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        backend=how.backend,
        device=how.device,
        compute_dtype=how.compute_dtype,
        fused=fused,
        notes=tuple(how.notes),
    )


def _refuse_non_finite(model: Any, base: str) -> None:
    """Refuse weights with NaN or infinity, which would be blamed on the first rows instead."""
    import torch

    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        # Of 4-bit weights, the scale of a block tells of NaN within.
        scales = (getattr(state, "absmax", None), getattr(state, "offset", None))
        held = (parameter.data, *scales, getattr(nested, "absmax", None))
        for values in held:
            if not isinstance(values, torch.Tensor) or not values.is_floating_point():
                continue
            finite = torch.isfinite(values)
            if not finite.all():
                bad, dtype = int((~finite).sum()), str(values.dtype).removeprefix("torch.")
                raise ModelError(
                    "the adapter" if "lora_" in name else f"base model {base!r}",
                    f"{name} has {bad:,} values that are NaN or infinite (in {dtype})",
                    "download or convert the weights again; where they are finite in another "
                    "precision, choose that with --model.weights",
                )


def _refuse_incomplete(base: str, found: Mapping[str, Any]) -> list[str]:
    """Refuse weights that leave a part of the model as chance made it; note what is left over."""
    missing, left_over = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        raise ModelError(
            f"base model {base!r}",
            f"its files lack {len(missing)} tensors of the model that its config.json tells of, "
            f"the first {missing[0]}",
            "download it again, with all its files and its own config.json",
        )
    if left_over:
        count, first = len(left_over), left_over[0]
        return [f"{count} tensors of the base's files are no part of the model: {first}, ..."]
    return []


def _is_by_unsloth(model: Any) -> bool:
    """Say whether an adapter's model has layers of Unsloth's."""
    from tinyagent_fast.shared_prefix.forward import layers_by

    return hasattr(model, "peft_config") and layers_by(model) == "unsloth"


def _fused_layers(model: Any) -> tuple[str, int]:
    """Count the layers that Unsloth's kernels compute, in words, and those that they do not."""
    layers = model.get_base_model().model.layers
    places = {
        "QKV": [(layer.self_attn, "apply_qkv") for layer in layers],
        "O": [(layer.self_attn, "apply_o") for layer in layers],
        "MLP": [(layer.mlp, "forward") for layer in layers],
    }
    kernels = "unsloth.kernels.fast_lora"
    names: dict[int, list[str]] = {}
    for name, modules in places.items():
        found = [getattr(vars(module).get(at), "__module__", "") for module, at in modules]
        names.setdefault(found.count(kernels), []).append(name)
    counted = (f"{count} of {len(layers)} {', '.join(names[count])}" for count in names)
    return "; ".join(counted) + " fused", sum(
        (len(layers) - count) * len(names[count]) for count in names
    )


def _place(base: str) -> str:
    """Give a hub name, or the whole path of a local folder whose files can be read.

    An adapter names its base so, wherever it is read, and a relative name with one slash would be
    looked up in the network.
    """
    folder = Path(base)
    if not folder.is_dir():
        return base
    refuse_pointers(folder)
    refuse_pickles(folder)
    return str(folder.resolve())


def _transformers_base(config: ModelConfig, base: str, how: _Choice) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the display says what is being loaded
    quantization = None
    if config.weights == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=how.dtype,
        )
    fix = "check the name and the network, or name a local folder with config.json and weights"
    with reading(f"base model {base!r}", fix):
        model, found = AutoModelForCausalLM.from_pretrained(
            _place(base),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            revision=config.revision,
            dtype=how.dtype,
            quantization_config=quantization,
            device_map=how.device_map,
            attn_implementation="sdpa",
        )
    how.notes.extend(_refuse_incomplete(base, found))
    if how.device == "cpu" and quantization is not None:
        import bitsandbytes as bnb

        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                # Else the first forward pass without gradients repacks 4-bit weights in place, and
                # gradients are wrong from then on. Source: bitsandbytes 0.50, AVX512-BF16.
                module.support_avx512bf16_for_cpu = False
    if how.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return model


def _peft_adapter(model: Any, config: Config, how: _Choice) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    checkpointing = bool(how.checkpointing)
    kwargs = {"use_reentrant": False}
    if config.model.weights == "nf4":
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs=kwargs,
        )
    elif checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()
    torch.manual_seed(config.train.seed)
    return get_peft_model(model, LoraConfig(**_lora(model, config), task_type="CAUSAL_LM"))


def _lora(model: Any, config: Config) -> dict[str, Any]:
    """Describe the adapter in the words that peft and Unsloth share."""
    lora = config.lora
    return {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": nearest_family(model.config.model_type).target_modules(lora.targets),
        "bias": "none",
    }


def _unsloth_cpu_notes(train: TrainConfig) -> list[str]:
    """Say what Unsloth's CPU backend changes without an error.

    Source: unsloth_zoo 2026.10.9, cpu/trainer.py.
    """
    notes = []
    if train.optimizer == "adamw_8bit":
        notes.append("Unsloth without a GPU takes torch's fused AdamW instead of adamw_8bit")
    if train.batching == "packed":
        notes.append("Unsloth without a GPU does not pack rows: they are shuffled and padded")
    return notes


def _unsloth_base(config: Config, base: str, how: _Choice) -> Any:
    prepare_libraries(config.model)
    from transformers import AutoConfig
    from unsloth import FastLanguageModel

    name = _place(base)
    revision = {} if config.model.revision is None else {"revision": config.model.revision}
    fix = "check the name and the network, or try --model.backend transformers"
    with reading(f"base model {base!r}", fix):
        shape = AutoConfig.from_pretrained(name, trust_remote_code=False, **revision)
        model, _ = FastLanguageModel.from_pretrained(
            model_name=name,
            # Its own forward cuts longer rows, and would stretch positions for a larger number.
            max_seq_length=getattr(shape, "max_position_embeddings", 0)
            or config.model.max_length_tokens,
            dtype=how.dtype,
            load_in_4bit=config.model.weights == "nf4",
            use_gradient_checkpointing=how.checkpointing,
            random_state=config.train.seed,
            use_exact_model_name=True,
            trust_remote_code=False,
            device_map=how.device_map,
            offload_embedding=False,  # it would be on another device than the layers
            **revision,
        )
    return model


def _unsloth_adapter(model: Any, config: Config, how: _Choice) -> Any:
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(
        model,
        **_lora(model, config),
        use_gradient_checkpointing=how.checkpointing,
        random_state=config.train.seed,
    )


def save_model(
    model: Any, tokenizer: Any, folder: Path, notes: Mapping[str, object] | None = None
) -> None:
    """Save a model or an adapter with its tokenizer; a folder of that name is replaced when whole.

    Notes are written as files, by name: a text as it is, anything else as JSON.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar of raw lines for a file or two
    with whole_folder(folder) as part:
        model.save_pretrained(str(part))
        (part / "README.md").unlink(missing_ok=True)  # peft's template, without an answer in it
        tokenizer.save_pretrained(str(part))
        write_for_older_readers(part)
        for name, value in (notes or {}).items():
            if isinstance(value, str):
                write_text(part / name, value)
            else:
                write_json(part / name, value)
