"""VQ-VAE in the manner of DeepMind's reference, as explore-weights of NimbleBox publishes it.

A. van den Oord, O. Vinyals, K. Kavukcuoglu: Neural Discrete Representation Learning, https://arxiv.org/abs/1711.00937.
"""

import torch
from torch import Tensor

from vistok.decoder import VQVAEDecoder
from vistok.encoder import VQVAEEncoder
from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, fill, preprocessing
from vistok.tokenizer import Tokenizer

BLOCK = "residual.residual_blocks.residual_{}._block"


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The nearest code. A linear layer follows the encoder, none precedes the decoder."""
    num_halvings = 0
    while f"decoder._blocks.conv_t_{num_halvings + 1}.weight" in checkpoint:
        num_halvings += 1
    first = "encoder._blocks." + BLOCK.format(0)
    hidden, width = checkpoint.shape(f"{first}.conv_1.weight")[:2]
    sizes = {
        "channels": checkpoint.shape("encoder._blocks.conv_1.weight")[1],
        "width": width,
        "num_halvings": num_halvings,
        "num_blocks": checkpoint.count("encoder._blocks." + BLOCK + ".conv_1.weight"),
        "hidden_channels": hidden,
        "block_bias": f"{first}.conv_1.bias" in checkpoint,
    }
    table = checkpoint.take("vq_vae.codebook.weight")
    dim = table.shape[1]
    encoder, decoder = VQVAEEncoder(**sizes), VQVAEDecoder(**sizes, z_channels=dim)
    values: dict[str, Tensor] = {
        "quantizer.table": table,
        "from_codes.weight": torch.eye(dim),
        "from_codes.bias": torch.zeros(dim),
    }
    values |= {f"to_codes.{name}": checkpoint.take(f"pre_vq_conv.{name}") for name in ("weight", "bias")}
    # The 3x3 convolution is the last one of the encoder and the first one of the decoder.
    for part, name, number in ((encoder, "encoder", num_halvings + 1), (decoder, "decoder", 1)):
        values |= {
            f"{name}.{key}": checkpoint.take(f"{name}._blocks.{_theirs(key, number)}") for key in part.state_dict()
        }
    # Inside, images are in [-0.5, 0.5], where grey is zero as in [-1, 1]: factors suffice.
    last = f"decoder.doublings.{num_halvings - 1}"
    for key, factor in (("encoder.halvings.0.weight", 0.5), (f"{last}.weight", 2), (f"{last}.bias", 2)):
        values[key] = values[key] * factor
    prepared = preprocessing(checkpoint, filter="bilinear", range=(-0.5, 0.5), size=32)
    tokenizer = Tokenizer(encoder, codebook(table), decoder, preprocessing=prepared)
    return fill(tokenizer, values)


def _theirs(key: str, num_convolutions: int) -> str:
    """The original name of a tensor; `num_convolutions` is the number of the 3x3 convolution."""
    part, *rest = key.split(".")
    if part == "blocks":
        number, conv, parameter = rest
        return f"{BLOCK.format(number)}.conv_{conv[-1]}.{parameter}"
    if part == "conv":
        return f"conv_{num_convolutions}.{rest[0]}"
    return ("conv_" if part == "halvings" else "conv_t_") + f"{int(rest[0]) + 1}.{rest[1]}"


FAMILY = Family(
    name="vqvae",
    title="VQ-VAE of NimbleBox explore-weights",
    marks=("encoder._blocks.conv_1.weight", "vq_vae.codebook.weight", "pre_vq_conv.weight"),
    convert=convert,
    published=(Published("nimblebox", "https://github.com/NimbleBoxAI/explore-weights", "vqvae.pt", 1.0, "MIT"),),
)
