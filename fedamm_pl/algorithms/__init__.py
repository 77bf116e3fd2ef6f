"""Federated algorithms: one LightningModule each, with the client's and the server's side in one class."""

from fedamm_pl.algorithms.balancefl import BalanceFL
from fedamm_pl.algorithms.ccvr import CCVR
from fedamm_pl.algorithms.class_balanced import ClassBalanced
from fedamm_pl.algorithms.climb import Climb
from fedamm_pl.algorithms.creff import CReFF
from fedamm_pl.algorithms.crt import CRT
from fedamm_pl.algorithms.fedamm import FedAMM
from fedamm_pl.algorithms.fedavg import FedAvg
from fedamm_pl.algorithms.feddyn import FedDyn
from fedamm_pl.algorithms.fedetf import FedETF
from fedamm_pl.algorithms.fedfocal import FedFocal
from fedamm_pl.algorithms.fedgrab import FedGraB
from fedamm_pl.algorithms.fedic import FEDIC
from fedamm_pl.algorithms.fedlc import FedLC
from fedamm_pl.algorithms.fedloge import FedLoGe
from fedamm_pl.algorithms.fednh import FedNH
from fedamm_pl.algorithms.fednova import FedNova
from fedamm_pl.algorithms.fednpc import FedNPC
from fedamm_pl.algorithms.fedprox import FedProx
from fedamm_pl.algorithms.fedrela import FedReLa
from fedamm_pl.algorithms.fedrod import FedRoD
from fedamm_pl.algorithms.fedrs import FedRS
from fedamm_pl.algorithms.fedyoyo import FedYoYo
from fedamm_pl.algorithms.logit_adjusted import LogitAdjusted
from fedamm_pl.algorithms.lws import LWS
from fedamm_pl.algorithms.meta_finetune import MetaFineTune
from fedamm_pl.algorithms.moon import Moon
from fedamm_pl.algorithms.ratio_loss import RatioLoss
from fedamm_pl.algorithms.rucr import RUCR
from fedamm_pl.algorithms.scaffold import Scaffold
from fedamm_pl.algorithms.tau_normalized import TauNormalized

__all__ = [
    "CCVR",
    "CRT",
    "FEDIC",
    "LWS",
    "RUCR",
    "BalanceFL",
    "CReFF",
    "ClassBalanced",
    "Climb",
    "FedAMM",
    "FedAvg",
    "FedDyn",
    "FedETF",
    "FedFocal",
    "FedGraB",
    "FedLC",
    "FedLoGe",
    "FedNH",
    "FedNPC",
    "FedNova",
    "FedProx",
    "FedRS",
    "FedReLa",
    "FedRoD",
    "FedYoYo",
    "LogitAdjusted",
    "MetaFineTune",
    "Moon",
    "RatioLoss",
    "Scaffold",
    "TauNormalized",
]
