"""The child process in which llama.cpp's server runs, from the package xllamacpp.

A process of its own, because the server hangs for good when it is closed inside this process
while a request is under way, and because a model that llama.cpp aborts on must not take a whole run
along. The child ends when its standard input closes, so not even a killed parent leaves it behind.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any


def serve_here() -> None:
    """Serve in this process until standard input closes; the child runs this and nothing else.

    The settings come as one line of JSON, and the address goes out as one.
    """
    settings = json.loads(sys.stdin.readline())
    # The answer must stand alone: whatever llama.cpp prints goes to the log.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**message: str) -> None:
        answer.write(json.dumps(message) + "\n")
        answer.flush()

    try:
        import xllamacpp
    except ImportError as error:
        tell(missing=str(error))
        return
    try:
        server = xllamacpp.Server(_parameters(xllamacpp, settings))
    except RuntimeError as error:
        tell(error=str(error))
        return
    tell(url=server.listening_address)
    sys.stdin.read()
    # The ordinary way out would wait for requests whose callers have gone.
    os._exit(0)


def _parameters(xllamacpp: Any, settings: Mapping[str, Any]) -> Any:
    """Translate settings into llama.cpp's own, where those that are not named keep its defaults."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = settings["model"]
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.verbosity = 1  # errors only
    parameters.ui = False
    parameters.n_parallel = settings["slots"]
    parameters.n_ctx = settings["slots"] * settings["context_tokens_per_slot"]
    parameters.kv_unified = False
    parameters.fit_params = False  # it would cut the context to the memory at hand, in silence
    parameters.cache_ram_mib = 0  # copies of old prompts, up to 8 GiB by default
    parameters.force_pure_content_parser = True  # no thoughts or tool calls are cut out of texts
    parameters.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    if settings["threads"] is not None:
        parameters.cpuparams.n_threads = settings["threads"]
        parameters.cpuparams_batch.n_threads = settings["threads"]
    if settings["cache_type"] == "f32":
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return parameters


if __name__ == "__main__":
    serve_here()
