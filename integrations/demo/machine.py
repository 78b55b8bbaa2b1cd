"""What a measurement ran on, for the head of its results."""

import platform
from pathlib import Path

import torch

import redline


def describe() -> str:
    """One line: processor, threads, versions."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    processor = names[0] if info.exists() and names else platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    return (
        f"{processor}, {device}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"redline {redline.__version__}"
    )
