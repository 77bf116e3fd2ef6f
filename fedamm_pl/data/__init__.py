"""Data: long tails, partitions, data sets, transforms and the Lightning data module."""

from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.data.sources import ImageData, load_images
from fedamm_pl.data.sources.image_files import read_image_files

__all__ = ["FederatedDataModule", "ImageData", "load_images", "read_image_files"]
