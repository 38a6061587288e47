"""Public figures of well-known devices, each with its source: for planning on hardware that is not here.

Datasheet peaks. A large float32 product reaches 70 to 95 % of them, much the same share on each, so plans between
devices compare fairly and absolute seconds are optimistic. Memory is counted in decimal GB, which leaves about
7 % for the driver's context and the allocator. Link figures are one direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Preset:
    """One kind of device. ``flops``: float32; ``half_flops``: 16-bit, dense (0: no faster). ``fabric``: bytes per
    second to another device of its node; ``network``: to another node, this device's share. ``host``: to its host's
    memory, each way (0: they are one). ``source``: where the figures are published."""

    memory_bytes: int
    flops: float
    half_flops: float
    memory_bandwidth: float
    fabric: float
    network: float
    prefix: str
    source: str
    host: float = 0.0
    overhead_seconds: float = 5e-6


GB = 10**9
GBIT = 10**9 / 8
PCIE3, PCIE4, PCIE5 = 16e9, 32e9, 64e9  # PCI-SIG: 16 lanes of 8, 16 and 32 GT/s, one direction
NVLINK_C2C = 450e9  # NVIDIA Grace Hopper Superchip datasheet: NVLink-C2C 900 GB/s both ways

PRESETS = MappingProxyType(
    {
        "CPU": Preset(
            32 * 2**30, 627e9, 0.0, 25.6e9, 12.8e9, 12.5 * GBIT, "cpu",
            "8 of 64 cores of an AMD EPYC 7763: 2.45 GHz x 32 flop a cycle (AVX2, 2 FMA units), 8 x DDR4-3200 shared "
            "by 64 cores (AMD EPYC 7003 datasheet); 4 GiB a core and 100 Gbit/s a node as in clouds",
        ),
        "T4": Preset(
            16 * GB, 8.1e12, 65e12, 320e9, 16e9, 12.5 * GBIT, "cuda",
            "NVIDIA T4 datasheet (2019): 8.1 TFLOPS FP32, 65 TFLOPS FP16, 320 GB/s, PCIe 3.0 x16 (32 GB/s both ways); "
            "AWS g4dn.metal: 100 Gbit/s for 8",
            PCIE3,
        ),
        "V100-16GB": Preset(
            16 * GB, 15.7e12, 125e12, 900e9, 150e9, 50 * GBIT, "cuda",
            "NVIDIA V100 datasheet: SXM2 15.7 TFLOPS FP32, 125 TFLOPS FP16 tensor, 900 GB/s, NVLink 300 GB/s both "
            "ways; DGX-1: 4 x 100 Gbit/s for 8; PCIe 3.0 x16 to the host",
            PCIE3,
        ),
        "V100-32GB": Preset(
            32 * GB, 15.7e12, 125e12, 900e9, 150e9, 50 * GBIT, "cuda",
            "NVIDIA V100 datasheet: SXM2 15.7 TFLOPS FP32, 125 TFLOPS FP16 tensor, 900 GB/s, NVLink 300 GB/s both "
            "ways; DGX-1: 4 x 100 Gbit/s for 8; PCIe 3.0 x16 to the host",
            PCIE3,
        ),
        "A100-40GB": Preset(
            40 * GB, 19.5e12, 312e12, 1555e9, 300e9, 200 * GBIT, "cuda",
            "NVIDIA A100 datasheet: 40 GB SXM 19.5 TFLOPS FP32, 312 TFLOPS FP16 and BF16, 1,555 GB/s, NVLink 600 GB/s "
            "both ways; DGX A100: 8 x 200 Gbit/s; PCIe 4.0 x16 (64 GB/s both ways) to the host",
            PCIE4,
        ),
        "A100-80GB": Preset(
            80 * GB, 19.5e12, 312e12, 2039e9, 300e9, 200 * GBIT, "cuda",
            "NVIDIA A100 datasheet: 80 GB SXM 19.5 TFLOPS FP32, 312 TFLOPS FP16 and BF16, 2,039 GB/s, NVLink 600 GB/s "
            "both ways; DGX A100: 8 x 200 Gbit/s; PCIe 4.0 x16 (64 GB/s both ways) to the host",
            PCIE4,
        ),
        "A10G": Preset(
            24 * GB, 31.2e12, 125e12, 600e9, 32e9, 12.5 * GBIT, "cuda",
            "NVIDIA A10 datasheet (the A10G is its cloud variant): 31.2 TFLOPS FP32, 125 TFLOPS BF16, 600 GB/s, PCIe "
            "4.0 x16 64 GB/s both ways; AWS g5.48xlarge: 100 Gbit/s for 8",
            PCIE4,
        ),
        "L4": Preset(
            24 * GB, 30.3e12, 121e12, 300e9, 32e9, 12.5 * GBIT, "cuda",
            "NVIDIA L4 datasheet: 30.3 TFLOPS FP32, 121 TFLOPS BF16 dense, 300 GB/s, PCIe 4.0 x16 64 GB/s both ways; "
            "AWS g6.48xlarge: 100 Gbit/s for 8",
            PCIE4,
        ),
        "L40S": Preset(
            48 * GB, 91.6e12, 362e12, 864e9, 32e9, 50 * GBIT, "cuda",
            "NVIDIA L40S datasheet: 91.6 TFLOPS FP32, 362 TFLOPS BF16 dense, 864 GB/s, PCIe 4.0 x16 64 GB/s both "
            "ways; AWS g6e.48xlarge: 400 Gbit/s for 8",
            PCIE4,
        ),
        "H100": Preset(
            80 * GB, 67e12, 989.4e12, 3350e9, 450e9, 400 * GBIT, "cuda",
            "NVIDIA H100 datasheet: SXM 67 TFLOPS FP32, 989.4 TFLOPS BF16 dense, 3.35 TB/s, NVLink 900 GB/s both "
            "ways; DGX H100: 8 x 400 Gbit/s; PCIe 5.0 x16 (128 GB/s both ways) to the host",
            PCIE5,
        ),
        "H200": Preset(
            141 * GB, 67e12, 989.4e12, 4800e9, 450e9, 400 * GBIT, "cuda",
            "NVIDIA H200 datasheet: SXM 67 TFLOPS FP32, 989.4 TFLOPS BF16 dense, 4.8 TB/s, NVLink 900 GB/s both ways; "
            "DGX H200: 8 x 400 Gbit/s; PCIe 5.0 x16 (128 GB/s both ways) to the host",
            PCIE5,
        ),
        "GH200": Preset(
            96 * GB, 67e12, 989.4e12, 4000e9, 450e9, 400 * GBIT, "cuda",
            "NVIDIA GH200 Grace Hopper Superchip datasheet: 96 GB HBM3, 67 TFLOPS FP32, 990 TFLOPS BF16 dense, 4 TB/s, "
            "NVLink 900 GB/s both ways, NVLink-C2C 900 GB/s both ways to the host",
            NVLINK_C2C,
        ),
        "B200": Preset(
            180 * GB, 75e12, 2250e12, 7700e9, 900e9, 400 * GBIT, "cuda",
            "NVIDIA HGX B200 datasheet: 8 GPUs of 180 GB, 600 TFLOPS FP32 and 18 PFLOPS BF16 dense in all, 62 TB/s in "
            "all, NVLink 1.8 TB/s both ways; DGX B200: 8 x 400 Gbit/s; PCIe 5.0 x16 (128 GB/s both ways) to the host",
            PCIE5,
        ),
        "MI300X": Preset(
            192 * GB, 163.4e12, 1307.4e12, 5300e9, 64e9, 400 * GBIT, "cuda",
            "AMD Instinct MI300X datasheet: 163.4 TFLOPS FP32, 1307.4 TFLOPS BF16 dense, 5.3 TB/s, Infinity Fabric "
            "128 GB/s both ways between two devices; platforms with 8 x 400 Gbit/s; PCIe 5.0 x16 (128 GB/s both "
            "ways) to the host",
            PCIE5,
        ),
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Network:
    """Between nodes: bytes per second of one device's port, one direction, and seconds of a message's start."""

    bandwidth: float
    latency_seconds: float
    source: str


NETWORKS = MappingProxyType(
    {
        "ETHERNET-10G": Network(10 * GBIT, 30e-6, "IEEE 802.3ae: 10 Gbit/s; TCP start-up as measured by NCCL users"),
        "ETHERNET-25G": Network(25 * GBIT, 30e-6, "IEEE 802.3by: 25 Gbit/s"),
        "ETHERNET-100G": Network(100 * GBIT, 30e-6, "IEEE 802.3bj: 100 Gbit/s"),
        "ROCE-100G": Network(100 * GBIT, 10e-6, "RDMA over Converged Ethernet on 100 Gbit/s"),
        "ROCE-400G": Network(400 * GBIT, 10e-6, "RDMA over Converged Ethernet on 400 Gbit/s (Llama 3 report, 2024)"),
        "EDR": Network(100 * GBIT, 5e-6, "InfiniBand Trade Association roadmap: EDR 4x 100 Gbit/s"),
        "HDR": Network(200 * GBIT, 5e-6, "InfiniBand Trade Association roadmap: HDR 4x 200 Gbit/s"),
        "NDR": Network(400 * GBIT, 5e-6, "InfiniBand Trade Association roadmap: NDR 4x 400 Gbit/s"),
        "XDR": Network(800 * GBIT, 5e-6, "InfiniBand Trade Association roadmap: XDR 4x 800 Gbit/s"),
    }
)
"""Networks a description may name after '@': ``8x8xA100@ETHERNET-25G``, a port of that speed for each device."""

FABRICS = MappingProxyType(
    {
        "PCIE3": Network(PCIE3, 10e-6, "PCI-SIG: PCIe 3.0 x16, 16 GB/s each way"),
        "PCIE4": Network(PCIE4, 10e-6, "PCI-SIG: PCIe 4.0 x16, 32 GB/s each way"),
        "PCIE5": Network(PCIE5, 10e-6, "PCI-SIG: PCIe 5.0 x16, 64 GB/s each way"),
        "NVLINK2": Network(150e9, 10e-6, "NVIDIA V100 datasheet: 300 GB/s both ways"),
        "NVLINK3": Network(300e9, 10e-6, "NVIDIA A100 datasheet: 600 GB/s both ways"),
        "NVLINK4": Network(450e9, 10e-6, "NVIDIA H100 datasheet: 900 GB/s both ways, NVSwitch in a node"),
        "NVLINK5": Network(900e9, 10e-6, "NVIDIA HGX B200 datasheet: 1.8 TB/s both ways, NVSwitch in a node"),
    }
)
"""Links inside a node that a description may name after '@' too: ``8xA100@PCIE4``."""

ALIASES = MappingProxyType(
    {
        "A100": "A100-80GB", "V100": "V100-16GB", "A10": "A10G", "H100-80GB": "H100", "H200-141GB": "H200",
        "B200-180GB": "B200", "L40S-48GB": "L40S", "T4-16GB": "T4", "L4-24GB": "L4", "A10G-24GB": "A10G",
        "MI300X-192GB": "MI300X",
    }
)  # fmt: skip
