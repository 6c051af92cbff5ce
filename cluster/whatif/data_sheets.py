"""Devices by their data sheets, and the profiles that those give of a model, which nobody measured. Pure.

A data sheet's memory of 80 GB is 80 GiB. Its links count both directions, ours one. Its FLOP/s with sparsity are twice
the dense ones that are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model.args import ModelArgs
from model.curve import Curve
from model.memory import expert_bytes
from serving.cluster_config import AssumedFigures, DeviceFigures, Dtype, LinkFigures
from serving.config import ConfigError
from serving.link.epoch import DeviceProfile

_GIB, _GB, _TERA = 2**30, 10**9, 1e12
_NVIDIA, _AMD = "nvidia", "amd"
_A100 = ("NVIDIA A100 Tensor Core GPU datasheet, SXM",
         "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
         "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf")
_NVLINK_4 = LinkFigures(bandwidth=450 * _GB, source="NVLink 4, 900 GB/s in both directions together")
_NVLINK_3 = LinkFigures(bandwidth=300 * _GB, source="NVLink 3, 600 GB/s in both directions together")
_PCIE_3 = LinkFigures(bandwidth=16 * _GB, source="PCIe Gen3 x16, 32 GB/s in both directions together")
_PCIE_4 = LinkFigures(bandwidth=32 * _GB, source="PCIe Gen4 x16, 64 GB/s in both directions together")
_XGMI = LinkFigures(bandwidth=448 * _GB, source="7 Infinity Fabric links, 128 GB/s each in both directions together")


def _figures(vendor: str, memory_gib: int, read_gb_per_s: int, flops: dict[Dtype, float], link: LinkFigures,
             source: tuple[str, str]) -> DeviceFigures:
    """Make the figures from a data sheet's units. `source`: document and address."""
    return DeviceFigures(vendor=vendor, memory=memory_gib * _GIB, read_bandwidth=read_gb_per_s * _GB,
                         flops={dtype: rate * _TERA for dtype, rate in flops.items()}, link=link, source=source[0],
                         url=source[1])


DEVICE_SPECS: Mapping[str, DeviceFigures] = {
    "h200-sxm": _figures(
        _NVIDIA, 141, 4800, {"bfloat16": 989.5, "float16": 989.5, "float32": 67}, _NVLINK_4,
        ("NVIDIA H200 Tensor Core GPU datasheet, SXM", "https://www.nvidia.com/en-us/data-center/h200/")),
    "h100-sxm": _figures(
        _NVIDIA, 80, 3350, {"bfloat16": 989.5, "float16": 989.5, "float32": 67}, _NVLINK_4,
        ("NVIDIA H100 Tensor Core GPU datasheet, SXM",
         "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet")),
    "a100-80g-sxm": _figures(
        _NVIDIA, 80, 2039, {"bfloat16": 312, "float16": 312, "float32": 19.5}, _NVLINK_3, _A100),
    "a100-40g-sxm": _figures(
        _NVIDIA, 40, 1555, {"bfloat16": 312, "float16": 312, "float32": 19.5}, _NVLINK_3, _A100),
    "l40s": _figures(
        _NVIDIA, 48, 864, {"bfloat16": 362, "float16": 362, "float32": 91.6}, _PCIE_4,
        ("NVIDIA L40S datasheet", "https://www.nvidia.com/en-us/data-center/l40s/")),
    "l4": _figures(
        _NVIDIA, 24, 300, {"bfloat16": 121, "float16": 121, "float32": 30.3}, _PCIE_4,
        ("NVIDIA L4 Tensor Core GPU datasheet", "https://www.nvidia.com/en-us/data-center/l4/")),
    "t4": _figures(
        _NVIDIA, 16, 300, {"float16": 65, "float32": 8.1}, _PCIE_3,
        ("NVIDIA T4 Tensor Core GPU datasheet", "https://www.nvidia.com/en-us/data-center/tesla-t4/")),
    "mi300x": _figures(
        _AMD, 192, 5300, {"bfloat16": 1307.4, "float16": 1307.4, "float32": 163.4}, _XGMI,
        ("AMD Instinct MI300X data sheet",
         "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/"
         "amd-instinct-mi300x-data-sheet.pdf")),
}


