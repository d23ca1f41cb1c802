"""taming-transformers, and the programs that keep its names: latent diffusion, Chameleon, IBQ, OptVQ, VQGAN-LC, RQ-VAE.

P. Esser, R. Rombach, B. Ommer: Taming Transformers for High-Resolution Image Synthesis,
https://arxiv.org/abs/2012.09841; https://github.com/CompVis/taming-transformers.
"""

from typing import Any

from torch import Tensor

from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, preprocessing
from vistok.hub.importers.convolutional import TAMING, keep_mean, vqgan
from vistok.quantizer import Quantizer
from vistok.tokenizer import Tokenizer

TRUNK = ("encoder.down.0.block.0.conv1.weight", "encoder.mid.block_1.conv1.weight", "quant_conv.weight")
# Of the training: losses, the colours in which Lightning logs segmentations, sums behind codebooks that are averages.
LOSSES = (
    *("loss.*", "discriminator.*", "perceptual_loss.*", "colorize"),
    *("quantize.embedding.cluster_size", "quantize.embedding.embed_avg"),
)
HEIBOX = "https://heibox.uni-heidelberg.de/d/"
LATENT_DIFFUSION = "https://ommer-lab.com/files/latent-diffusion/"


def prepared(checkpoint: Checkpoint, **more: Any) -> dict[str, Any]:
    """OpenCV's bilinear filter without antialiasing, as albumentations' SmallestMaxSize uses it."""
    return preprocessing(checkpoint, filter="bilinear", antialias=False, **more)


def nearest(checkpoint: Checkpoint) -> tuple[Quantizer, dict[str, Tensor]]:
    """The quantizer that takes the nearest code, and its tensors; option ``whole_codebook`` as for `convert`."""
    if "quantize.used" in checkpoint:
        if not checkpoint.option("whole_codebook", False):
            raise ValueError(
                "the program renumbers the codes that are in quantize.used and draws random numbers for the others: "
                "give whole_codebook=true for indices into the whole codebook; entry i of quantize.used is the code "
                "that the program calls i"
            )
        checkpoint.drop("quantize.used")
    table = checkpoint.take("quantize.embedding.weight")
    return codebook(table), {"table": table}


def gumbel(checkpoint: Checkpoint) -> tuple[Quantizer, dict[str, Tensor]]:
    """The quantizer of the best score of a linear layer, of the codes in use where the program renumbers them."""
    state = {"table": checkpoint.take("quantize.embed.weight")}
    state |= {f"scores.{name}": checkpoint.take(f"quantize.proj.{name}") for name in ("weight", "bias")}
    if "quantize.used" in checkpoint:
        used = checkpoint.take("quantize.used").long()
        state = {name: value[used] for name, value in state.items()}
    choices = {"distance": "linear", "assignment": "gumbel", "gradient": "soft", "prior_weight": 5e-4}
    return codebook(state["table"], **choices), state


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The nearest code; the Gumbel variant takes the best score of a linear layer, without noise.

    Option: ``whole_codebook`` (false), for indices into all codes where the program renumbers those in use (``remap``)
    and draws a random one of these in the place of another.
    """
    checkpoint.drop(*LOSSES)
    quantizer, state = (gumbel if "quantize.embed.weight" in checkpoint else nearest)(checkpoint)
    return vqgan(checkpoint, TAMING, quantizer, state, prepared(checkpoint))


def convert_ibq(checkpoint: Checkpoint) -> Tokenizer:
    """The code of the largest dot product, which need not be the nearest."""
    checkpoint.drop(*LOSSES)
    table = checkpoint.take("quantize.embedding.weight")
    quantizer = codebook(table, distance="dot", gradient="soft")
    return vqgan(checkpoint, TAMING, quantizer, {"table": table}, prepared(checkpoint))


def convert_kl(checkpoint: Checkpoint) -> Tokenizer:
    """Continuous codes: the mean of the posterior."""
    checkpoint.drop(*LOSSES, "logvar")
    return vqgan(checkpoint, TAMING, keep_mean(checkpoint), {}, prepared(checkpoint))


PLAIN = (*TRUNK, "quantize.embedding.weight")
FAMILY = Family(
    name="taming",
    title="VQGAN of taming-transformers and latent diffusion, https://github.com/CompVis/taming-transformers",
    marks=(*TRUNK, "quantize.emb*.weight"),
    convert=convert,
    published=(
        Published("imagenet-f16-1024", HEIBOX + "8088892a516d4e3baf92", "ckpts/last.ckpt", 72.1, "MIT"),
        Published("imagenet-f16-16384", HEIBOX + "a7530b09fed84f80a887", "ckpts/last.ckpt", 76.1, "MIT"),
        Published("gumbel-f8", HEIBOX + "2e5662443a6b4307b470", "ckpts/last.ckpt", 69.0, "MIT"),
        Published("ldm-f4", LATENT_DIFFUSION + "vq-f4.zip", "model.ckpt", 55.3, "MIT"),
        Published("ldm-f4-noattn", LATENT_DIFFUSION + "vq-f4-noattn.zip", "model.ckpt", 55.3, "MIT"),
        Published("ldm-f8", LATENT_DIFFUSION + "vq-f8.zip", "model.ckpt", 67.7, "MIT"),
        Published("ldm-f8-n256", LATENT_DIFFUSION + "vq-f8-n256.zip", "model.ckpt", 67.7, "MIT"),
        Published("ldm-f16", LATENT_DIFFUSION + "vq-f16.zip", "model.ckpt", 69.6, "MIT"),
    ),
)
IBQ = Family(
    name="ibq",
    title="IBQ of SEED-Voken, https://github.com/TencentARC/SEED-Voken",
    marks=PLAIN,
    convert=convert_ibq,
    published=(
        # The generators of these four take the moving averages.
        *(
            Published(
                str(size),
                f"TencentARC/IBQ-Tokenizer-{size}",
                f"imagenet256_{size}.ckpt",
                millions,
                "Apache-2.0",
                {"weights": "ema"},
            )
            for size, millions in ((1024, 107.1), (8192, 108.9), (16384, 111.0), (262144, 173.9))
        ),
        *(
            Published(
                f"{size}-pretrain",
                f"TencentARC/IBQ-Tokenizer-{size}-Pretrain",
                f"IBQ_pretrain_{size}.ckpt",
                millions,
                "Apache-2.0",
            )
            for size, millions in ((16384, 111.0), (262144, 173.9))
        ),
        # Of Emu3.5: the same program with twice the channels, and 131072 codes.
        Published("emu3.5", "BAAI/Emu3.5-VisionTokenizer", "model.ckpt", 455.3, "Apache-2.0"),
    ),
)
KL = Family(
    name="ldm_kl",
    title="Autoencoders with a KL term of latent diffusion, https://github.com/CompVis/latent-diffusion",
    marks=TRUNK,
    convert=convert_kl,
    published=tuple(
        Published(f"f{factor}", f"{LATENT_DIFFUSION}kl-f{factor}.zip", "model.ckpt", None, "MIT")
        for factor in (4, 8, 16, 32)
    ),
)
CHAMELEON = Family(
    name="chameleon",
    title="Chameleon, https://github.com/facebookresearch/chameleon",
    marks=PLAIN,
    convert=convert,
    published=(
        Published(
            "vqgan",
            "https://github.com/facebookresearch/chameleon",
            "data/tokenizer/vqgan.ckpt",
            68.7,
            "Chameleon Research License",
            {"size": 512},
        ),
    ),
)
