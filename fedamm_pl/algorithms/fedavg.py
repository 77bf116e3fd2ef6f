"""FedAvg (McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, AISTATS 2017)."""

from fedamm_pl.protocol.module import FederatedModule


class FedAvg(FederatedModule):
    """Local SGD on the plain cross-entropy, then the average of the clients' states weighted by their examples.

    The base class is FedAvg already; every other algorithm is written as its difference from it.
    """
