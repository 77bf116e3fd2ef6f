"""Profile of a round by operator."""

import torch

from benchmarks.federations import advance, cifar10, federation

KINDS = {
    "convolution, forward": ("convolution", "conv2d", "mkldnn_convolution", "cudnn_convolution", "onednn"),
    "BatchNorm": ("batch_norm",),
    "optimizer, without its additions": ("Optimizer.step", "_fused_sgd", "_foreach"),
    "ReLU, addition, padding": ("relu", "threshold", "add", "pad", "slice"),
    "casts and copies": ("copy_", "_to_copy", "clone", "contiguous", "fill_", "zero_"),
}


def kind_of(name: str) -> str:
    """Return the kind of an operator."""
    if "convolution_backward" in name:
        return "convolution, backward"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "the rest")


def profile() -> dict[str, float]:
    """Return the share of a round's operator time by kind, in percent."""
    run = federation(cifar10())
    advance(run)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        advance(run)
    shares: dict[str, float] = {}
    for event in profiler.key_averages():
        seconds = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        shares[kind_of(event.key)] = shares.get(kind_of(event.key), 0) + seconds
    total = sum(shares.values())
    return {kind: 100 * value / total for kind, value in sorted(shares.items(), key=lambda item: -item[1])}
