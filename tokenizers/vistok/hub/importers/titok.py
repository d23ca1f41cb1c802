"""TiTok: images as short sequences of tokens; and TA-TiTok, whose decoder is given a text too.

Q. Yu et al.: An Image is Worth 32 Tokens for Reconstruction and Generation, https://arxiv.org/abs/2406.07550;
D. Kim et al.: Democratizing Text-to-Image Masked Generative Models, https://arxiv.org/abs/2501.07730;
https://github.com/bytedance/1d-tokenizer.
"""

from typing import Any

from torch import Tensor

from vistok.decoder import TiTokDecoder
from vistok.encoder import TiTokEncoder
from vistok.hub.checkpoint import entries
from vistok.hub.importers.base import Checkpoint, Family, Published, fill, preprocessing, square_root
from vistok.hub.importers.maskgit import MASKGIT, take_decoder
from vistok.hub.importers.transformer import CLIP_NAMES, from_unit_range, head_count, take_renamed, to_signed_range
from vistok.quantizer import Identity, Quantizer, VectorQuantizer
from vistok.tokenizer import Tokenizer

NAMES = {
    **CLIP_NAMES,
    r"text_guidance_positional_embedding": "text_positions",
    r"text_guidance_proj": "from_texts",
    r"latent_token_positional_embedding": "trunk.latent_positions",
    r"positional_embedding": "trunk.positions.table",
    r"class_embedding": "trunk.class_token",
    r"patch_embed\.": "patch_embedding.",
    r"^latent_tokens": "encoder.latent_tokens",
    r"encoder\.conv_out": "to_codes",
    r"decoder\.decoder_embed": "from_codes",
    r"decoder\.ffn\.0": "decoder.head.0",
    r"decoder\.ffn\.2": "decoder.conv_out",
    r"pixel_quantize\.embedding\.weight": "decoder.teacher_codebook",
    r"quantize\.embedding\.weight": "quantizer.table",
}
# Codes of so few channels have unit length in the published models.
MAX_UNIT_NORM_DIM = 16


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """A sequence of codes; those of the two-stage models mix tokens and channels as in training.

    Options: ``num_heads``, or ``num_heads_encoder`` and ``num_heads_decoder``; and ``unit_norm`` (codes of unit length;
    without it what ``config.json`` says, or what is so in the published models).
    """
    width, channels, patch_size, _ = checkpoint.shape("encoder.patch_embed.weight")
    side = square_root(checkpoint.shape("encoder.positional_embedding")[0] - 1, "positions")
    legacy = "decoder.conv_out.weight" not in checkpoint
    image_size = side * patch_size
    shared: dict[str, Any] = {
        "channels": channels,
        "image_size": image_size,
        "num_tokens": checkpoint.shape("latent_tokens")[0],
    }
    encoder = TiTokEncoder(**shared, **_sizes(checkpoint, "encoder", width), patch_size=patch_size, legacy=legacy)
    values: dict[str, Tensor] = {}
    more: dict[str, Any] = {}
    if legacy:
        more["teacher_codebook_size"] = checkpoint.shape("decoder.ffn.2.weight")[0]
        if "pixel_decoder.conv_in.weight" in checkpoint:
            more["pixel_decoder"], values = take_decoder(
                checkpoint, MASKGIT, "pixel_decoder.", "decoder.pixel_decoder."
            )
    if "decoder.text_guidance_proj.weight" in checkpoint:
        more["text_dim"] = checkpoint.shape("decoder.text_guidance_proj.weight")[1]
        more["text_length"] = checkpoint.shape("decoder.text_guidance_positional_embedding")[0]
    decoder_width = checkpoint.shape("decoder.mask_token")[-1]
    # The patches of the decoder may have another size.
    decoder_side = square_root(checkpoint.shape("decoder.positional_embedding")[0] - 1, "positions of the decoder")
    decoder = TiTokDecoder(
        **shared,
        **_sizes(checkpoint, "decoder", decoder_width),
        patch_size=image_size // decoder_side,
        **more,
    )
    # Only for training: the usage of codes, and the encoder of the teacher.
    checkpoint.drop("quantize.embed_prob", "loss.*")
    values |= take_renamed(checkpoint, NAMES)
    quantizer: Quantizer
    if "quantizer.table" in values:
        size, dim = values["quantizer.table"].shape
        stated = entries(entries(checkpoint.config.get("model")).get("vq_model"))
        unit_norm = checkpoint.option("unit_norm", stated.get("use_l2_norm", dim <= MAX_UNIT_NORM_DIM))
        quantizer = VectorQuantizer(size, dim, distance="cosine" if unit_norm else "euclidean")
    else:
        dim = len(values["to_codes.bias"]) // 2  # the mean; the other half is the log-variance
        values |= {name: values[name][:dim] for name in ("to_codes.weight", "to_codes.bias")}
        quantizer = Identity(dim)
    from_unit_range(values, "encoder.patch_embedding.weight", "encoder.patch_embedding.bias")
    if not legacy:
        to_signed_range(values, "decoder.conv_out.weight", "decoder.conv_out.bias")
    prepared = preprocessing(checkpoint, filter="bicubic", range=(0, 1), size=image_size)
    return fill(Tokenizer(encoder, quantizer, decoder, preprocessing=prepared), values)


def _sizes(checkpoint: Checkpoint, part: str, width: int) -> dict[str, Any]:
    return {
        "width": width,
        "depth": checkpoint.count(part + ".transformer.{}.ln_1.weight"),
        "num_heads": head_count(checkpoint, width, part),
        "mlp_ratio": checkpoint.shape(f"{part}.transformer.0.mlp.c_fc.weight")[0] / width,
    }


FAMILY = Family(
    name="titok",
    title="TiTok, https://github.com/bytedance/1d-tokenizer",
    marks=("latent_tokens", "encoder.patch_embed.weight", "decoder.mask_token"),
    convert=convert,
    published=tuple(
        Published(
            name, f"yucornetto/tokenizer_titok_{repository}_imagenet", "model.safetensors", millions, "Apache-2.0"
        )
        for name, repository, millions in (
            ("l-32", "l32", 641.1),
            ("b-64", "b64", 204.8),
            ("s-128", "s128", 83.7),
            ("bl-64-vq8k", "bl64_vq8k", 390.0),
            ("bl-128-vq8k", "bl128_vq8k", 390.2),
            ("sl-256-vq8k", "sl256_vq8k", 330.3),
            ("ll-32-vae", "ll32_vae_c16", 606.9),
            ("bl-64-vae", "bl64_vae_c16", 389.4),
            ("bl-128-vae", "bl128_vae_c16", 389.6),
        )
    ),
)
TEXT_FAMILY = Family(
    name="tatitok",
    title="TA-TiTok, https://github.com/bytedance/1d-tokenizer",
    marks=(*FAMILY.marks, "decoder.text_guidance_proj.weight"),
    convert=convert,
    published=tuple(
        Published(
            f"{name}-{kind}",
            f"turkeyju/tokenizer_tatitok_{name.replace('-', '')}_{kind}",
            "model.safetensors",
            390.8 if (name, kind) == ("bl-32", "vq") else None,
            "Apache-2.0",
        )
        for name, kind in (
            ("bl-32", "vq"),
            ("bl-64", "vq"),
            ("bl-128", "vq"),
            ("bl-32", "vae"),
            ("bl-64", "vae"),
            ("sl-128", "vae"),
        )
    ),
)
