"""Folders of diffusers: ``VQModel``, also with spatial normalisation (MoVQ), and ``AutoencoderKL``.

https://github.com/huggingface/diffusers.
"""

import re

from vistok.decoder import CNNDecoder, MoVQDecoder
from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, preprocessing
from vistok.hub.importers.convolutional import keep_mean, vqgan
from vistok.hub.importers.movq import SPATIAL
from vistok.hub.importers.trunk import Dialect
from vistok.quantizer import Quantizer
from vistok.tokenizer import Tokenizer

DIFFUSERS = Dialect(
    down="down_blocks.{}",
    up="up_blocks.{}",
    residual="resnets.{}",
    attention="attentions.{}",
    downsample="downsamplers.0.conv",
    upsample="upsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    coarsest_first=True,
    qkv=("to_q", "to_k", "to_v"),
    leaves=(
        *SPATIAL,
        (r"^shortcut$", "conv_shortcut"),
        (r"^projection$", "to_out.0"),
        (r"^norm_out", "conv_norm_out"),
        (r"^norm\.", "spatial_norm."),
        (r"^norm$", "group_norm"),
    ),
)
# Names of self-attention before version 0.15.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Settings that no tensor tells, and the values with which the architecture is ours.
EXPECTED = {"norm_num_groups": 32, "act_fn": "silu", "lookup_from_codebook": False}


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The nearest code, or the mean of the posterior where there is no codebook; latents are not scaled."""
    for name, value in EXPECTED.items():
        found = checkpoint.config.get(name, value)
        if found != value:
            raise ValueError(f"config.json has {name}={found}, only {value} is supported")
    for name in list(checkpoint.tensors):
        renamed = re.sub(r"\.(query|key|value|proj_attn)\.", lambda match: f".{OLD_NAMES[match[1]]}.", name)
        checkpoint.tensors[renamed] = checkpoint.tensors.pop(name)
    spatial = "decoder.conv_norm_out.conv_y.weight" in checkpoint
    projection = "linear" if "post_quant_conv.weight" in checkpoint else "none"
    if "quantize.embedding.weight" in checkpoint:
        table = checkpoint.take("quantize.embedding.weight")
        quantizer: Quantizer = codebook(table)
        state = {"table": table}
    else:
        quantizer, state = keep_mean(checkpoint), {}
    scaling = {
        name: checkpoint.config[name] for name in ("scaling_factor", "shift_factor") if checkpoint.config.get(name)
    }
    size = checkpoint.config.get("sample_size")
    prepared = preprocessing(checkpoint, filter="lanczos", size=size if isinstance(size, int) else 256, **scaling)
    decoder = MoVQDecoder if spatial else CNNDecoder
    return vqgan(checkpoint, DIFFUSERS, quantizer, state, prepared, decoder, projection)


FAMILY = Family(
    name="diffusers",
    title="VQModel and AutoencoderKL of diffusers, https://github.com/huggingface/diffusers",
    marks=("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"),
    convert=convert,
    published=(
        Published("sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse", "diffusion_pytorch_model.safetensors", 83.7, "MIT"),
        Published(
            "movq",
            "kandinsky-community/kandinsky-2-2-decoder",
            "movq/diffusion_pytorch_model.safetensors",
            67.8,
            "Apache-2.0",
        ),
    ),
)
