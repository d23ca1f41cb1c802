"""Fixtures of the evaluation tests."""

import pytest
from patch_tokenizer import make_batches, make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def batches():
    return make_batches(5, 5, 3)
