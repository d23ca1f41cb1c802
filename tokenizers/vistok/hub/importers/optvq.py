"""OptVQ: heads of channels, all quantized by one projected codebook.

B. Zhang et al.: Preventing Local Pitfalls in Vector Quantization via Optimal Transport,
https://arxiv.org/abs/2412.15195; https://github.com/zbr17/OptVQ.
"""

from torch import Tensor

from vistok.hub.importers.base import Checkpoint, Family, Published, codebook
from vistok.hub.importers.convolutional import TAMING, projection_kind, vqgan
from vistok.hub.importers.taming import LOSSES, PLAIN, prepared
from vistok.quantizer import GroupedQuantizer, Quantizer, VectorQuantizer
from vistok.tokenizer import Tokenizer


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The nearest code of each head, on the last axis of the indices.

    The original looks for a transport plan over the whole batch in evaluation too, so that the codes of an image depend
    on the images beside it; here they do not.
    """
    checkpoint.drop(*LOSSES)
    state: dict[str, Tensor] = {"table": checkpoint.take("quantize.embedding.weight")}
    size, width = state["table"].shape
    if "quantize.proj.weight" in checkpoint:
        state |= {f"projection.{name}": checkpoint.take(f"quantize.proj.{name}") for name in ("weight", "bias")}
        part = VectorQuantizer(size, width, projection="linear", assignment="sinkhorn")
    else:
        part = codebook(state["table"], assignment="sinkhorn")
    projection = projection_kind(checkpoint)
    layer = "encoder.conv_out.weight" if projection == "none" else "quant_conv.weight"
    heads, rest = divmod(checkpoint.shape(layer)[0], width)
    if rest:
        raise ValueError(f"{layer} makes {checkpoint.shape(layer)[0]} channels, no multiple of the {width} of a code")
    quantizer: Quantizer = part
    if heads > 1:
        quantizer = GroupedQuantizer(part, heads, shared=True)
        state = {f"quantizers.0.{name}": value for name, value in state.items()}
    return vqgan(checkpoint, TAMING, quantizer, state, prepared(checkpoint), projection=projection)


FAMILY = Family(
    name="optvq",
    title="OptVQ, https://github.com/zbr17/OptVQ",
    marks=(*PLAIN, "quantize.proj.weight"),
    convert=convert,
    published=(
        Published("16x16x4", "BorelTHU/optvq-16x16x4", "model.safetensors", 72.9),
        Published("16x16x8", "BorelTHU/optvq-16x16x8", "model.safetensors", 72.4),
    ),
)
