"""Measures what a method makes a client send and receive, with a small network and generated images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.data.sources import ImageData
from fedamm_pl.federation.client import prepare
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.server import Server, takes_statistics
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import ClientTask, payload_bytes
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.session import ClientSession

NUM_CLASSES, IMAGE_SIZE, NETWORK = 10, 28, "small_cnn"
CPU = TrainerConfig("cpu", precision="32-true")
PER_CLASS = 4
"""Number of generated training images per class; the bytes do not depend on it."""


class GeneratedImages(FederatedDataModule):
    """Noise images, 28x28 and grey, in ten classes: one image per class at the server, the others at one client."""

    def __init__(self) -> None:
        super().__init__("generated", num_clients=1, partition="iid", imbalance_factor=1.0, num_meta_per_class=1)

    def load_images(self) -> ImageData:
        """Generate the images."""
        number = NUM_CLASSES * PER_CLASS
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (number, 1, IMAGE_SIZE, IMAGE_SIZE), generator=generator, dtype=torch.uint8)
        labels = torch.arange(number) % NUM_CLASSES
        names = [str(number) for number in range(NUM_CLASSES)]
        return ImageData(images, labels, images[:NUM_CLASSES], labels[:NUM_CLASSES], names)


@dataclass(frozen=True)
class Costs:
    """What a method costs with given options.

    Attributes:
        received: Tensor bytes that a client receives in a round, the answers to questions before its fit included.
        sent: Tensor bytes that it sends, these questions included.
        statistics: Tensor bytes that each client sends before an evaluation with calibration, in a round without
            training.
        privileges: What it needs beyond FedAvg, in words.
    """

    received: int
    sent: int
    statistics: int
    privileges: Privileges


def measure(make: Callable[..., FederatedModule], data: FederatedDataModule) -> Costs:
    """Measure what a method costs, from what the server broadcasts, expects and answers.

    Args:
        make: The method's class, or a function with the parameters ``num_classes``, ``in_channels``, ``model`` and
            ``info``.
        data: Data with one or more clients and a meta set.
    """
    made = {"num_classes": data.num_classes, "in_channels": data.in_channels, "model": NETWORK, "info": data.info}
    at_server, at_client = make(**made), make(**made)
    server = Server(at_server, data, CPU, 0, FederationConfig(1))
    broadcast = server.broadcast(at_server.shared_state(), 1, 1)
    session = ClientSession(broadcast, ClientTask(0, 0), data.client, server.answer)
    CPU.place(at_client)
    at_client.session = session
    at_client.load_shared_state(session.payload)
    prepare(at_client.train(), session, CPU)
    calibrates = at_server.calibrates(last=True) and takes_statistics(at_server)
    return Costs(
        received=session.bytes_received,
        sent=session.bytes_sent + payload_bytes(server.expected_payload()),
        statistics=payload_bytes(server.expected_statistics()) if calibrates else 0,
        privileges=at_server.privileges,
    )
