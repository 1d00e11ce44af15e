"""Training routers while the backbone stays frozen."""

from ..examples import load_examples, save_examples
from .calibration import Calibration, calibrate
from .config import Recipe, training_arguments
from .data import PackedCollator, PaddedCollator, RouterDataset
from .dry_run import Cost
from .objective import Counterfactual, EvenOdds, Multipliers, Objective, Soft, Step, StraightThrough, make_objective
from .trainer import FluxTrainer

__all__ = [
    "Calibration",
    "Cost",
    "Counterfactual",
    "EvenOdds",
    "FluxTrainer",
    "Multipliers",
    "Objective",
    "PackedCollator",
    "PaddedCollator",
    "Recipe",
    "RouterDataset",
    "Soft",
    "Step",
    "StraightThrough",
    "calibrate",
    "load_examples",
    "make_objective",
    "save_examples",
    "training_arguments",
]
