"""How fast a shape generates and trains, beside what the device could do."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.schema import OptimConfig
from nemo_aligner.data.supervised import Example
from nemo_aligner.engine.interfaces import GenerationRequest
from nemo_aligner.engine.policy import MegatronPolicy
from nemo_aligner.engine.processes.cluster import MegatronCluster
from nemo_aligner.stages.batches import microbatches
from nemo_aligner.stages.reinforce.loop import reinforce_objective
from nemo_aligner.stages.supervised.loop import sft_objective
from scripts.gpu_check import models
from scripts.gpu_check.report import Report

OPTIM = OptimConfig(name="distributed_fused_adam", lr=1e-6)

PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Of dense bf16 products, from the vendor's data sheets, by a part of the device's name; the first that fits counts."""


@dataclass(frozen=True)
class Sizes:
    """How much work there is."""

    slots: int = 256  # responses at once
    samples: int = 16  # of each prompt
    prompt: int = 128  # tokens
    response: int = 128
    packed: tuple[int, ...] = (2048, 1024, 512, 512)  # lengths of the rows of one micro-batch
    steps: int = 4  # micro-batches of an optimizer step
    buffer: int = 2**30  # bytes copied to find the bandwidth
    side: int = 8192  # of the matrices multiplied to find the speed of products


TINY = Sizes(4, 2, 8, 6, (16, 8, 8), 2, 2**20, 64)


@dataclass(frozen=True)
class Device:
    """What a step is measured against."""

    device: torch.device
    bandwidth: float  # bytes/s
    flops: float  # of bf16 products, /s

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        self.wait()
        begin = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - begin


