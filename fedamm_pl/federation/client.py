"""``train_client``: one client's part of a round, the same for all executors."""

import time
import traceback
from pathlib import Path

import torch

from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.protocol.messages import ClientFailure, ClientResult, State, payload_bytes
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.session import ClientSession
from fedamm_pl.seeding import derive_seed, drawing_from
from fedamm_pl.terminal import line


def train_client(module: FederatedModule, session: ClientSession, trainer: TrainerConfig) -> ClientResult:
    """Survey the received model, ask the server, fit, and return the result.

    In a round without local epochs, only compute statistics. The outcome is a function of the session's broadcast, task
    and private state; earlier clients leave no trace in the module.

    Args:
        module: The module, on the trainer's device; its state is overwritten.
        session: The client's session, with what it received and its connection to the server.
        trainer: Device and precision.

    Raises:
        Exception: Any error in the client's data, training or questions; ``session.stage`` says where it occurred.
    """
    start = time.perf_counter()
    module.session = session
    try:
        module.load_shared_state(session.payload)
        if session.broadcast.local_epochs == 0:
            return result(module, session, _statistics(module, session, trainer), time.perf_counter() - start)
        fit = trainer.build(max_epochs=session.broadcast.local_epochs)
        module.train()  # fit keeps the mode that it finds
        prepare(module, session, trainer)
        with drawing_from(derive_seed(session.task.seed, "global"), module.device):
            fit.fit(module, session.train_loader(module.local_data(session)))
            session.num_steps = fit.global_step
            for name, value in fit.callback_metrics.items():  # logged by a subclass itself
                if name.startswith("train/"):
                    session.metrics[name.removeprefix("train/")] = value
            payload = copied(module.client_payload())  # the next client trains on the same module
        return result(module, session, payload, time.perf_counter() - start)
    finally:
        module.session = None


def _statistics(module: FederatedModule, session: ClientSession, trainer: TrainerConfig) -> State:
    if module.personal:
        module.load_personal_state(session.kept)
    draws = drawing_from(derive_seed(session.task.seed, "statistics"), module.device)
    with trainer.precision_plugin.forward_context(), torch.no_grad(), draws:
        return copied(module.eval().statistics(session))


def prepare(module: FederatedModule, session: ClientSession, trainer: TrainerConfig) -> None:
    """Prepare a client's fit: load its personal state, survey the received model, and ask the server.

    The server is not asked if the session already has its answer.

    Args:
        module: Holds the received state, in training mode.
        session: The client's session.
        trainer: Sets the precision.
    """
    seed, method = session.task.seed, type(module)
    if module.personal:
        module.load_personal_state(session.kept)
        session.kept = {name: value for name, value in session.kept.items() if not name.startswith(module.personal)}
    with trainer.precision_plugin.forward_context():
        if method.survey is not FederatedModule.survey:
            with torch.no_grad(), drawing_from(derive_seed(seed, "survey"), module.device):
                session.surveyed = module.eval().survey(session)
            module.train()
        if session.answer is None and method.question is not FederatedModule.question:
            with session.during("meta step"), drawing_from(derive_seed(seed, "question"), module.device):
                question = module.question(session)
                if question is not None:
                    session.answer = session.ask(0, question)
                    module.take_answer(session.answer)
            if question is None:
                session.seconds["meta step"] = 0.0  # asking nothing does not count as a meta step


def result(module: FederatedModule, session: ClientSession, payload: State, seconds: float) -> ClientResult:
    """Return a client's result.

    Args:
        module: Holds the trained state.
        session: The client's session.
        payload: What it sends besides the survey, in tensors that are not used elsewhere.
        seconds: The client's time, meta steps included.
    """
    payload = {**payload, **copied(session.surveyed)}
    meta_seconds = session.seconds["meta step"]
    return ClientResult(
        client_id=session.task.client_id,
        num_examples=session.data.num_examples,
        payload=payload,
        metrics={name: float(value) for name, value in session.metrics.items()},
        bytes_received=session.bytes_received,
        bytes_sent=session.bytes_sent + payload_bytes(payload),
        train_seconds=seconds - meta_seconds,
        meta_seconds=meta_seconds,
        kept={**session.kept, **(module.personal_state() if module.personal else {})},
        tallies=module.tallies(),
    )


def copied(state: State) -> State:
    """Return detached copies of tensors."""
    return {name: value.detach().clone() for name, value in state.items()}


def attempt(module: FederatedModule, session: ClientSession, trainer: TrainerConfig) -> ClientResult | ClientFailure:
    """Call :func:`train_client`; if the client raises an ``Exception``, return it as a failure."""
    try:
        with quiet():
            return train_client(module, session, trainer)
    except Exception as error:
        return ClientFailure(session.task.client_id, session.stage, one_line_reason(error))


def one_line_reason(error: Exception) -> str:
    """Return type and first line of an error, and the innermost place in code that is not an installed package."""
    summary = traceback.TracebackException.from_exception(error)  # works even if str(error) itself raises
    own = [frame for frame in summary.stack if "site-packages" not in frame.filename] or summary.stack
    text = line(next(iter(str(summary).strip().splitlines()), ""), 200)
    return f"{type(error).__name__}: {text} ({Path(own[-1].filename).name}, line {own[-1].lineno})"
