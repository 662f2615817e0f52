"""Published measurements that the scaling model is fitted on and held to.

llm-foundry: the tables "H100 80GB BF16" and "H100 80GB BF16 (Large Scale, >= 128 GPUs)" of mosaicml/llm-foundry,
scripts/train/benchmarking/README.md at commit c90b9b312c64: every row of 2,048 tokens and a model of 1b and more.
FULL_SHARD is stage 3; SHARD_GRAD_OP, with accumulation 1, is stage 2. Composer's mixed precision DEFAULT gathers
weights in bf16 and reduces gradients in fp32. Layers and hidden sizes are those of its MPT configurations.

torchtitan: pytorch/torchtitan, docs/performance.md, tables of Llama 3.1 8B on Grand Teton: FSDP, local batch 2, 8,192
tokens, H100 with 2.4 TB/s and 96 GB held to 500 W.
"""

import dataclasses
from dataclasses import dataclass

from fastft.plan.model import HARDWARE, Setup, Shape

MPT = {
    "1b": Shape(1_315_950_592, 24, 2048),
    "3b": Shape(2_651_837_440, 32, 2560),
    "7b": Shape(6_658_859_008, 32, 4096),
    "13b": Shape(12_853_954_560, 40, 5120),
    "30b": Shape(29_975_214_080, 48, 7168),
    "70b": Shape(64_862_437_376, 80, 8192),
}  # fmt: skip

# model, GPUs, micro batch, accumulation, ZeRO stage, activation checkpointing, tokens/s/GPU
LLM_FOUNDRY = (
    ("1b", 8, 14, 1, 3, False, 45455), ("1b", 16, 20, 1, 3, False, 46037), ("1b", 32, 20, 1, 3, False, 45130),
    ("1b", 64, 20, 1, 3, False, 44402),
    ("1b", 128, 12, 1, 2, False, 44123), ("1b", 256, 12, 1, 2, False, 42555), ("1b", 512, 12, 1, 2, False, 39837),
    ("3b", 16, 10, 3, 3, False, 24142), ("3b", 32, 6, 3, 3, False, 23021), ("3b", 64, 6, 3, 3, False, 22525),
    ("3b", 128, 8, 1, 2, False, 23422), ("3b", 256, 8, 1, 2, False, 22772), ("3b", 512, 8, 1, 2, False, 21664),
    ("7b", 8, 6, 1, 3, False, 10643),
    ("7b", 128, 6, 1, 3, False, 10475), ("7b", 256, 6, 1, 3, False, 10119), ("7b", 512, 6, 1, 3, False, 9670),
    ("13b", 8, 2, 1, 3, False, 4792), ("13b", 16, 2, 1, 3, False, 4767), ("13b", 32, 2, 1, 3, False, 4811),
    ("13b", 64, 2, 1, 3, False, 4800),
    ("13b", 128, 16, 1, 3, True, 5080), ("13b", 256, 16, 1, 3, True, 4989), ("13b", 512, 16, 1, 3, True, 4952),
    ("30b", 8, 3, 21, 3, True, 2002), ("30b", 16, 10, 3, 3, True, 2263), ("30b", 32, 14, 3, 3, True, 2308),
    ("30b", 128, 8, 1, 3, True, 2199), ("30b", 256, 8, 1, 3, True, 2148), ("30b", 512, 8, 1, 3, True, 2115),
    ("70b", 32, 2, 16, 3, True, 882), ("70b", 64, 8, 4, 3, True, 1039),
    ("70b", 128, 8, 1, 3, True, 1058), ("70b", 256, 8, 1, 3, True, 1035), ("70b", 512, 8, 1, 3, True, 1007),
)  # fmt: skip

# variant -> tokens/s/GPU on 8 and on 128 GPUs
TORCHTITAN = {"eager": (5762, 5605), "compiled": (6667, 6514)}


@dataclass(frozen=True)
class Point:
    """A measurement: tokens per second and GPU of a setup."""

    name: str
    setup: Setup
    tokens_per_second: float


def llm_foundry() -> list[Point]:
    return [
        Point(
            name,
            Setup(MPT[name], HARDWARE["h100"], gpus, zero, micro_batch, 2048, accumulation, recompute, reduce_bytes=4),
            measured,
        )
        for name, gpus, micro_batch, accumulation, zero, recompute, measured in LLM_FOUNDRY
    ]


def torchtitan_setup(world_size: int) -> Setup:
    hardware = dataclasses.replace(HARDWARE["h100"], hbm_bandwidth=2.4e12, memory=96e9)
    return Setup(Shape(8_030_261_248, 32, 4096), hardware, world_size, 3, 2, 8192, reduce_bytes=4)
