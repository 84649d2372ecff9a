"""Figures of devices from their vendor's datasheets, and assumptions about their use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from draftopd.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """A GPU.

    Args:
        tflops: dense bfloat16 tensor-core peak, 1e12 operations per second; ``float32``: float32 peak without TF32,
            torch's default.
        bandwidth: of its memory, 1e9 bytes per second; ``memory`` in 1e9 bytes.
        link: to other GPUs, one way, 1e9 bytes per second.
    """

    tflops: float
    float32: float
    bandwidth: float
    memory: float
    link: float


#: From NVIDIA's datasheet of each product: dense rates are half of those "with sparsity", one-way links half of the
#: total. If a datasheet gives no float32 rate, it is that of the CUDA cores.
DEVICES = {
    # "NVIDIA H100 Tensor Core GPU" datasheet: SXM, and PCIe (with PCIe 5.0 x16 alone).
    "H100": Device(989, 67, 3350, 80, 450),
    "H100-PCIe": Device(756, 51, 2000, 80, 64),
    # "NVIDIA H200 Tensor Core GPU" datasheet: SXM.
    "H200": Device(989, 67, 4800, 141, 450),
    # "NVIDIA DGX B200" datasheet, one eighth of the system.
    "B200": Device(2250, 75, 8000, 180, 900),
    # "NVIDIA A100 Tensor Core GPU" datasheet: SXM of 80 GB, and of 40 GB.
    "A100": Device(312, 19.5, 2039, 80, 300),
    "A100-40GB": Device(312, 19.5, 1555, 40, 300),
    # "NVIDIA L40S", "NVIDIA L4" and "NVIDIA A10" datasheets: PCIe 4.0 x16.
    "L40S": Device(362, 91.6, 864, 48, 32),
    "L4": Device(121, 30.3, 300, 24, 32),
    "A10": Device(125, 31.2, 600, 24, 32),
    # "NVIDIA Ada GPU architecture" whitepaper; rates with float32 accumulation.
    "RTX4090": Device(165.2, 82.6, 1008, 24, 32),
}

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of a plan; every field can be set as ``plan.NAME=VALUE``.

    Args:
        gpu: a name of :data:`DEVICES`.
        devices: number on a machine if the trainer takes all it finds (``trainer.devices=auto``).
        tflops, float32_tflops, bandwidth, memory, link: replace the GPU's (see :class:`Device`).
        utilisation: fraction of the arithmetic peak that large multiplications reach.
        bandwidth_utilisation: fraction of the memory's and the links' bandwidth.
        headroom: fraction of the memory left for CUDA's context, libraries and fragmentation.
        launch_ms: milliseconds of the host for the operations of one layer, unless compiled.
        tau: tokens per verification.
        prompt_tokens, response_tokens: per text; None: the limits, so that the plan is an upper bound.
    """

    gpu: str = "H100"
    devices: Annotated[int, Field(ge=1)] = 8
    tflops: Positive | None = None
    float32_tflops: Positive | None = None
    bandwidth: Positive | None = None
    memory: Positive | None = None
    link: Positive | None = None
    utilisation: Fraction = 0.4
    bandwidth_utilisation: Fraction = 0.6
    headroom: Annotated[float, Field(ge=0, lt=1)] = 0.1
    launch_ms: Annotated[float, Field(ge=0)] = 0.4
    tau: Annotated[float, Field(ge=1)] = 4.0
    prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    response_tokens: Annotated[int, Field(ge=2)] | None = None

    @property
    def device(self) -> Device:
        """The GPU, with the replaced figures.

        Raises:
            ConfigError: for a name that is not in :data:`DEVICES`.
        """
        if self.gpu not in DEVICES:
            raise ConfigError(
                f"plan.gpu={self.gpu} is not one of {', '.join(DEVICES)}: choose one, and replace figures with "
                "plan.tflops, plan.float32_tflops, plan.bandwidth, plan.memory and plan.link."
            )
        given: dict[str, Any] = {
            "tflops": self.tflops, "float32": self.float32_tflops, "bandwidth": self.bandwidth,
            "memory": self.memory, "link": self.link,
        }  # fmt: skip
        return replace(DEVICES[self.gpu], **{name: value for name, value in given.items() if value is not None})
