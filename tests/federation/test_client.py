"""One client's round: what it leaves behind."""

import gc
import weakref

from fedamm_pl import FedAvg
from fedamm_pl.federation.client import train_client
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.protocol.messages import Answer, Broadcast, ClientTask, Question
from fedamm_pl.protocol.session import ClientSession
from tests.tiny import NUM_CLASSES, tiny_data


def test_what_a_client_had_is_free_when_it_is_done_not_when_lightnings_trainer_is_collected() -> None:
    def ask(question: Question) -> Answer:
        raise AssertionError

    data = tiny_data()
    module = FedAvg(NUM_CLASSES, 1, "tests.tiny.tiny_resnet", info=data.info)
    session = ClientSession(Broadcast(1, 1, module.shared_state()), ClientTask(0, 0), data.client, ask)
    had = weakref.ref(session)
    gc.disable()
    try:
        with quiet():
            train_client(module, session, TrainerConfig("cpu"))
        del session
        assert had() is None
    finally:
        gc.enable()
