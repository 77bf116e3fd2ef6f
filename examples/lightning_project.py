"""Use FedAMM in your own Lightning project: the meta step of Meta-Weight-Net on two loaders and a torchvision network.

    python examples/lightning_project.py

There is no federation: in each step the module takes a batch of long-tailed images and a batch of balanced ones.
Metrics go to the logger of the project, and checkpoints are ordinary Lightning checkpoints.
"""

import tempfile

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import shufflenet_v2_x0_5

from fedamm_pl import FedAMM

CLASSES = 4


def images(per_class: list[int], seed: int) -> TensorDataset:
    """Return uint8 images of noise with one bright quadrant, a different one for each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(CLASSES), torch.tensor(per_class))
    found = torch.randint(0, 120, (len(labels), 3, 32, 32), generator=generator, dtype=torch.uint8)
    for image, label in zip(found, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 120
    return TensorDataset(found, labels)


def main() -> float:
    """Train, test and reload the checkpoint; return the test accuracy."""
    pl.seed_everything(0, verbose=False)
    train = DataLoader(images([80, 40, 20, 10], 1), batch_size=25, shuffle=True)
    meta = DataLoader(images([5] * CLASSES, 2), batch_size=20, shuffle=True)
    validation, test = (DataLoader(images([20] * CLASSES, seed), batch_size=40) for seed in (3, 4))
    network = shufflenet_v2_x0_5(num_classes=CLASSES)
    groups = {"shot_groups": {"many": [0], "medium": [1, 2], "few": [3]}}
    module = FedAMM(CLASSES, 3, network, lr=0.02, info=groups, differentiation="forward")
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(max_epochs=6, default_root_dir=folder, accelerator="cpu", **quiet)
        trainer.fit(module, {"train": train, "meta": meta}, validation)
        (metrics,) = trainer.test(module, test, verbose=False)
        trainer.save_checkpoint(f"{folder}/model.ckpt")
        # the checkpoint has the weights of the network, but not the network itself
        again = FedAMM.load_from_checkpoint(
            f"{folder}/model.ckpt", model=shufflenet_v2_x0_5(num_classes=CLASSES), weights_only=True
        )
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.state_dict().items())
    print(f"test accuracy {metrics['test/acc']:.1%}, class with 10 images {metrics['test/acc_few']:.1%}")
    return float(metrics["test/acc"])


if __name__ == "__main__":
    main()
