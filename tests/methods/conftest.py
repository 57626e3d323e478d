"""What tests of methods share."""

import pytest
import torch


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
