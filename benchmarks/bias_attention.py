"""The cost of one attention with a learned bias, forward and backward, by each way that the device at hand can take.

All ways see the same operands and must agree with the plain one before anything is timed. They take turns in one
process; CPU-seconds at one thread, or CUDA events, and medians are compared. "detached" computes no bias gradient: no
way that does can be expected below it. On CUDA the goals are fused <= 1.25x detached and >= 2.5x plain.

    python benchmarks/bias_attention.py --output benchmarks/results/bias_attention_cpu.json
    python benchmarks/bias_attention.py --device cuda --output benchmarks/results/bias_attention_gpu.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from distill_step import PRECISIONS, environment
from torch import Tensor

from fdkit.models.attention import attention_path, bias_attention, sdpa_backend
from fdkit.models.bias_gradient import pad_bias

SHAPES = {"cpu": (4, 12, 197, 64), "cuda": (256, 12, 197, 64)}
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
WARMUPS = 3

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """As it is usually first written: scores and softmax in the bias's float32."""
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    return (scores + bias).softmax(-1).to(value.dtype) @ value


def detached(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's fused kernel, with a bias that does not learn."""
    mask = pad_bias(bias.detach(), query.dtype)[None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def flexible() -> Attention:
    """FlexAttention, compiled, with the bias read by its score function; CUDA alone has its backward."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        def add(score: Tensor, _: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return score + bias[head, row, column]

        out: Tensor = compiled(query, key, value, score_mod=add)
        return out

    return attend


def ways(device: torch.device) -> dict[str, Attention]:
    """All that the device can take."""

    def chosen(wanted: Any) -> Attention:
        return lambda *operands: bias_attention(*operands, wanted=wanted)

    common = {name: chosen(name) for name in ("sdpa", "matmul", "matmul_fp32")}
    common |= {"plain": plain, "detached": detached}
    if device.type == "cuda":
        common |= {"fused": chosen("fused"), "flex": flexible()}
    return common


def gradients(attend: Attention, packed: Tensor, bias: Tensor, weight: Tensor) -> list[Tensor]:
    """Output and gradients of packed (B, N, 3, H, D) and bias (H, N, N); without the last if the bias gets none."""
    packed, bias = packed.detach().requires_grad_(), bias.detach().requires_grad_()
    out = attend(*packed.permute(2, 0, 3, 1, 4).unbind(0), bias)
    out.backward(weight)
    return [part for part in (out.detach(), packed.grad, bias.grad) if part is not None]


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call: CPU time, or device time on CUDA."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.process_time()
    run()
    return time.process_time() - begin


def compare(precision: str, shape: tuple[int, ...], device: torch.device, *, repeats: int) -> dict[str, Any]:
    """Median seconds of every way, and the ratios within turns to the plain and the detached one."""
    batch_size, num_heads, num_tokens, width = shape
    generator = torch.Generator().manual_seed(0)
    dtype = PRECISIONS[precision]
    packed = torch.randn(batch_size, num_tokens, 3, num_heads, width, generator=generator).to(device, dtype)
    bias = torch.randn(num_heads, num_tokens, num_tokens, generator=generator).to(device)
    weight = torch.randn(batch_size, num_heads, num_tokens, width, generator=generator).to(device, dtype)
    sides = ways(device)
    expected = gradients(plain, packed, bias, weight)
    for name, attend in sides.items():
        for found, reference in zip(
            gradients(attend, packed, bias, weight), expected, strict=name != "detached"
        ):
            error = float((found.double() - reference.double()).norm() / reference.double().norm())
            assert error <= TOLERANCE[precision], f"{name} is off by {error}"
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(WARMUPS + repeats):
        for name in sorted(sides, reverse=turn % 2 == 1):
            run = sides[name]
            elapsed = timed(lambda run=run: gradients(run, packed, bias, weight), device)
            if turn >= WARMUPS:
                seconds[name].append(elapsed)
    return {
        "precision": precision,
        "shape": shape,
        "default": attention_path(device, dtype, head_width=width),
        "sdpa_kernel": sdpa_backend(device, dtype, num_tokens=num_tokens, head_width=width),
        "seconds": seconds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "speedup_over_plain": {name: within_turns(seconds["plain"], seconds[name]) for name in sides},
        "times_detached": {name: within_turns(seconds[name], seconds["detached"]) for name in sides},
    }


def within_turns(above: list[float], below: list[float]) -> float:
    """Median of the ratios of the same turn."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--shape", type=int, nargs=4, metavar=("B", "H", "N", "D"))
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape = tuple(args.shape or SHAPES[args.device.type])
    results = [compare(one, shape, args.device, repeats=args.repeats) for one in args.precision]
    document = json.dumps({"environment": environment(args.device), "results": results}, indent=2)
    if args.output:
        args.output.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
