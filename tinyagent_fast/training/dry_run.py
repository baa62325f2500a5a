"""One training step without weights or arithmetic, to count the memory that it would take.

Tensors are torch's fake ones: they have shapes and storages but no content, so a step of a 1.1B
model takes a second or two on any machine. What is counted is what autograd really keeps; the
estimate of `training.memory` is held against it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM

from tinyagent_fast.config import Checkpointing
from tinyagent_fast.errors import ModelError
from tinyagent_fast.models.families import nearest_family
from tinyagent_fast.prompts.tokens import IGNORED
from tinyagent_fast.shared_prefix.forward import summed_losses, unsupported
from tinyagent_fast.shared_prefix.packing import pack_step
from tinyagent_fast.shared_prefix.step import step_gradients
from tinyagent_fast.training.memory import CHUNK_TOKENS, GIB, MemoryEstimator


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What one micro-batch of the longest rows takes, without weights, adapter and optimizer."""

    peak_gib: float
    """The most that lived at one time in forward and backward pass."""
    computed_tokens: int
    """Of the micro-batch, with the prefix that several of them share."""
    padded_tokens: int
    duration_s: float


def dry_run(
    estimator: MemoryEstimator, batch: int, checkpointing: Checkpointing = "false"
) -> DryRun:
    """Run one step on tensors without content, and count storages.

    With backend `unsloth`, shared prefixes go through its functions; that is for the process of
    `unsloth_dry_run`.

    4-bit weights keep as much for the backward pass as 16-bit ones, so they are counted as those.
    A padded batch is counted with its mask, which transformers leaves out of a single row.

    Args:
        estimator: Config, sizes of the model and lengths of the rows.
        batch: Rows of the micro-batch, all as long as the longest.
        checkpointing: `true` computes layers again; what is moved to host memory is not counted.

    Raises:
        ModelError: The model's layers are none that this step can be built for.
    """
    started = time.perf_counter()
    model = _model_without_content(estimator, checkpointing)
    half = estimator.config.model.weights != "fp32"
    cast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=half)
    lengths = estimator.lengths
    shared = round(lengths.shared_tokens) if estimator.shares_prefixes else 0
    # What a second micro-batch adds is there from the first one on, but it needs one to share with.
    batches = 2 if estimator.keeps_one_prefix(checkpointing) else 1
    supervised = round(lengths.supervised_tokens)
    rows = made_rows(batches * batch, estimator.row_tokens, supervised, shared)
    packed = pack_step(rows, batch)
    fake, live = FakeTensorMode(), LiveBytes()
    with fake:
        for module in model.modules():
            _give_storages(module)
        for parameter in model.parameters():
            if parameter.requires_grad:  # the adapter's gradients are counted with its weights
                parameter.grad = torch.zeros_like(parameter)
        if estimator.shares_prefixes:
            _refuse_unsupported(model)
            on_fake = packed.each(fake.from_tensor)
            with live:
                step_gradients(model, on_fake, autocast=cast)
        else:
            step = _padded_step(model, rows)
            with live:
                with cast():
                    loss = step()
                loss.backward()
    return DryRun(
        peak_gib=live.peak / GIB,
        computed_tokens=packed.largest_tokens
        if estimator.shares_prefixes
        else batch * estimator.row_tokens,
        padded_tokens=batch * estimator.row_tokens,
        duration_s=time.perf_counter() - started,
    )


def _model_without_content(estimator: MemoryEstimator, checkpointing: Checkpointing) -> Any:
    """Build base and adapter on the meta device, each weight in the type that it is held in."""
    config, lora = estimator.config, estimator.config.lora
    dtype = torch.float32 if config.model.weights == "fp32" else torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**estimator.shape.to_config(), dtype=dtype),
            attn_implementation="sdpa",
        ).to(dtype)
        if config.model.weights == "nf4" and estimator.backend == "transformers":
            for name, parameter in model.named_parameters():
                if not name.endswith("_proj.weight"):
                    parameter.data = parameter.data.float()
        if checkpointing != "false":
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            model.enable_input_require_grads()
        adapter = LoraConfig(
            r=lora.rank,
            lora_dropout=lora.dropout,
            target_modules=nearest_family(estimator.shape.model_type).target_modules(lora.targets),
        )
        model = get_peft_model(model, adapter).train()
    if estimator.backend == "unsloth":
        _let_unsloth_compute(model)
        return model
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for dropout in module.lora_dropout.values():
                if isinstance(dropout, nn.Dropout):
                    dropout.__class__ = _Dropout
            if config.model.weights == "nf4":
                module.base_layer.__class__ = _Quantised
    return model


