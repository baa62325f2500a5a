"""What `gpu_check` measures of generation and of numerics, and the project's own GPU tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from gpu_check_inputs import generated_examples, prompts_of
from gpu_check_parts import memory
from gpu_check_training import Steps, measure_training
from gpu_check_worker import ROOT, Bench, Part, release

from tinyagent_fast.plans.grammar import END_OF_PLAN

_ADAPTER_SEED = 7


def generate(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Time generation prompt by prompt and in batches, and compare what was written."""
    from tinyagent_fast.inference.decoding import generating
    from tinyagent_fast.inference.parity import compare_batches

    loaded = bench.loaded(item["model"])
    release(bench.cuda)
    scale = bench.scale
    prompts = prompts_of(bench.rows(), scale)
    singles = prompts[: scale.single_prompts]
    figures: dict[str, Any] = {"prompts": len(prompts), "new_tokens": scale.new_tokens}
    texts: dict[int, dict[int, str]] = {}
    with generating(loaded.model, loaded.backend):
        for batch, chosen in [(1, singles), *((size, prompts) for size in scale.batches)]:
            _complete(loaded, chosen[:batch], batch, 4)
            release(bench.cuda)
            started = time.perf_counter()
            texts[batch] = _complete(loaded, chosen, batch, scale.new_tokens)
            seconds = time.perf_counter() - started
            figures[f"plans_per_s_batch_{batch}"] = round(len(chosen) / seconds, 4)
            figures[f"peak_reserved_gib_batch_{batch}"] = memory(bench)["peak_reserved_gib"]
            if batch > 1:
                same = same_prefixes(texts[1], texts[batch])
                figures[f"agreement_batch_{batch}"] = same
            bench.partial(figures)
        parity = compare_batches(
            loaded.model,
            loaded.tokenizer,
            prompts,
            batch=scale.batches[0],
            max_new_tokens=scale.new_tokens // 4 + 1,
            stop=END_OF_PLAN,
            sample=min(4, scale.single_prompts),
        )
    figures["parity_of_a_random_model"] = asdict(parity)
    return figures


def _complete(
    loaded: Any, prompts: Sequence[list[int]], batch: int, new_tokens: int
) -> dict[int, str]:
    """Give the texts by the prompts' indices; call it inside `generating`."""
    from tinyagent_fast.inference.decoding import complete

    batches = complete(
        loaded.model,
        loaded.tokenizer,
        prompts,
        batch=batch,
        max_new_tokens=new_tokens,
        stop=END_OF_PLAN,
    )
    return {index: completion.text for pairs in batches for index, completion in pairs}


def same_prefixes(one: Mapping[int, str], other: Mapping[int, str]) -> dict[str, float | int]:
    """Compare texts of the same prompts; a random model's near ties make some differ.

    Args:
        one: Texts by index.
        other: Texts by index, for at least the same indices.

    Returns:
        Prompts compared, equal texts, and the mean share of the common beginning.
    """
    shares = []
    for index, text in one.items():
        pairs = list(zip(text, other[index], strict=False))
        common = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
        longest = max(len(text), len(other[index]))
        shares.append(common / longest if longest else 1.0)
    equal = sum(text == other[index] for index, text in one.items())
    share = round(sum(shares) / max(1, len(shares)), 4)
    return {"compared": len(one), "equal": equal, "mean_common_share": share}


