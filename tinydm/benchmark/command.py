"""Measure how fast networks run on this machine, in full precision, simulated and on integers:

    tinydm benchmark                                            all of it: an hour or more
    tinydm benchmark networks=[cifar10-compact] batches=[1]     about two minutes
    tinydm benchmark networks=[] out=DIR                        tables and charts of what DIR holds

All variants of a network run in turn in one process, a slice of each in every round; what counts is
the median over rounds of (seconds of fp32 eager NCHW) / (seconds of the variant). Rounds in which
other processes took more than 6 % of the machine are dropped: leave it alone meanwhile. Weights are
random; the scales are those of the method minmax, fitted to noise. The process keeps the memory
that tensors free, as sampling does, which the baseline gains from too. A variant that cannot run
here is told with its reason.

Variants: fp32 (the baseline), channels_last, bf16 and on GPUs fp16 (full precision); published
(simulated as in published code); simulated, integer, compiled (ours: simulated, on integers, on
integers with compiled glue); on processors onnxruntime and openvino, full precision and quantized,
where they are installed.

OUT/benchmark.jsonl has a line for each network and batch, benchmark.md the tables,
benchmark-speed.png and benchmark-size.png the charts. Lines of other machines and of other
instruction sets (ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 tinydm benchmark ...) stay, also
those that were put there from elsewhere; measured again, a line takes the place of its former."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from base.config import load
from base.devices import resolve_device, reuse_memory
from base.errors import unknown_word
from base.files import read_lines, write_lines, write_text
from tinydm.benchmark import harness, variants
from tinydm.benchmark.charts import draw_sizes, draw_speed
from tinydm.benchmark.machine import machine
from tinydm.benchmark.networks import Network
from tinydm.benchmark.report import Row, markdown, told
from tinydm.names import find_yaml

NETWORKS = "cifar10", "cifar10-compact", "latent-compact", "bedroom"
log = logging.getLogger("tinydm").info


@dataclass
class BenchmarkConfig:
    """What is measured, and for how long."""

    networks: list[str] = field(default_factory=lambda: [*NETWORKS])  # names of configs/model
    batches: list[int] = field(default_factory=lambda: [1, 8, 32])  # images at a time
    # names of configs/bits; of those after the first our own variants alone
    bits: list[str] = field(default_factory=lambda: ["w4a8", "w8a8"])
    only: list[str] = field(default_factory=list)  # variants, by their words; [] = all
    steps: int = 0  # > 0: also whole sampling runs, of so many DDIM steps
    rounds: int = 30  # clean rounds of each network and batch
    seconds: float = 120.0  # for these; then 3 clean rounds are enough
    threads: int = 2  # of the processor
    device: str = "auto"  # auto | cpu | cuda[:N]
    out: str = "runs/benchmark"  # folder of the results


def run(words: list[str]) -> None:
    config = load(BenchmarkConfig, [], words)
    check(config)
    folder = Path(config.out)
    rows = [Row(**line) for line in read_lines(folder / "benchmark.jsonl")]
    for row in measure(config):
        log(told(row))
        former = [other for other in rows if other.place == row.place]
        if row.clean or not former:  # a busy machine takes no result away
            rows = [other for other in rows if other not in former] + [row]
        write_lines(folder / "benchmark.jsonl", map(asdict, rows))
    if not rows:
        raise ValueError(f"{folder}/benchmark.jsonl holds no results and networks is empty")
    write_text(folder / "benchmark.md", markdown(rows))
    draw_sizes(rows, folder / "benchmark-size.png")
    draw_speed(rows, folder / "benchmark-speed.png")
    log(f"benchmark: tables and charts are in {folder}")


def check(config: BenchmarkConfig) -> None:
    """Raises ValueError for what types alone do not catch, before any work begins."""
    for key in ("rounds", "seconds", "threads"):
        if getattr(config, key) <= 0:
            raise ValueError(f"{key} is {getattr(config, key)}; it must be above 0")
    if config.steps < 0 or min(config.batches, default=0) < 1 or not config.bits:
        raise ValueError("batches are 1 or more, steps 0 or more, and bits names one at least")
    for word in config.only:
        if word not in variants.TITLES:
            raise ValueError(unknown_word(f"variant '{word}' is unknown", word, variants.TITLES))
    for kind, names in (("model", config.networks), ("bits", config.bits)):
        for name in names:
            find_yaml(name, [kind])
    resolve_device(config.device)


def measure(config: BenchmarkConfig) -> Iterator[Row]:
    """The rows of every network and batch: forward passes, then whole sampling runs if any."""
    device = resolve_device(config.device)
    keys = variants.keys_of(config.bits, device, config.only)
    reuse_memory()
    with torch.no_grad(), timed_arithmetic(config.threads):
        facts = machine(device, config.threads)
        for name in config.networks:
            network = Network(name, device)
            sizes = network.bytes()
            for batch in config.batches:
                case = variants.Case(network, network.arguments(batch), config.threads)
                for steps in (0, config.steps)[: 1 + (config.steps > 0)]:
                    log(f"benchmark: {network.name}, batch {batch}, {steps or 'no'} steps")
                    timing = _timing(config, case, keys, steps)
                    place = {"network": network.name, "batch": batch, "steps": steps}
                    yield Row(
                        **place,
                        machine=facts,
                        bytes=sizes,
                        rounds=len(timing.others),
                        clean=timing.num_clean,
                        watched=None not in timing.others,
                        seconds=timing.clean(),
                        failed=timing.failed,
                    )


def _timing(config, case, keys, steps):
    calls, refused = {}, {}
    for key in keys:
        if steps and key.split(" ")[0] not in variants.SAMPLED:
            continue
        try:
            if steps:
                calls[key] = variants.sampling_call(key, case, steps)
            else:
                calls[key] = variants.forward_call(key, case)
        except (
            Exception
        ) as error:  # of whatever it is made by: the others are measured all the same
            refused[key] = harness.one_line(error)
    on_gpu = case.device.type == "cuda"
    how = {"finish": torch.cuda.synchronize} if on_gpu else {}
    if not on_gpu:  # whose time does not depend on what else the processors do
        how["busy_elsewhere"] = harness.busy_elsewhere
    timing = harness.measure(calls, rounds=config.rounds, budget=config.seconds, **how)
    timing.failed = refused | timing.failed
    return timing


@contextmanager
def timed_arithmetic(threads: int) -> Iterator[None]:
    """While inside, GPUs compute float32 as float32 by the kernels that are fastest there, and the
    processor computes with `threads` threads."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    before = cudnn.allow_tf32, cudnn.benchmark, cuda.matmul.allow_tf32, torch.get_num_threads()
    try:
        cudnn.allow_tf32, cudnn.benchmark, cuda.matmul.allow_tf32 = False, True, False
        torch.set_num_threads(threads)
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark, cuda.matmul.allow_tf32 = before[:3]
        torch.set_num_threads(before[3])
