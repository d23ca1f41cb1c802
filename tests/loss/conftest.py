"""Weights of small networks, shared by the tests of this folder."""

import pytest
from tiny_networks import save_networks


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """Folder with the weights of two networks of timm."""
    return save_networks(tmp_path_factory.mktemp("timm"))
