"""FedAvg (McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, AISTATS 2017)."""

from fedamm_pl.protocol.module import FederatedModule


class FedAvg(FederatedModule):
    """Local SGD on the plain cross-entropy, then the average of the clients' states weighted by their examples.

    The base class already implements FedAvg; every other algorithm defines only its differences from it.
    """
