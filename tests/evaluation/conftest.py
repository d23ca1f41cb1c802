"""Fixtures of the evaluation tests; imported late, since the hook that checks shapes has to come before vistok."""

import pytest


@pytest.fixture
def tokenizer():
    from patch_tokenizer import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def batches():
    from patch_tokenizer import make_batches

    return make_batches(5, 5, 3)
