import torch
from torch import nn

from fedamm_pl import FedAvg
from fedamm_pl.federation.executors import Executor, RunSpec, Sequential
from fedamm_pl.protocol.messages import Broadcast, ClientResult, ClientTask
from tests.federation.executors.contract import ExecutorContract, at_first, broadcast, tasks
from tests.federation.small import assert_equal, make, spec
from tests.tiny import NUM_CLASSES, tiny_data


class TestSequential(ExecutorContract):
    window = 1

    def executor(self) -> Executor:
        return Sequential()


def test_it_closes_twice() -> None:
    data = tiny_data()
    runner = Sequential().open(spec(make(FedAvg, data), data))
    runner.close()
    runner.close()


def test_dropout_is_a_function_of_the_seed_and_leaves_global_randomness_alone() -> None:
    data = tiny_data()
    network = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, NUM_CLASSES))
    module = make(FedAvg, data, model=network)
    with Sequential().open(spec(module, data)) as runner:
        payloads = []
        for _ in range(2):
            torch.rand(3)
            before = torch.random.get_rng_state()
            (result,) = runner.run(Broadcast(1, 1, module.shared_state()), [ClientTask(0, 7)], at_first)
            assert torch.equal(torch.random.get_rng_state(), before)
            assert isinstance(result, ClientResult)
            payloads.append(result.payload)
    assert_equal(*payloads)


def test_the_module_of_the_run_trains_nobody(scripted: RunSpec) -> None:
    module = scripted.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with Sequential().open(scripted) as runner:
        assert len(list(runner.run(broadcast(scripted, 1), tasks(1), at_first))) == 7
    assert_equal(dict(module.state_dict()), before)
    assert module.session is None
