"""Benchmark rows on the evaluation."""

import torch
from torch import Tensor, nn

from benchmarks.federations import arithmetic, cifar10, federation
from benchmarks.timing import Row, pairs, timed
from fedamm_pl import Orchestrator


def row_evaluation(repeats: int) -> list[Row]:
    """Compare an evaluation of 10,000 images with bare forward passes, and bfloat16 with float32."""
    data = cifar10(10_000)
    runs = {precision: federation(data, trainer={"precision": precision}) for precision in ("bf16-mixed", "32-true")}
    rows = []
    for precision, run in runs.items():
        batches = [run.server.module.prepare(images) for images, _ in run.data.test_dataloader()]
        network = run.server.module.model.eval()

        def bare(run: Orchestrator = run, batches: list[Tensor] = batches, network: nn.Module = network) -> None:
            with torch.inference_mode(), arithmetic(run):
                for images in batches:
                    network(images)

        what = f"evaluation of 10,000 images / bare forward passes, {precision}"
        names = ("evaluation", "bare")
        rows.append(pairs(what, timed(run.evaluate), timed(bare), repeats, bar=1.1, names=names))
    first, second = (timed(run.evaluate) for run in runs.values())
    what = "evaluation in bfloat16 / in float32"
    return [*rows, pairs(what, first, second, repeats, bar=0.7, names=("bf16-mixed", "32-true"))]
