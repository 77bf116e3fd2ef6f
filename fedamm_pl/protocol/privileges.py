"""``Privileges``: what a method needs, and what it reveals and costs, beside what FedAvg does."""

from dataclasses import dataclass

NOTHING = "nothing"


@dataclass(frozen=True)
class Privileges:
    """What a method takes beside FedAvg, in a few words each, for the table of methods.

    Attributes:
        server: What the server must have, labelled images for example.
        revealed: What leaves a client besides its model and the number of its examples.
        client_state: What a client keeps from one of its rounds to the next.
        server_state: What the server keeps besides the model.
        work: What client and server compute more.
    """

    server: str = NOTHING
    revealed: str = NOTHING
    client_state: str = NOTHING
    server_state: str = NOTHING
    work: str = NOTHING
