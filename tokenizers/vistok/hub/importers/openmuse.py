"""open-muse's ``VQGANModel``: the names of taming-transformers, images in [0, 1].

S. Patil et al.: aMUSEd: An Open MUSE Reproduction, https://arxiv.org/abs/2401.01808;
https://github.com/huggingface/open-muse. Its ``MaskGitVQGAN`` has the names of family ``maskgit``; aMUSEd publishes the
same VQGAN as ``VQModel`` of diffusers.
"""

from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, preprocessing
from vistok.hub.importers.convolutional import TAMING, to_unit_range, vqgan
from vistok.hub.importers.taming import PLAIN
from vistok.tokenizer import Tokenizer


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The nearest code. Self-attention of a level with one residual block is left out, as the program does."""
    if any(name.startswith("decoder.mid.extra_mid_res_blocks.") for name in checkpoint.tensors):
        raise ValueError("its decoder has further residual blocks in the middle (extra_mid_res_blocks): not supported")
    for part, level in (("encoder", "down"), ("decoder", "up")):
        if f"{part}.{level}.0.block.1.conv1.weight" not in checkpoint:
            checkpoint.drop(f"{part}.{level}.*.attn.*")
    table = checkpoint.take("quantize.embedding.weight")
    prepared = preprocessing(checkpoint, filter="bilinear", range=(0, 1))
    options = to_unit_range(checkpoint)
    return vqgan(checkpoint, TAMING, codebook(table), {"table": table}, prepared, encoder_options=options)


FAMILY = Family(
    name="openmuse",
    title="VQGANModel of open-muse, https://github.com/huggingface/open-muse",
    marks=PLAIN,
    convert=convert,
    published=(
        # The program asks for a file of this name in any repository.
        Published("vqgan-f16-8192-laion", "openMUSE/vqgan-f16-8192-laion", "pytorch_model.bin", 146.2),
    ),
)