def _let_unsloth_compute(model: Any) -> None:
    """Put Unsloth's functions where it puts them for such an adapter."""
    from unsloth.kernels import fast_lora

    for layer in model.get_base_model().model.layers:
        layer.self_attn.apply_qkv = fast_lora.apply_lora_qkv
        layer.self_attn.apply_o = fast_lora.apply_lora_o
        if isinstance(layer.mlp.gate_proj, LoraLayer):
            layer.mlp.forward = MethodType(fast_lora.apply_lora_mlp_swiglu, layer.mlp)


class _Dropout(nn.Dropout):
    """Keeps a truth value for each number, as on a GPU; on a CPU torch keeps a factor."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop by the operation that a GPU has."""
        return torch.native_dropout(x, self.p, self.training)[0]


class _Quantised(nn.Linear):
    """Stands for a 4-bit layer, which is called as the module that it is."""


def _give_storages(module: Any) -> None:
    """Replace a module's own weights and buffers by ones without content on the CPU."""
    for name, weight in module._parameters.items():
        if weight is not None:
            made = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
            module._parameters[name] = nn.Parameter(made, weight.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def made_rows(batch: int, tokens: int, supervised: int, shared: int) -> list[dict[str, list[int]]]:
    """Make rows of so many tokens that agree in their first `shared` tokens."""
    if not 0 < supervised < tokens:
        supervised = 1
    labels = [IGNORED] * (tokens - supervised) + [1] * supervised
    # One token more than is shared differs, so that exactly `shared` can be.
    same = min(shared, tokens - supervised - 1)
    return [
        {"input_ids": [0] * same + [1 + row] * (tokens - same), "labels": labels}
        for row in range(batch)
    ]


def _refuse_unsupported(model: Any) -> None:
    reason = unsupported(model, "training")
    if reason is not None:
        raise ModelError(
            "a dry run with shared prefixes",
            f"they cannot be computed for this model: {reason}",
            "add --train.shared-prefix off",
        )


def _padded_step(model: Any, rows: Sequence[dict[str, list[int]]]) -> Any:
    """Compute the loss as TRL does, which puts the supervised tokens to the front.

    Its own function reads how many there are from a tensor, which has no content here.
    """
    size = (len(rows), len(rows[0]["labels"]))
    ids = torch.zeros(size, dtype=torch.long)
    mask = torch.ones(size, dtype=torch.long)
    supervised = sum(label != IGNORED for row in rows for label in row["labels"])
    order, targets = torch.zeros(ids.numel(), dtype=torch.long), torch.zeros(supervised).long()
    base = model.get_base_model()

    def step() -> Any:
        hidden = base.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        in_front = hidden.flatten(0, 1).index_select(0, order)[:supervised]
        return summed_losses(base.lm_head, in_front, targets, CHUNK_TOKENS)

    return step


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made within it that are still alive, and the most there were."""

    def __init__(self) -> None:
        """Begin with nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation and note what it made."""
        given = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if _has_storage(t)}
        out = function(*args, **(kwargs or {}))
        for tensor in filter(_has_storage, tree_iter(out)):
            storage = tensor.untyped_storage()
            if storage not in self._known and id(storage) not in given:  # else it is a view
                self._known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, storage.nbytes())
        return out

    def _forget(self, size: int) -> None:
        self.live -= size


def _has_storage(value: Any) -> bool:
    return isinstance(value, Tensor)
