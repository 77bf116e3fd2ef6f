"""Files of a job for the contenders (images, partition and initial weights), and measures of their results."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.contenders.given import Given, State, normalized, write_state
from benchmarks.contenders.job import Job
from benchmarks.contenders.networks import NETWORKS
from benchmarks.contenders.with_fedamm import data_module
from fedamm_pl.data import ImageData
from fedamm_pl.data.sources import load_images

FILES = {
    "fashion_mnist": ("FashionMNIST", "fashion_mnist.npz"),
    "cifar10": ("cifar-10-batches-py", "cifar10.npz"),
}
"""Data set -> its files; nothing is downloaded."""
SHAPES = {"fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Material:
    """A job and its files.

    Attributes:
        folder: Folder of the files.
        job: The job, with the normalisation of its images.
        source: Name of the images.
        test_images: Normalised test images.
        test_labels: Labels of the test images.
    """

    folder: Path
    job: Job
    source: str
    test_images: Tensor
    test_labels: Tensor

    def accuracy(self, state: State) -> float:
        """Return the test accuracy of weights in percent; all contenders are measured by this code."""
        network = NETWORKS[self.job.network]()
        network.load_state_dict(state)
        network.eval()
        with torch.inference_mode():
            found = torch.cat([network(images).argmax(1) for images in torch.split(self.test_images, 250)])
        return 100 * float((found == self.test_labels).float().mean())


def prepare(job: Job, folder: Path, root: Path | None) -> Material:
    """Write the files of a job.

    Args:
        job: The job.
        folder: Folder to write to.
        root: Folder of real images, if there is one.
    """
    images = find_images(job.images, root)
    source = "generated images" if images is None else job.images
    images = images or generated(job)
    chosen = torch.randperm(len(images.train_labels), generator=_generator())[: job.num_clients * job.client_size]
    train, tests = as_stored(images.train_images[chosen]), as_stored(images.test_images[: job.num_test])
    labels, test_labels = images.train_labels[chosen].numpy(), images.test_labels[: job.num_test]
    # only ten test images, so that a contender that must evaluate loses no time
    np.savez(folder / "data.npz", x_train=train, y_train=labels, x_test=tests[:10], y_test=test_labels[:10].numpy())
    torch.manual_seed(0)
    write_state(folder / "initial.npz", NETWORKS[job.network]().state_dict())
    job.write(folder / "job.json")
    data = data_module(Given(folder))
    clients = [data.client(client).indices for client in range(job.num_clients)]
    np.savez(folder / "clients.npz", clients=torch.stack(clients).numpy())
    job = replace(job, mean=tuple(data.info["mean"]), std=tuple(data.info["std"]))
    job.write(folder / "job.json")
    return Material(folder, job, source, normalized(tests, job), test_labels)


def find_images(name: str, root: Path | None) -> ImageData | None:
    """Return real images; None if their files are missing."""
    if root is None or not any((root / file).exists() for file in FILES[name]):
        return None
    return load_images(name, str(root))


def generated(job: Job) -> ImageData:
    """Generate images that a network can learn to classify: a smooth pattern for each class, with noise."""
    generator, (channels, height, width) = _generator(), SHAPES[job.images]
    patterns = functional.interpolate(torch.randn(10, channels, 7, 7, generator=generator), (height, width))
    num_train = job.num_clients * job.client_size
    labels = torch.arange(num_train + job.num_test) % 10
    noise = torch.randn(len(labels), channels, height, width, generator=generator)
    images = (128 + 15 * patterns[labels] + 60 * noise).clamp(0, 255).to(torch.uint8)
    names = [str(label) for label in range(10)]
    return ImageData(images[:num_train], labels[:num_train], images[num_train:], labels[num_train:], names)


def as_stored(images: Tensor) -> Array:
    """Turn images (N, C, H, W) into (N, H, W), or (N, H, W, C) in colour."""
    array: Array = images.numpy()
    return array[:, 0] if array.shape[1] == 1 else np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def largest_difference(state: State, other: State) -> float:
    """Return the largest difference between two sets of weights, without the running statistics of BatchNorm."""
    names = [name for name in other if not name.endswith(("num_batches_tracked", "running_mean", "running_var"))]
    return max(float((state[name].double() - other[name].double()).abs().max()) for name in names)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
