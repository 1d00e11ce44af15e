"""Shared settings of the tests."""

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_graphs() -> None:
    """The graphs of other tests count towards the limit beyond which a function runs uncompiled, without a word."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