def numerics(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Run one micro-batch forwards and backwards with a known adapter, and compare backends.

    The first backend leaves its losses and gradients in the work folder; the second compares.
    """
    import torch

    from tinyagent_fast.training.trainer import collate

    loaded = bench.loaded(item["model"])
    fill_adapter(loaded.model)
    dataset = bench.rows()
    short, long = sorted((dataset[i] for i in range(8)), key=lambda row: row["length"])[::7]
    pad = loaded.tokenizer.pad_id
    _training_mode(loaded)
    release(bench.cuda)
    alone = [_loss(bench, loaded, collate([row], pad)) for row in (short, long)]
    weights = [sum(label != -100 for label in row["labels"]) for row in (short, long)]
    together = _loss(bench, loaded, collate([short, long], pad))
    expected = sum(a * w for a, w in zip(alone, weights, strict=True)) / sum(weights)
    figures: dict[str, Any] = {
        "loss": alone[1],
        "loss_of_a_padded_pair": together,
        "padded_pair_relative_difference": abs(together - expected) / expected,
    }
    bench.partial(figures)
    figures["masked_loss_relative_difference"] = _masked_loss_difference(
        bench, loaded, collate([short], pad), alone[0]
    )
    gradient = _gradient(bench, loaded, collate([long], pad))
    figures["gradient_norm"] = float(gradient.norm())
    kept = bench.work / "numerics.pt"
    figures["compared_with"] = None
    if kept.exists():
        figures |= _compare(torch.load(kept), loaded.backend, figures["loss"], gradient)
    else:
        torch.save({"backend": loaded.backend, "loss": figures["loss"], "gradient": gradient}, kept)
    loaded.model.zero_grad(set_to_none=True)
    return {**figures, **memory(bench)}


def fill_adapter(model: Any) -> None:
    """Give the adapter weights that depend on their names alone, none of them zero.

    Args:
        model: A model with its adapter.
    """
    import torch

    generator = torch.Generator().manual_seed(_ADAPTER_SEED)
    with torch.no_grad():
        for _, parameter in sorted(_adapter(model)):
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.copy_(values.to(parameter.dtype))


def _adapter(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _training_mode(loaded: Any) -> None:
    """Switch a model to training, which Unsloth's trainer leaves in inference mode."""
    if loaded.backend == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_training(loaded.model)
    loaded.model.train()


@contextmanager
def _precision(bench: Bench, loaded: Any) -> Iterator[None]:
    """Compute as the trainer does: in the compute precision where it is a short one."""
    import torch

    dtype = getattr(torch, loaded.compute_dtype)
    with torch.autocast("cuda", dtype, enabled=bench.cuda and dtype != torch.float32):
        yield


def _to_device(bench: Bench, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.to("cuda" if bench.cuda else "cpu") for k, v in batch.items()}


def _loss(bench: Bench, loaded: Any, batch: Mapping[str, Any]) -> float:
    import torch

    with torch.no_grad(), _precision(bench, loaded):
        return float(loaded.model(**_to_device(bench, batch), use_cache=False).loss)


def _masked_loss_difference(
    bench: Bench, loaded: Any, batch: Mapping[str, Any], loss: float
) -> float:
    """Compare the model's loss with the cross entropy of its logits at supervised tokens."""
    import torch

    inputs = _to_device(bench, batch)
    before = os.environ.get("UNSLOTH_RETURN_LOGITS")
    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
    try:
        with torch.no_grad(), _precision(bench, loaded):
            logits = loaded.model(**inputs, use_cache=False).logits
    finally:
        os.environ.pop("UNSLOTH_RETURN_LOGITS")
        if before is not None:
            os.environ["UNSLOTH_RETURN_LOGITS"] = before
    supervised = inputs["labels"][:, 1:] != -100
    own = torch.nn.functional.cross_entropy(
        logits[:, :-1][supervised].float(), inputs["labels"][:, 1:][supervised]
    )
    return abs(float(own) - loss) / loss


def _gradient(bench: Bench, loaded: Any, batch: Mapping[str, Any]) -> Any:
    """Give the adapter's gradient of one row as one vector."""
    import torch

    loaded.model.zero_grad(set_to_none=True)
    with _precision(bench, loaded):
        loss = loaded.model(**_to_device(bench, batch), use_cache=False).loss
    loss.backward()
    return torch.cat([p.grad.float().cpu().flatten() for _, p in sorted(_adapter(loaded.model))])


def _compare(kept: Mapping[str, Any], backend: str, loss: float, gradient: Any) -> dict[str, Any]:
    import torch

    other, gradient = kept["gradient"].double(), gradient.double()
    cosine = torch.nn.functional.cosine_similarity(other, gradient, dim=0)
    return {
        "compared_with": f"{backend} against {kept['backend']}",
        "loss_relative_difference": abs(loss - kept["loss"]) / loss,
        "gradient_cosine": float(cosine),
        "gradient_norm_ratio": float(other.norm() / gradient.norm()),
    }


def memorise(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Let the adapter learn a few plans by heart and write them again, singly and together.

    What it writes again shows labels, stop string, prefix and batching at once on the card; how far
    a random base gets in so few steps is told by the loss.
    """
    from tinyagent_fast.inference.decoding import generating
    from tinyagent_fast.prompts.rows import encode_examples
    from tinyagent_fast.prompts.templates import render

    loaded = bench.loaded(item["model"])
    scale, tokenizer = bench.scale, loaded.tokenizer
    examples = generated_examples(scale.memorised_rows, "short", "memorise")
    path = bench.work / "memorised"
    rows = encode_examples(examples, tokenizer, path, max_length_tokens=4096).dataset()
    count = len(rows)
    train = replace(
        bench.config.train,
        batch=count,
        accumulation=1,
        learning_rate=2e-3,
        schedule="constant",
        batching="shuffled",
        shared_prefix="off",
    )
    steps = Steps(warmup=0, most=scale.memorise_steps, most_s=scale.memorise_s)
    training = measure_training(bench, loaded, rows, train, steps)
    figures = {
        "steps": training["measured_steps"],
        "loss_first": (training["losses"] or [None])[0],
        "loss_last": (training["losses"] or [None])[-1],
        "train_s": round(sum(training["step_s"]), 2),
    }
    bench.partial(figures)
    rendered = [render(example, "alpaca") for example in examples]
    prompts = tokenizer.encode_prompts([r.prompt for r in rendered])
    wanted = {i: r.completion.removesuffix(END_OF_PLAN) for i, r in enumerate(rendered)}
    longest = max(row["length"] for row in rows) - min(map(len, prompts)) + 8
    with generating(loaded.model, loaded.backend):
        together = _complete(loaded, prompts, count, longest)
        single = _complete(loaded, prompts[: scale.single_prompts], 1, longest)
    figures["reproduced_of"] = count
    figures["reproduced"] = sum(together[i] == text for i, text in wanted.items())
    figures["batch_against_single"] = same_prefixes(single, together)
    return figures


def gpu_tests(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Run the project's tests that need a CUDA device."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "--no-header"]
    done = subprocess.run(
        [*command, *bench.scale.test_paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=item["limit_s"],
        check=False,
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    figures = {"exit_code": done.returncode, **pytest_counts(lines), "last_lines": lines[-15:]}
    if done.returncode not in (0, 5):  # 5: no test is marked so
        bench.partial(figures)
        raise RuntimeError(f"pytest ended with {done.returncode}: {lines[-1] if lines else ''}")
    return figures


def pytest_counts(lines: Sequence[str]) -> dict[str, int]:
    """Read the numbers out of pytest's summary line.

    Args:
        lines: Its output.

    Returns:
        Counts by outcome; empty if there is no such line.
    """
    outcomes = "passed|failed|skipped|deselected|error|xfailed"
    for line in reversed(lines):
        found = re.findall(rf"(\d+) ({outcomes})", line)
        if found:
            return {name: int(number) for number, name in found}
    return {}


PARTS: Mapping[str, Part] = {
    "generate": generate,
    "numerics": numerics,
    "memorise": memorise,
    "gpu_tests": gpu_tests,
}
"""Every function by the kind that a measurement names."""
