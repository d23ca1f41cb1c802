"""TiTok in two stages: predict the tokens of another tokenizer, then train with its decoder behind."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_runs import TINY

import vistok
from vistok.decoder import CNNDecoder, TiTokDecoder
from vistok.encoder import CNNEncoder, TiTokEncoder
from vistok.loss import TokenPrediction
from vistok.quantizer import FSQ, ResidualQuantizer, VectorQuantizer
from vistok.training.pretrained import second_stage
from vistok.training.run import train

SIZES = {"patch_size": 8, "image_size": 16, "num_tokens": 4, "width": 16, "depth": 1, "num_heads": 2}
CODES = 12
TITOK = ["encoder=titok", "decoder=titok", *(f"encoder.{name}={value}" for name, value in SIZES.items())]


def teacher(quantizer=None, **options):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(CODES, 4) if quantizer is None else quantizer
    halves = CNNEncoder(base_channels=32, num_blocks=1), CNNDecoder(base_channels=32, num_blocks=1)
    return vistok.Tokenizer(halves[0], quantizer, halves[1], **options).eval()


def student(**options):
    decoder = TiTokDecoder(**SIZES | {"teacher_codebook_size": CODES} | options)
    return vistok.Tokenizer(TiTokEncoder(**SIZES), FSQ((5, 5)), decoder).eval()


@pytest.fixture
def run(compose_run):
    plain = [each for each in TINY if not each.startswith(("encoder.", "decoder."))]
    return lambda name, *overrides: compose_run(name, [*plain, "trainer.max_steps=4", "data.eval_size=16", *overrides])


def test_both_stages_train(run, tmp_path):
    bundle = vistok.save(teacher(), tmp_path / "teacher")
    monitor = "callbacks.checkpoint={monitor: val/tokens, mode: min}"
    stage1 = [
        monitor,
        "loss=titok_tokens",
        f"loss.terms.tokens.teacher={bundle}",
        f"decoder.teacher_codebook_size={CODES}",
    ]
    config, first = run("first", *TITOK, *stage1)
    train(config, first)
    start = vistok.save(second_stage(vistok.load(first), vistok.load(bundle)), tmp_path / "start")
    frozen = "module.freeze=[encoder,to_codes,quantizer]"
    config, second = run(
        "second", f"pretrained.load={start}", frozen, "trainer.max_steps=2", "scheduler.warmup_steps=0"
    )
    assert train(config, second)["psnr"] > 0
    before, after = (load_file(folder / "bundle" / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith(("encoder.", "to_codes.")))
    assert not torch.equal(before["decoder.conv_out.weight"], after["decoder.conv_out.weight"])


def test_the_loss_is_the_cross_entropy_of_the_tokens_of_the_teacher(tmp_path):
    bundle = vistok.save(teacher(), tmp_path / "teacher")
    term, tokenizer = TokenPrediction(bundle), student()
    term.attach(tokenizer)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    reconstruction = tokenizer(images)
    tokens = teacher().encode(images).indices
    chosen = reconstruction.images.log_softmax(1).gather(1, tokens[:, None])
    torch.testing.assert_close(term(reconstruction, {"images": images}), -chosen.mean())
    assert not list(term.parameters())


@pytest.mark.parametrize("projection", ["linear", "none"])
def test_the_second_stage_begins_with_the_pictures_of_the_teacher(projection):
    # Logits that are certain of the teacher's tokens decode to what the teacher decodes.
    other = teacher(VectorQuantizer(CODES, 4 if projection == "linear" else 32), projection=projection)
    tokenizer = second_stage(student(), other)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    tokens = other.encode(images).indices
    logits = 1e4 * F.one_hot(tokens, CODES).float().movedim(-1, 1)
    tokenizer.decoder.conv_out = Constant(logits)
    with torch.no_grad():
        torch.testing.assert_close(tokenizer(images).images, other.decode_indices(tokens), rtol=1e-4, atol=1e-5)


class Constant(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, inputs):
        return self.value


def test_stages_that_do_not_fit_are_errors(tmp_path):
    bundle = vistok.save(teacher(), tmp_path / "teacher")
    with pytest.raises(
        ValueError, match=r"logits of the 12 codes .* set decoder=titok decoder.teacher_codebook_size=12"
    ):
        TokenPrediction(bundle).attach(student(teacher_codebook_size=7))
    with pytest.raises(ValueError, match="got a TiTokDecoder of 7 tokens and a teacher with 12 codes"):
        second_stage(student(teacher_codebook_size=7), teacher())
    residual = vistok.save(teacher(ResidualQuantizer(VectorQuantizer(CODES, 4), depth=2)), tmp_path / "residual")
    with pytest.raises(ValueError, match=r"one token for each place of an image, .* has codebooks of \(12, 12\)"):
        TokenPrediction(residual)
