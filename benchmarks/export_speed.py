"""Time and peak memory of every export step on a model of TinyLlama-1.1B's shape.

`python benchmarks/export_speed.py` makes a model of random weights in a temporary folder (7 GB with
what follows from it), converts and quantises it, each step in a process of its own, and writes
benchmarks/results/export.json. `--shape tiny` takes seconds; `--official DIR` also times
llama.cpp's own converter, and says whether its tensors are the same, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inputs import machine, random_llama
from processes import measured

from tinyagent_fast.models.published import TINYLLAMA_32K

RESULT = Path(__file__).resolve().parent / "results" / "export.json"
SHAPES = {
    "1.1b": TINYLLAMA_32K,
    "tiny": replace(TINYLLAMA_32K, hidden=256, intermediate=512, layers=2, heads=4, kv_heads=2),
}
QUANTS = ("q8_0", "q4_k_m")


def make_model(folder: Path, shape: str) -> dict[str, Any]:
    """Write a Llama of random bf16 weights, with a SentencePiece tokenizer of words like `abc`."""
    import torch
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    from tinyagent_fast.prompts.loading import load_tokenizer

    rope = {"rope_type": "default", "rope_theta": 1e6}
    llama = random_llama(SHAPES[shape], 32768, rms_norm_eps=1e-5, rope_parameters=rope)
    llama.to(torch.bfloat16).save_pretrained(str(folder))
    proto = protobuf.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    kinds = protobuf.ModelProto.SentencePiece
    proto.pieces.add(piece="<unk>", score=0.0, type=kinds.UNKNOWN)
    for text in ("<s>", "</s>"):
        proto.pieces.add(piece=text, score=0.0, type=kinds.CONTROL)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=kinds.BYTE)
    letters = [*"abcdefghijklmnopqrstuvwxyz\u2581"]
    words = (word for n in (1, 2, 3, 4) for word in itertools.product(letters, repeat=n))
    left = llama.config.vocab_size - len(proto.pieces)
    for rank, word in enumerate(itertools.islice(words, left)):
        proto.pieces.add(piece="".join(word), score=-float(rank), type=kinds.NORMAL)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    load_tokenizer(folder).save_pretrained(str(folder))
    weights = folder / "model.safetensors"
    return {"size_mb": round(weights.stat().st_size / 1e6, 1)}


def convert(model: Path, target: Path, quant: str, threads: int) -> dict[str, Any]:
    """Convert a model folder to a GGUF file."""
    from tinyagent_fast.export.conversion import convert_to_gguf

    report = convert_to_gguf(model, target, quant=quant, name="export-speed", threads=threads)
    return {
        "size_mb": round(report.size_bytes / 1e6, 1),
        "notes": list(report.notes),
        "bits_per_weight": round(report.bits_per_weight, 3),
        "threads": threads,
    }


def compare_tensors(ours: Path, theirs: Path) -> dict[str, Any]:
    """Count tensors with the same name, type, shape and bytes in two GGUF files."""
    from gguf import GGUFReader

    def digests(path: Path) -> dict[str, str]:
        return {
            t.name: f"{t.tensor_type.name} {list(t.shape)} {hashlib.sha256(t.data).hexdigest()}"
            for t in GGUFReader(path).tensors
        }

    mine, official = digests(ours), digests(theirs)
    same = sum(official.get(name) == digest for name, digest in mine.items())
    return {"tensors": len(mine), "official_tensors": len(official), "identical": same}


def run_official(script: Path, model: Path, target: Path) -> dict[str, Any]:
    """Run llama.cpp's own converter."""
    words = [script, model, "--outtype", "f16", "--outfile", target]
    subprocess.run([sys.executable, *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    # It loads torch, as the other steps do not.
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"peak_rss_mib": round(peak_kib / 1024, 1)}


def main() -> None:
    """Measure all steps and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1.1b")
    parser.add_argument("--threads", type=int, default=1, help="threads of the quantisation")
    parser.add_argument("--official", type=Path, help="folder with convert_hf_to_gguf.py")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    official = next(given.official.rglob("convert_hf_to_gguf.py"), None) if given.official else None
    if given.official and official is None:
        parser.error(f"--official {given.official}: it holds no convert_hf_to_gguf.py")
    from tinyagent_fast.runs import write_json

    steps: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        model, f16 = Path(name) / "model", Path(name) / "f16.gguf"

        def run(name: str, step: Callable[..., dict[str, Any]], *arguments: Any) -> None:
            steps[name] = found = measured(step, *arguments)
            print(
                f"{name:12} {found['seconds']:7.1f} s {found['peak_rss_mib']:7.0f} MiB", flush=True
            )

        run("make", make_model, model, given.shape)
        run("convert_f16", convert, model, f16, "f16", given.threads)
        if official:
            theirs = Path(name) / "official.gguf"
            run("official_f16", run_official, official, model, theirs)
            steps["official_f16"]["compared"] = compare_tensors(f16, theirs)
            theirs.unlink()
        for quant in QUANTS:
            target = Path(name) / f"{quant}.gguf"
            run(quant, convert, model, target, quant, given.threads)
            target.unlink()
    write_json(given.out, {"shape": given.shape, "environment": machine(), "steps": steps})
    print(f"written: {given.out}")


if __name__ == "__main__":
    main()
