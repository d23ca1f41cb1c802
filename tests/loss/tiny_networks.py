"""Networks with random weights that tests load from files, and reconstructions to judge."""

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from vistok.quantizer import Quantized
from vistok.tokenizer import Reconstruction

VIT, CNN = "test_vit", "test_resnet"


def save_networks(folder):
    """Small networks of timm in the form of `vistok.loss.FrozenBackbone`."""
    torch.manual_seed(1)
    for model in (VIT, CNN):
        save_file(timm.create_model(model).state_dict(), folder / f"{model}.safetensors")
    return folder


def reconstruction(images, codes=None, features=None):
    """What a tokenizer returns, of given tensors."""
    codes = torch.zeros(len(images), 4, 2, 2) if codes is None else codes
    indices = torch.zeros(len(images), *codes.shape[2:], dtype=torch.int64)
    return Reconstruction(images, Quantized(codes, indices, {}), codes if features is None else features)


def judge(loss, ours, images, **arguments):
    """Values of a loss for images and what they were decoded to."""
    return loss(reconstruction(ours), {"images": images}, **arguments)


class TinyText(nn.Module):
    """Mean embedding of the letters of a text."""

    def __init__(self, dim=5):
        super().__init__()
        self.letters = nn.EmbeddingBag(128, dim)
        self.dim = dim

    def forward(self, texts):
        return torch.cat([self.letters(torch.tensor([[ord(letter) for letter in text]])) for text in texts])
