"""The ``ClientApp`` of ``with_flower.py``, in a separate module because Ray's workers import it by name."""

from functools import cache

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.contenders.given import Given, train

app = ClientApp()


@cache
def given() -> Given:
    """Return the job and its files; each worker reads them once."""
    return Given.here()


@app.train()  # type: ignore[untyped-decorator]
def train_client(message: Message, context: Context) -> Message:
    """Train a client, starting from the received weights."""
    images, labels = given().clients[int(context.node_config["partition-id"])]
    network = given().network()
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    train(network, images, labels, given().job)
    content = RecordDict(
        {"arrays": ArrayRecord(network.state_dict()), "metrics": MetricRecord({"num-examples": len(labels)})}
    )
    return Message(content=content, reply_to=message)
