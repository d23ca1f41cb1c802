"""LlamaGen and what keeps its names: Janus, Halton-MaskGIT, ControlAR; and Janus by the names of transformers.

P. Sun et al.: Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation,
https://arxiv.org/abs/2406.06525; https://github.com/FoundationVision/LlamaGen.
"""

from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, preprocessing
from vistok.hub.importers.convolutional import vqgan
from vistok.hub.importers.trunk import Dialect
from vistok.tokenizer import Tokenizer

LLAMAGEN = Dialect(
    down="conv_blocks.{}",
    up="conv_blocks.{}",
    residual="res.{}",
    middle=("mid.0", "mid.1", "mid.2"),
    coarsest_first=True,
)

TRANSFORMERS = Dialect(coarsest_first=True)


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """Codes and features have unit length, in the search and in what is decoded, without option ``unit_norm`` (false).

    The encoder of transformers forgets the first, so that 40 % of its indices are others than the original's.
    """
    # Usage of the codes in the last batches of training.
    checkpoint.drop("quantize.codebook_used")
    table = checkpoint.take("quantize.embedding.weight")
    quantizer = codebook(table, distance="cosine" if checkpoint.option("unit_norm", True) else "euclidean")
    # The program halves large pictures by box filters before it resizes them.
    prepared = preprocessing(checkpoint, filter="bicubic", mode="adm")
    dialect = LLAMAGEN if "encoder.conv_blocks.0.res.0.conv1.weight" in checkpoint else TRANSFORMERS
    return vqgan(checkpoint, dialect, quantizer, {"table": table}, prepared)


FAMILY = Family(
    name="llamagen",
    title="LlamaGen, https://github.com/FoundationVision/LlamaGen",
    marks=("encoder.conv_blocks.*", "quantize.embedding.weight", "quant_conv.weight"),
    convert=convert,
    published=(
        Published("vq-16", "FoundationVision/LlamaGen", "vq_ds16_c2i.pt", 71.9, "MIT"),
        Published("vq-8", "FoundationVision/LlamaGen", "vq_ds8_c2i.pt", 70.1, "MIT"),
        Published("vq-16-t2i", "peizesun/llamagen_t2i", "vq_ds16_t2i.pt", 71.9, "MIT"),
        Published("janus-1.3b", "deepseek-ai/Janus-1.3B", None, 71.9, "DeepSeek Model License", {"size": 384}),
        Published("janus-pro-1b", "deepseek-ai/Janus-Pro-1B", "pytorch_model.bin", 71.9, options={"size": 384}),
        # In pieces, which a folder takes.
        Published("janus-pro-7b", "deepseek-ai/Janus-Pro-7B", None, 71.9, options={"size": 384}),
    ),
)
