"""What devices can do: GPUs by name, as their vendors' data sheets say, and the CPU at hand, as measured."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from fdkit.errors import ConfigError, did_you_mean


class Gpu(NamedTuple):
    """One device."""

    name: str
    bf16_flops: float
    """Operations a second of dense bfloat16 matrix products accumulated in float32, without sparsity."""
    fp32_flops: float
    """The same outside the tensor cores, in float32."""
    memory_bytes: float
    bandwidth: float
    """Bytes a second to and from its memory."""
    source: str

    def peak(self, precision: str) -> float:
        """Operations a second in "bf16" or "fp32"."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops


def _gpu(name: str, bf16: float, fp32: float, gigabytes: float, terabytes: float, source: str) -> Gpu:
    return Gpu(name, bf16 * 1e12, fp32 * 1e12, gigabytes * 1e9, terabytes * 1e12, source)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("b200", 2250, 75, 180, 7.7, "NVIDIA HGX B200 data sheet (half of the sparse figure)"),
        _gpu("h200", 989, 67, 141, 4.8, "NVIDIA H200 data sheet, SXM (half of the sparse figure)"),
        _gpu("h100", 989, 67, 80, 3.35, "NVIDIA H100 data sheet, SXM (half of the sparse figure)"),
        _gpu("h100-pcie", 756, 51, 80, 2.0, "NVIDIA H100 data sheet, PCIe (half of the sparse figure)"),
        _gpu("a100", 312, 19.5, 80, 2.039, "NVIDIA A100 data sheet, 80 GB SXM"),
        _gpu("a100-40gb", 312, 19.5, 40, 1.555, "NVIDIA A100 data sheet, 40 GB"),
        _gpu("l40s", 362, 91.6, 48, 0.864, "NVIDIA L40S data sheet"),
        _gpu("l4", 121, 30.3, 24, 0.3, "NVIDIA L4 data sheet (half of the sparse figure)"),
        _gpu("a10", 125, 31.2, 24, 0.6, "NVIDIA A10 data sheet"),
        _gpu("rtx4090", 165.2, 82.6, 24, 1.008, "NVIDIA Ada architecture paper, appendix A"),
        _gpu("rtx3090", 71, 35.6, 24, 0.936, "NVIDIA Ampere GA102 architecture paper, appendix A"),
    )
}
"""Devices by the name that --gpu takes; a gigabyte is 10^9 bytes."""
_REPORTED = {
    "B200": "b200",
    "H200": "h200",
    "H100 PCIe": "h100-pcie",
    "H100": "h100",
    "A100-SXM4-40GB": "a100-40gb",
    "A100-PCIE-40GB": "a100-40gb",
    "A100": "a100",
    "L40S": "l40s",
    "L4": "l4",
    "A10": "a10",
    "RTX 4090": "rtx4090",
    "RTX 3090": "rtx3090",
}
"""Part of what a driver calls a device -> its name here, the longer ones before what they hold."""


def find_gpu(name: str) -> Gpu:
    """The device of a name. Raises ConfigError naming those known."""
    if name not in GPUS:
        hint = did_you_mean(name, GPUS) or f"known: {', '.join(GPUS)}"
        raise ConfigError(f"gpu {name}: not among the devices whose data sheets are known", hint)
    return GPUS[name]


def reported_gpu(reported: str) -> Gpu | None:
    """The device that a driver calls so, such as "NVIDIA H200"; None for one that is not known."""
    words = reported.split()
    for part, name in _REPORTED.items():
        if part in reported if " " in part or "-" in part else part in words:
            return GPUS[name]
        if part == words[-1].partition("-")[0]:  # "NVIDIA A100-SXM4-80GB"
            return GPUS[name]
    return None


class DeviceRates(NamedTuple):
    """What a device does, as measured just now."""

    matmul_flops: float
    """Operations a second of large matrix products."""
    bandwidth: float
    """Bytes a second read and written by an addition to a large tensor."""


def measure_device(
    device: torch.device,
    precision: str,
    *,
    size: int = 1024,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> DeviceRates:
    """The rates of "bf16" or "fp32", of a CPU with the threads PyTorch has now: medians, in a second or two.

    clock: time.process_time on a machine that is shared, with one thread.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.full((size, size), 0.01, dtype=dtype, device=device) for _ in range(2))
    numbers = torch.zeros(1 << 24, device=device)
    sums = torch.zeros_like(numbers)  # made before: the first touch of new memory is another cost
    products = _median_seconds(lambda: left @ right, device, repeats, clock)
    additions = _median_seconds(lambda: torch.add(numbers, 1.0, out=sums), device, repeats, clock)
    return DeviceRates(2 * size**3 / products, 2 * numbers.numel() * numbers.element_size() / additions)


def _median_seconds(
    function: Callable[[], object], device: torch.device, repeats: int, clock: Callable[[], float]
) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = clock()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(clock() - start)
    return sorted(seconds[1:])[repeats // 2]  # the first one loads libraries
