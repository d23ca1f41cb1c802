"""Folders of diffusers: ``VQModel``, also with spatial normalisation (MoVQ) or of aMUSEd, and ``AutoencoderKL``.

https://github.com/huggingface/diffusers.
"""

import re

from vistok.decoder import CNNDecoder, MoVQDecoder
from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, preprocessing
from vistok.hub.importers.convolutional import keep_mean, projection_kind, to_unit_range, vqgan
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
# Facts about the latents that go into the preprocessing record.
LATENTS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The nearest code, or the mean of the posterior where there is no codebook; latents are not scaled.

    Options, for a file without its ``config.json``: ``norm_num_groups`` (32); ``unit_range``, whether images are in
    [0, 1] as in aMUSEd, which is what ``lookup_from_codebook`` tells where there is a config.
    """
    config = checkpoint.config
    activation = config.get("act_fn", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"config.json has act_fn={activation}, only silu is supported")
    groups = checkpoint.option("norm_num_groups", config.get("norm_num_groups") or 32)
    width = checkpoint.shape("encoder.conv_in.weight")[0]
    if width % groups:
        raise ValueError(
            f"{width} channels are no multiple of {groups} groups: give norm_num_groups as in config.json, or a folder "
            "with both files"
        )
    for name in list(checkpoint.tensors):
        renamed = re.sub(r"\.(query|key|value|proj_attn)\.", lambda match: f".{OLD_NAMES[match[1]]}.", name)
        checkpoint.tensors[renamed] = checkpoint.tensors.pop(name)
    spatial = "decoder.conv_norm_out.conv_y.weight" in checkpoint
    if "quantize.embedding.weight" in checkpoint:
        table = checkpoint.take("quantize.embedding.weight")
        quantizer: Quantizer = codebook(table)
        state = {"table": table}
    else:
        quantizer, state = keep_mean(checkpoint), {}
    latents = {name: config[name] for name in LATENTS if config.get(name)}
    unit_range = checkpoint.option("unit_range", config.get("lookup_from_codebook", False))
    size = config.get("sample_size")
    prepared = preprocessing(
        checkpoint,
        filter="lanczos",
        range=(0, 1) if unit_range else (-1, 1),
        size=size if isinstance(size, int) else 256,
        **latents,
    )
    return vqgan(
        checkpoint,
        DIFFUSERS,
        quantizer,
        state,
        prepared,
        MoVQDecoder if spatial else CNNDecoder,
        projection_kind(checkpoint),
        {"num_groups": groups} | (to_unit_range(checkpoint) if unit_range else {}),
        # Those that the codes modulate have 32 groups whatever the config says.
        {} if spatial else {"num_groups": groups},
    )


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
        *(
            Published(
                f"amused-{size}",
                f"amused/amused-{size}",
                "vqvae/diffusion_pytorch_model.safetensors" if size == 256 else None,
                146.2,
                "OpenRAIL++",
                {"unit_range": True, "size": size},
            )
            for size in (256, 512)
        ),
    ),
)
