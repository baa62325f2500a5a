"""The child process that runs llama.cpp's server, from the package xllamacpp.

A process of its own, because the server hangs for good when it is closed inside this process
while a request is under way, and because a model that llama.cpp aborts on must not take a whole run
along. The child ends when its standard input closes, so not even a killed parent leaves it behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from tinyagent_fast.errors import ModelError

CacheType = Literal["f16", "f32"]
_INSTALL = "pip install xllamacpp (on Linux it needs the system package libgomp1 too)"


@dataclass(frozen=True, kw_only=True)
class LlamaCppSettings:
    """How a GGUF file is served.

    `slots` prompts are answered at once, each with room for `context_tokens_per_slot` tokens of
    prompt and answer; a slot keeps its last prompt's cache and evaluates only what differs. An f32
    cache (and no flash attention) is for comparisons with an f32 model: an f16 cache alone moves
    logits by 0.02. `threads` of None lets llama.cpp use all cores.
    """

    model: Path
    slots: int = 8
    context_tokens_per_slot: int = 8192
    threads: int | None = None
    cache_type: CacheType = "f16"


class Child:
    """The process that runs the server."""

    def __init__(self, settings: LlamaCppSettings, log: IO[bytes]) -> None:
        """Start it.

        Args:
            settings: The file and how it is served.
            log: Gets what llama.cpp has to say.
        """
        self._model = settings.model
        self._log = log
        # Threads that wait for others must not spin: next to one busy program, two spinning
        # threads are 27 times slower than one.
        environment = {**os.environ, "GOMP_SPINCOUNT": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tinyagent_fast.inference.llama_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            cwd=Path(__file__).parents[2],  # else a folder of our name there would be imported
            start_new_session=True,  # Ctrl-C is for the parent, which ends the child in order
        )
        assert self._process.stdin is not None
        wanted = {**asdict(settings), "model": str(settings.model.resolve())}
        with suppress(BrokenPipeError):  # then it has gone already, and has said why
            self._process.stdin.write(json.dumps(wanted).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def wait_for_url(self) -> str:
        """Wait until the model is loaded.

        Returns:
            The server's address.

        Raises:
            ModelError: It cannot be loaded, or xllamacpp is not installed.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {}
        if "url" in answer:
            return str(answer["url"])
        if "missing" in answer:
            raise ModelError("llama.cpp", f"it cannot be used: {answer['missing']}", _INSTALL)
        self.stop()
        raise ModelError(
            f"model {self._model}",
            f"llama.cpp cannot load it: {answer.get('error', 'the process ended')}"
            + self.last_words(),
            "export the file anew; it may be cut, or made for another llama.cpp",
        )

    def last_words(self) -> str:
        """Quote the end of what llama.cpp has said, and the exit code if the process is gone.

        Returns:
            Text to append to a message; empty if there is nothing to say.
        """
        words = ""
        with suppress(subprocess.TimeoutExpired):
            words = f"; its process ended with code {self._process.wait(timeout=1)}"
        try:
            self._log.seek(0)
            said = self._log.read()[-600:].decode(errors="replace").strip()
        except ValueError:  # the server was closed by another thread, and its log with it
            said = ""
        return words + (f"; it said: {said}" if said else "")

    def stop(self) -> None:
        """End the process: closing its input is the sign, and a kill follows if need be."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


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
    # Not the ordinary way out: it would wait for requests that nobody waits for any more.
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
