"""Training routers while the backbone stays frozen."""

from .config import Recipe, training_arguments
from .objective import Counterfactual, Multipliers, Objective, Soft, Step, StraightThrough, make_objective

__all__ = [
    "Counterfactual",
    "Multipliers",
    "Objective",
    "Recipe",
    "Soft",
    "Step",
    "StraightThrough",
    "make_objective",
    "training_arguments",
]