def device_figures(kind: str) -> DeviceFigures:
    """Return the figures of a kind of device. Raises ConfigError for one that is not known here."""
    if kind not in DEVICE_SPECS:
        raise ConfigError(f"device {kind!r} is not known",
                          fix=f"known are {', '.join(sorted(DEVICE_SPECS))}; or give its figures there: vendor, "
                              "memory, read_bandwidth, flops, link, source")
    return DEVICE_SPECS[kind]


def compute_dtype(figures: DeviceFigures, dtype: Dtype) -> Dtype:
    """Return what matrix products of `dtype` are computed in: where it lacks, in float32. Raises ConfigError."""
    if dtype in figures.flops:
        return dtype
    if "float32" not in figures.flops:
        raise ConfigError(f"flops has {sorted(figures.flops)}, and neither {dtype} nor float32",
                          fix="add one of the two, or plan with --dtype")
    return "float32"


@dataclass(frozen=True, slots=True)
class _Rates:
    """The rates of one device, after its efficiencies."""

    read_bytes_per_s: float
    flop_per_s: float
    dtype_bytes: int

    def curve(self, num_weights: int, bytes_per_row: float = 0.0) -> Curve:
        """Time products with so many weights: they are read once, and every row multiplies each and adds. A row may
        also read and write a state of its own."""
        read_s = num_weights * self.dtype_bytes / self.read_bytes_per_s
        row_s = 2 * num_weights / self.flop_per_s + bytes_per_row / self.read_bytes_per_s
        knee = max(2, round(read_s / row_s))
        return tuple((rows, max(read_s, row_s * rows)) for rows in (1, knee, 2 * knee))


def data_sheet_profile(args: ModelArgs, dtype: Dtype, dtype_bytes: int, figures: DeviceFigures,
                       assumed: AssumedFigures) -> DeviceProfile:
    """Return what the device would do with the model at the assumed efficiencies, without a link."""
    flop_per_s = figures.flops[compute_dtype(figures, dtype)] * assumed.flop_efficiency
    rates = _Rates(figures.read_bandwidth * assumed.read_efficiency, flop_per_s, dtype_bytes)
    expert = expert_bytes(args, 1)
    expert_s = rates.curve(expert)
    kv_width = 2 * args.num_kv_heads * args.head_dim
    attention_s = max(kv_width * dtype_bytes / rates.read_bytes_per_s, 4 * args.num_heads * args.head_dim / flop_per_s)
    return DeviceProfile(
        source="data-sheet", read_bytes_per_s=rates.read_bytes_per_s,
        gemm_flop_per_s=tuple((rows, 2 * expert * rows / seconds) for rows, seconds in expert_s), expert_s=expert_s,
        dense_s=rates.curve(_dense_weights(args), _state_bytes(args)),
        head_s=rates.curve(args.vocab_size * args.hidden_size),
        attention_s=attention_s, layer_overhead_s=assumed.layer_overhead_s)


def _dense_weights(args: ModelArgs) -> int:
    """Return the number of a mean layer's: projections of attention or gated DeltaNet, gate, shared expert."""
    heads_width, kv_width = args.num_heads * args.head_dim, args.num_kv_heads * args.head_dim
    attention = (3 if args.gated_attention else 2) * heads_width + 2 * kv_width
    linear, share = args.linear, len(args.linear_layers) / args.num_layers
    delta_net = 0 if linear is None else linear.conv_width + 2 * linear.value_width + 2 * linear.num_value_heads
    mixer = round((1 - share) * attention + share * delta_net)
    return args.hidden_size * (mixer + args.num_experts + 3 * args.shared_expert_size)


def _state_bytes(args: ModelArgs) -> float:
    """Return the bytes of state that a row reads and writes in a mean layer."""
    return 0.0 if args.linear is None else 2 * 4 * args.linear.state_size * len(args.linear_layers) / args.num_layers