def known(device: torch.device, sizes: Sizes, report: Report) -> Device:
    """Bandwidth by a copy; products by the data sheet, or by a product where the device is in none."""
    bare = Device(device, 0.0, 0.0)
    source = torch.ones(sizes.buffer, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = min(bare.seconds(lambda: target.copy_(source)) for _ in range(5))
    bandwidth = 2 * sizes.buffer / copying
    report.add("device", "memory bandwidth", bandwidth / 1e9, "GB/s", "a copy, read and written")
    square = torch.ones(sizes.side, sizes.side, dtype=torch.bfloat16, device=device)
    multiplying = min(bare.seconds(lambda: square @ square) for _ in range(5))
    measured = 2 * sizes.side**3 / multiplying
    report.add("device", "bf16 products", measured / 1e12, "TFLOP/s", f"of {sizes.side}×{sizes.side} matrices")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    flops = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
    if flops is None:
        report.add("device", "peak of MFU", measured / 1e12, "TFLOP/s", f"measured: {name} is in no table here")
    else:
        report.add("device", "peak of MFU", flops / 1e12, "TFLOP/s", f"data sheet of {name}")
    return Device(device, bandwidth, flops or measured)


@contextmanager
def memory(device: Device, report: Report, shape: str, name: str) -> Iterator[None]:
    """Report the peak of what is allocated in the block; afterwards nothing of it is left."""
    if device.device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    try:
        yield
        report.add(shape, f"{name}: peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    except torch.cuda.OutOfMemoryError as fault:
        report.add(shape, name, None, "", f"out of memory: {str(fault).splitlines()[0]}")
    gc.collect()
    torch.cuda.empty_cache()


@dataclass(frozen=True)
class Task:
    """What every measurement takes."""

    shape: str
    arch: Architecture
    cluster: MegatronCluster
    device: Device
    sizes: Sizes
    report: Report

    def add(self, name: str, value: float | None, unit: str, note: str = "") -> None:
        self.report.add(self.shape, name, value, unit, note)


def generation(task: Task) -> None:
    """Against the bandwidth bound, and against transformers."""
    beside_transformers(task, decoding(task))


def decoding(task: Task) -> float:
    """Of all slots at once, in tokens/s."""
    arch, device, sizes = task.arch, task.device, task.sizes
    policy = models.random_model(MegatronPolicy, arch, torch.bfloat16, task.cluster)

    def run(tokens: int) -> None:
        sampling = SamplingParams(min_tokens=tokens, max_tokens=tokens)
        drawn = policy.generate(requests(arch, sizes), sampling, sizes.slots)
        assert sum(len(response.tokens) for response in drawn) == sizes.slots * tokens

    few = max(2, sizes.response // 8)
    run(few)  # warms up
    short, long = device.seconds(lambda: run(few)), device.seconds(lambda: run(sizes.response))
    step = (long - short) / (sizes.response - few)
    task.add(f"generation, {sizes.slots} slots", sizes.slots * sizes.response / long, "tokens/s", "with prefill")
    task.add(f"decode step, {sizes.slots} slots", 1e3 * step, "ms")
    positions = sizes.prompt + (few + sizes.response) / 2
    cached = sizes.slots * positions * 4 * arch.num_layers * arch.query_groups * arch.head_dim  # bf16 keys and values
    bound = (2 * models.product_parameters(arch) + cached) / device.bandwidth
    task.add("decode step, part of the bandwidth bound", bound / step, "", f"the bound is {1e3 * bound:.2f} ms")
    return sizes.slots * sizes.response / long


def requests(arch: Architecture, sizes: Sizes) -> list[GenerationRequest]:
    prompts = models.random_rows(sizes.slots // sizes.samples, sizes.prompt, arch)
    return [GenerationRequest(p, s, tuple(prompt)) for p, prompt in enumerate(prompts) for s in range(sizes.samples)]


def beside_transformers(task: Task, ours: float) -> None:
    arch, device, sizes = task.arch, task.device, task.sizes
    model = models.peer(arch, device.device)
    if model is None:
        task.add("generation over transformers", None, "", "transformers cannot be imported here")
        return
    ids = torch.tensor([request.prompt_tokens for request in requests(arch, sizes)], device=device.device)

    def run(tokens: int) -> None:
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=0)

    run(2)
    theirs = sizes.slots * sizes.response / device.seconds(lambda: run(sizes.response))
    task.add("generation over transformers", ours / theirs, "", f"transformers: {theirs:.0f} tokens/s")


def sft(task: Task) -> None:
    """Optimizer steps over packed rows."""
    arch, device, sizes = task.arch, task.device, task.sizes
    policy = models.random_model(MegatronPolicy, arch, torch.bfloat16, task.cluster)
    policy.add_optimizer(OPTIM, clip_grad=1.0, max_steps=10)
    lengths = sizes.packed * sizes.steps
    rows = [models.random_rows(1, length, arch, seed)[0] for seed, length in enumerate(lengths)]
    examples = [Example((row,), ([0] + [1] * (len(row) - 1),)) for row in rows]
    how = {"size": len(sizes.packed), "budget": sum(sizes.packed), "dp_rank": 0, "dp_size": 1, "pad_id": 0}
    batches = microbatches(examples, range(len(examples)), **how)
    seconds = [device.seconds(lambda: policy.train_step(batches, sft_objective)) for _ in range(4)]
    task.add(f"SFT, {sum(sizes.packed)} tokens packed", sum(lengths) / min(seconds[1:]), "tokens/s")
    used = models.training_flops(arch, [(0, length) for length in lengths]) / min(seconds[1:]) / device.flops
    task.add("SFT, model-FLOP utilisation", 100 * used, "%")


def reinforce(task: Task) -> None:
    """A step: responses, log-probabilities under the initial policy, the update."""
    arch, device, sizes = task.arch, task.device, task.sizes
    policy = models.random_model(MegatronPolicy, arch, torch.bfloat16, task.cluster)
    policy.keep_initial_weights()
    policy.add_optimizer(OPTIM, clip_grad=1.0, max_steps=10)
    sampling = SamplingParams(min_tokens=sizes.response, max_tokens=sizes.response)
    asked = requests(arch, sizes)

    def step() -> list[float]:
        drawn = []
        parts = [device.seconds(lambda: drawn.extend(policy.generate(asked, sampling, sizes.slots)))]
        drawn.sort(key=lambda response: (response.prompt_index, response.sample_index))
        rows = [[*request.prompt_tokens, *response.tokens] for request, response in zip(asked, drawn, strict=True)]
        starts = [sizes.prompt] * len(rows)
        parts.append(device.seconds(lambda: policy.initial_logprobs(rows, sizes.samples, starts)))
        examples = [
            Example((row,), ([0] * sizes.prompt + [1] * sizes.response,), 1.0 - 2.0 * (i % 2))
            for i, row in enumerate(rows)
        ]
        batches = microbatches(examples, range(len(rows)), size=sizes.samples, dp_rank=0, dp_size=1, pad_id=0)
        parts.append(device.seconds(lambda: policy.train_step(batches, reinforce_objective)))
        return parts

    step()  # warms up
    parts = step()
    task.add("REINFORCE", len(asked) / sum(parts), "rollouts/s", f"{sizes.samples} to a prompt")
    for name, part in zip(("responses", "initial log-probabilities", "update"), parts, strict=True):
        task.add(f"REINFORCE, {name}", part, "s")
    responses = [(sizes.prompt, sizes.response)] * sizes.samples
    once = [(0, sizes.prompt), *responses] * (len(asked) // sizes.samples)  # a prompt is computed once
    used = models.training_flops(arch, once) / parts[2] / device.flops
    task.add("REINFORCE, update, model-FLOP utilisation", 100 * used, "%", "prompts counted once")
