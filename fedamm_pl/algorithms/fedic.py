"""FEDIC (Shang et al., *FEDIC: Federated Learning on Non-IID and Long-Tailed Data via Calibrated Distillation*, ICME 2022)."""

import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from fedamm_pl.algorithms.ensemble import (
    MAX_OUTPUT,
    CalibrationNet,
    Pool,
    distillation_loss,
    kept_of,
    take_up,
)
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import example_losses
from fedamm_pl.models import features_and_logits
from fedamm_pl.precision import at_least_float32
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.session import ServerSession

log = logging.getLogger(__name__)
WEIGHT_DECAY = 2e-4
EVALUATED = 250
"""Number of images per forward pass in an evaluation."""


class FEDIC(FederatedModule):
    """FedAvg whose server distils the ensemble of the clients' models, calibrated on its balanced images, into their average.

    After each round the server (1) fine-tunes a copy w' of the average on its images, (2) trains a calibration net
    (:class:`CalibrationNet`), which weights the clients' logits relative to each other and to those of w' and so forms
    a teacher, and (3) trains the average to agree with the teacher on unlabelled batches and with the labels on
    labelled ones. The calibration net and its Adam moments are kept between rounds.

    The server has the same images as in FedAMM and MetaFineTune, and no others: the unlabelled images are new draws of
    the training transform of these images, while the authors use another data set. ``num_draws`` draws are made each
    round. The logits of each client's model on them are stored and its features are added to a sum, so only one model
    at a time is in memory; this takes ``num_draws * C`` floats per image and client. All models are evaluated in
    evaluation mode, including w' once it is trained. w' and the average are trained in training mode, so their running
    statistics then come from the server's images.

    In each round the server evaluates every client's model on ``num_draws`` draws of its images, and with the default
    options and 100 images trains on about 17,000.

    Nothing extra is sent, but the server must see each client's individual model: the sums that secure aggregation
    provides are not enough, and a robust aggregation protects the average, not the ensemble. A model with logits or
    features that are not finite, or larger than 1e6 in absolute value, is left out of the ensemble. With
    ``distill_steps`` 0 it is FedAvg; with ``distill_weight`` 0 the server fine-tunes the average with Adam, and no
    other model matters. In a plain Trainer it is FedAvg.

    Args:
        num_classes: Number of classes C.
        in_channels: Image channels: 1 grey, 3 colour, or the number of features of a table.
        model: A network's name, import path, or in Python a Module, see :class:`FederatedModule`.
        lr: Learning rate of the local SGD.
        momentum: Its Nesterov momentum; 0 for none.
        weight_decay: Its weight decay.
        info: What is known of the images: normalisation for uint8 input, class names, class counts, shot groups.
        local_optimizer: Optimizer of local training: sgd, sam or asam; the latter two follow the gradient at the worst nearby point.
        rho: Radius of the neighbourhood of sam and asam; null: 0.1 for sam, 0.7 for asam.
        finetune_steps: Adam steps for w' per round, each on 20 labelled images.
        calibration_steps: Adam steps for the calibration net per round, on the same batches.
        distill_steps: Adam steps for the average per round, each on 128 unlabelled and 20 labelled images.
        adam_lr: Learning rate of Adam in all three steps.
        distill_weight: Weight of the teacher in the loss of the average, in [0, 1]; the rest is the weight of the labels.
        temperature: Temperature that divides the logits of teacher and student.
        num_draws: Draws of the training transform for the server's images per round.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    uses_meta_set = True
    uses_features = True

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        model: str | nn.Module = "resnet32",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        info: ImageInfo | None = None,
        local_optimizer: LocalOptimizer = "sgd",
        rho: float | None = None,
        finetune_steps: int = 100,
        calibration_steps: int = 100,
        distill_steps: int = 100,
        adam_lr: float = 1e-3,
        distill_weight: float = 0.5,
        temperature: float = 2.0,
        num_draws: int = 20,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("finetune_steps", finetune_steps, least=0)
        require_range("calibration_steps", calibration_steps, least=0)
        require_range("distill_steps", distill_steps, least=0)
        require_range("adam_lr", adam_lr, least=0)
        if not 0 <= distill_weight <= 1:
            raise ValueError(f"Expected `distill_weight` to be in [0, 1], got {distill_weight}.")
        require_range("temperature", temperature, above=0)
        require_range("num_draws", num_draws, least=1)

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        names = ("finetune_steps", "calibration_steps", "distill_steps")
        steps = " + ".join(str(self.hparams[name]) for name in names)
        return Privileges(
            server="balanced labelled images; each client's individual model",
            server_state="a calibration net of 3 C + D + 2 numbers and its Adam moments",
            work=f"server: each model on {self.hparams['num_draws']} draws of its images, {steps} steps of Adam",
        )

    # Server

    def server_update(self, state: State, results: Iterable[ClientResult], server: ServerSession) -> State:
        """Average the models while each is evaluated on the pool of images, then distil their ensemble into the average."""
        if self.hparams["distill_steps"] == 0:
            return super().server_update(state, results, server)
        draws = [server.meta(draw) for draw in range(self.hparams["num_draws"])]
        pool = Pool(torch.cat([images for images, _ in draws]), draws[0][1].to(self.device))
        next_state = super().server_update(state, self._evaluated(results, pool, server), server)
        if not pool.votes:
            log.warning("round %d: no client's model can be distilled; the average is unchanged", server.round_num)
            return next_state
        generator = server.generator("FEDIC")
        self.load_shared_state(next_state)
        steps = max(self.hparams["finetune_steps"], self.hparams["calibration_steps"])
        batches = [pool.labelled(generator) for _ in range(steps)]
        self._train(self.hparams["finetune_steps"], lambda step: self._label_loss(pool, batches[step]))
        _, refined = self._outputs(pool.images)
        teacher, kept = self._calibrated(state, pool, refined, batches, generator)
        self.load_shared_state(next_state)
        self._train(self.hparams["distill_steps"], lambda _: self._student_loss(pool, teacher, generator))
        return {**next_state, **self.shared_state(), **kept}

    def _evaluated(self, results: Iterable[ClientResult], pool: Pool, server: ServerSession) -> Iterator[ClientResult]:
        """Yield the results, each after its model has been evaluated on the pool."""
        for result in results:
            self.load_shared_state(result.payload)
            if not pool.add(*self._outputs(pool.images)):
                text = "round %d: the model of client %d has no voice in the ensemble: its outputs are beyond %g or no numbers"
                log.warning(text, server.round_num, result.client_id, MAX_OUTPUT)
            yield result

    def _outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, D) and logits (N, C) of the module's model in evaluation mode, in float32 or more."""
        self.eval()
        with torch.no_grad():
            parts = [features_and_logits(self.model, self.prepare(part)) for part in torch.split(images, EVALUATED)]
        features, logits = (at_least_float32(torch.cat(part)) for part in zip(*parts, strict=True))
        return features, logits

    def _train(self, num_steps: int, loss_of: Callable[[int], Tensor]) -> None:
        """Train the module's model with Adam.

        Args:
            num_steps: Number of steps.
            loss_of: Maps the index of a step to its loss.
        """
        self.train()
        trained = [value for value in self.model.parameters() if value.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self.hparams["adam_lr"], weight_decay=WEIGHT_DECAY)
        with torch.enable_grad():
            for step in range(num_steps):
                optimizer.zero_grad()
                loss_of(step).backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    def _label_loss(self, pool: Pool, chosen: Tensor) -> Tensor:
        logits: Tensor = at_least_float32(self(pool.images[chosen.to(pool.images.device)]))
        return example_losses(logits, pool.labels_of(chosen)).mean()

    def _student_loss(self, pool: Pool, teacher: Tensor, generator: torch.Generator) -> Tensor:
        weight, temperature = self.hparams["distill_weight"], self.hparams["temperature"]
        unlabelled, labelled = pool.unlabelled(generator), pool.labelled(generator)
        loss = torch.zeros((), device=self.device)
        if weight > 0:  # a separate forward pass, because its batch updates the running statistics
            logits = at_least_float32(self(pool.images[unlabelled.to(pool.images.device)]))
            target = teacher[unlabelled.to(teacher.device)]
            loss = loss + weight * distillation_loss(logits, target, temperature)
        if weight < 1:
            loss = loss + (1 - weight) * self._label_loss(pool, labelled)
        return loss

    def _calibrated(
        self, state: State, pool: Pool, refined: Tensor, batches: list[Tensor], generator: torch.Generator
    ) -> tuple[Tensor, State]:
        """Train the calibration net.

        Args:
            state: The server's state, with the calibration net of the last round if there is one.
            pool: The pool of images, with the logits of all models.
            refined: Logits of w' on the pool, shape (N, C).
            batches: Indices of labelled images, one tensor per step.
            generator: Draws the initial weights of the net.

        Returns:
            Logits of the teacher on the pool, shape (N, C), and the entries of the server's state that keep the net.
        """
        votes, features = torch.stack(pool.votes), pool.features / len(pool.votes)
        net = CalibrationNet(refined.shape[1], features.shape[1], generator).to(refined)
        optimizer = torch.optim.Adam(net.parameters(), lr=self.hparams["adam_lr"])
        take_up(net, optimizer, state)
        with torch.enable_grad():
            for chosen in batches[: self.hparams["calibration_steps"]]:
                rows = chosen.to(refined.device)
                optimizer.zero_grad()
                teacher = net(votes[:, rows], features[rows], refined[rows])
                example_losses(teacher, pool.labels_of(chosen)).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        with torch.no_grad():
            return net(votes, features, refined), kept_of(net, optimizer)
