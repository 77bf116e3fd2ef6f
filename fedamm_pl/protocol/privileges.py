"""``Privileges``: what a method needs, reveals and costs beyond FedAvg."""

from dataclasses import dataclass

NOTHING = "nothing"


@dataclass(frozen=True)
class Privileges:
    """The requirements of a method beyond FedAvg, in a few words each, for the table of methods.

    Attributes:
        server: Data that the server must have, for example labelled images.
        revealed: Information that leaves a client in addition to its model and its number of examples.
        client_state: State that a client keeps from one of its rounds to the next.
        server_state: State that the server keeps in addition to the model.
        work: Additional computation by client and server.
    """

    server: str = NOTHING
    revealed: str = NOTHING
    client_state: str = NOTHING
    server_state: str = NOTHING
    work: str = NOTHING
