"""Unsloth's code for GPUs on a CPU, its kernels by Triton's interpreter: `start()` comes first.

For a process of its own, since Unsloth changes transformers, peft and trl for all of it. Each line
below replaces one thing that wants a device; the arithmetic stays Unsloth's.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any


def start() -> None:
    """Import Unsloth as on a machine with a GPU."""
    os.environ.update(
        TRITON_INTERPRET="1",
        UNSLOTH_ALLOW_CPU="1",
        UNSLOTH_AUTO_INSTALL="0",
        UNSLOTH_COMPILE_DISABLE="1",
        UNSLOTH_COMPILE_LOCATION=str(Path(tempfile.gettempdir()) / "unsloth_compiled"),
        UNSLOTH_DISABLE_PINNED_MEMORY="1",
        UNSLOTH_DISABLE_STATISTICS="1",
    )
    import torch
    import unsloth

    del unsloth
    os.environ["UNSLOTH_ALLOW_CPU"] = "0"  # it would leave out what is patched for a GPU
    _kernels_without_a_device()
    _models_without_a_device(torch)
    _trainer_as_with_a_device()


def _kernels_without_a_device() -> None:
    import torch
    from unsloth.kernels import nf4, rope_embedding, utils

    rope_embedding._eviction_hints_ok = lambda _: True
    utils._can_use_scratch = lambda _: False
    utils._current_device = lambda: None
    nf4._CONFIG_OVERRIDE = (1024, 2, False, False, 0)  # else the fastest one is timed on the GPU

    def rotated(query: Any, key: Any, cos: Any, sin: Any, indices: Any) -> Any:
        # The kernel without indices loops over a range that the interpreter cannot run.
        if indices is None:
            batch, _, tokens, _ = query.shape
            indices = torch.arange(tokens, dtype=torch.int32)[None].expand(batch, -1)
        return rope_embedding.Fast_RoPE_Embedding_QK.apply(query, key, cos, sin, indices)

    rope_embedding._fast_rope_embedding_eager = rotated


def _models_without_a_device(torch: Any) -> None:
    from unsloth.models import _utils, llama, loader, loader_utils, vision

    card = ("CPU. ", "CUDA: none.", 1.0)
    for module in (llama, _utils, vision):
        module.DEVICE_TYPE_TORCH = "cpu"
        for name, value in (
            ("get_device_stats", lambda: card),
            ("clean_gpu_cache", lambda: None),
            ("get_current_device", lambda: 0),
        ):
            if hasattr(module, name):
                setattr(module, name, value)
    _utils.SUPPORTS_BFLOAT16 = True
    for module in (loader, loader_utils, llama):
        if hasattr(module, "ALLOW_BITSANDBYTES"):
            module.ALLOW_BITSANDBYTES = True
    llama.DEVICE_COUNT = 1
    llama.per_layer_device = lambda _: (torch.device("cpu"), 0)
    torch.cuda.current_device = lambda: None
    torch.cuda.get_device_capability = lambda *_: (8, 9)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.mem_get_info = lambda *_: (8 << 30, 16 << 30)
    # Rotary tables and buffers are kept by a device's number, here 0, which torch takes for CUDA's.
    empty = torch.empty

    def empty_on_cpu(*arguments: Any, **named: Any) -> Any:
        if str(named.get("device")) in ("0", "cpu:0"):
            named["device"] = "cpu"
        return empty(*arguments, **named)

    torch.empty = empty_on_cpu

    def build(self: Any, index: int) -> None:
        size, cpu = self.current_rope_size, torch.device("cpu", 0)
        rows, dtype = self._rope_cache_rows(), self._rope_cache_dtype
        self._set_cos_sin_cache(seq_len=rows, device=cpu, dtype=dtype)
        self.current_rope_size = size
        self._rope_cache_versions[index] = self._rope_cache_version

    llama._PerDeviceRopeCache._build_rope_cache = build


def _trainer_as_with_a_device() -> None:
    import unsloth.trainer
    from unsloth.context_parallel import patch_sft_trainer
    from unsloth.models import rl

    rl.patch_trl_disable_gradient_checkpointing()
    rl._patch_trl_rl_trainers_impl("sft_trainer")
    unsloth.trainer._patch_trl_trainer()
    patch_sft_trainer()


def fuse_in_fp32(fuse: bool = True) -> None:
    """Let Unsloth fuse layers whose base is held in fp32, which a CPU computes in, or not."""
    import torch
    from unsloth.models import llama

    llama._base_weight_dtype = lambda _: torch.bfloat16 if fuse else torch.float32
