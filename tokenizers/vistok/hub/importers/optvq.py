"""OptVQ: heads of channels, all quantized by one projected codebook.

B. Zhang et al.: Preventing Local Pitfalls in Vector Quantization via Optimal Transport,
https://arxiv.org/abs/2412.15195; https://github.com/zbr17/OptVQ.
"""

from vistok.hub.importers.base import Checkpoint, Family, Published
from vistok.hub.importers.convolutional import TAMING, vqgan
from vistok.hub.importers.taming import LOSSES, PLAIN, prepared
from vistok.quantizer import GroupedQuantizer, VectorQuantizer
from vistok.tokenizer import Tokenizer


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The nearest code of each head, on the last axis of the indices.

    The original looks for a transport plan over the whole batch in evaluation too, so that the codes of an image depend
    on the images beside it; here they do not.
    """
    checkpoint.drop(*LOSSES)
    table = checkpoint.take("quantize.embedding.weight")
    state = {f"projection.{name}": checkpoint.take(f"quantize.proj.{name}") for name in ("weight", "bias")}
    state["table"] = table
    size, width = table.shape
    dim = checkpoint.shape("quant_conv.weight")[0]
    part = VectorQuantizer(size, width, projection="linear", assignment="sinkhorn")
    if dim == width:
        return vqgan(checkpoint, TAMING, part, state, prepared(checkpoint))
    quantizer = GroupedQuantizer(part, dim // width, shared=True, dim=dim)
    state = {f"quantizers.0.{name}": value for name, value in state.items()}
    return vqgan(checkpoint, TAMING, quantizer, state, prepared(checkpoint))


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
