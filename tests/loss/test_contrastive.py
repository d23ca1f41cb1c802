"""InfoNCE against its formula, and the terms that use it."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny_networks import CNN, TinyText, reconstruction

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.loss import FeatureContrast, OpenCLIPText, TextContrast, TransformersText, info_nce
from vistok.quantizer import FSQ

TEXTS = ["a red fox", "two boats", "snow on a roof"]


@pytest.fixture(scope="module")
def tokenizer():
    return vistok.Tokenizer(
        CNNEncoder(base_channels=32, num_blocks=1), FSQ((8, 5, 5)), CNNDecoder(base_channels=32, num_blocks=1)
    )


def by_definition(ours, theirs, scale):
    """Minus the mean log probability of the partner, over both directions, in float64."""
    total, count = 0.0, len(ours)
    for rows, others in ((ours, theirs), (theirs, ours)):
        for i in range(count):
            scores = [scale * (rows[i] @ other / (rows[i].norm() * other.norm())).item() for other in others.double()]
            total -= scores[i] - math.log(sum(math.exp(score) for score in scores))
    return total / (2 * count)


def batch(size=32):
    return {"images": torch.rand(len(TEXTS), 3, size, size) * 2 - 1, "texts": TEXTS}


@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_info_nce_is_its_formula(scale):
    ours, theirs = torch.randn(4, 6), torch.randn(4, 6)
    expected = by_definition(ours.double(), theirs.double(), scale)
    assert info_nce(ours, theirs, scale, gather=False).item() == pytest.approx(expected, rel=1e-5)


def test_info_nce_does_not_depend_on_which_side_is_which():
    ours, theirs = torch.randn(4, 6), torch.randn(4, 6)
    torch.testing.assert_close(info_nce(ours, theirs, 10.0, gather=True), info_nce(theirs, ours, 10.0, gather=True))


def test_texts_are_contrasted_with_the_mean_of_the_codes(tokenizer):
    term = TextContrast(TinyText())
    term.attach(tokenizer)
    codes, examples = torch.randn(3, 3, 2, 2), batch()
    value = term(reconstruction(examples["images"], codes), examples)
    images = term.head(codes.mean((2, 3), keepdim=True))[..., 0, 0]
    texts = term.text.network(TEXTS)
    assert value.item() == pytest.approx(by_definition(images.double(), texts.double(), 1 / 0.07), rel=1e-4)


def test_training_brings_codes_and_texts_together(tokenizer):
    term = TextContrast(TinyText())
    term.attach(tokenizer)
    codes, examples = torch.randn(3, 3, 2, 2), batch()
    optimizer = torch.optim.Adam(term.parameters(), lr=0.1)
    values = []
    for _ in range(50):
        value = term(reconstruction(examples["images"], codes), examples)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.1 * values[0]


@pytest.mark.parametrize("train_text", [False, True])
def test_the_text_encoder_learns_only_when_asked(train_text, tokenizer):
    text = TinyText()
    term = TextContrast(text, train_text=train_text)
    term.attach(tokenizer)
    examples = batch()
    codes = torch.randn(3, 3, 2, 2).requires_grad_()
    term(reconstruction(examples["images"], codes), examples).backward()
    assert codes.grad.abs().sum() > 0
    assert (text.letters.weight.grad is not None) == train_text
    assert ("text.letters.weight" in term.state_dict()) == train_text


@pytest.mark.parametrize("learn", [True, False])
def test_the_temperature_is_learned_unless_it_is_fixed(learn, tokenizer):
    term = TextContrast(TinyText(), temperature=1.0, learn_temperature=learn)
    term.attach(tokenizer)
    examples = batch()
    term(reconstruction(examples["images"], torch.randn(3, 3, 2, 2)), examples).backward()
    assert (term.log_scale.grad is not None) == learn


def test_the_temperature_stays_above_a_hundredth(tokenizer):
    term = TextContrast(TinyText(), temperature=0.01)
    term.attach(tokenizer)
    codes, examples = torch.randn(3, 3, 2, 2), batch()
    before = term(reconstruction(examples["images"], codes), examples)
    term.log_scale.data += 1
    torch.testing.assert_close(term(reconstruction(examples["images"], codes), examples), before)


@pytest.mark.parametrize(("texts", "count"), [(None, "none"), (["one"], "1")])
def test_a_batch_without_a_text_for_each_image_is_an_error(texts, count, tokenizer):
    term = TextContrast(TinyText())
    term.attach(tokenizer)
    examples = {**batch(), "texts": texts}
    with pytest.raises(ValueError, match=f"one text for each of the 3 images of a batch, got {count}: .*~loss.terms"):
        term(reconstruction(examples["images"], torch.zeros(3, 3, 2, 2)), examples)


def test_a_text_encoder_without_its_width_is_an_error():
    with pytest.raises(ValueError, match="Linear has no integer attribute dim"):
        TextContrast(torch.nn.Linear(1, 1))


def test_a_temperature_below_a_hundredth_is_an_error():
    with pytest.raises(ValueError, match=r"temperature must be at least 0.01, got 0.001"):
        TextContrast(TinyText(), temperature=0.001)


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (3, 3, 2, 32, 32)], ids=["images", "videos"])
def test_images_and_videos_are_contrasted_with_the_pooled_features_of_a_teacher(shape, networks, tokenizer):
    images = torch.rand(shape) * 2 - 1
    term = FeatureContrast(CNN, temperature=1.0, pretrained=networks, size=32)
    term.attach(tokenizer)
    codes = torch.randn(3, 3, 7)
    frames = images.unsqueeze(2) if images.ndim == 4 else images
    features = torch.stack([term.teacher.embedding(frames[:, :, t]) for t in range(frames.shape[2])]).mean(0)
    ours = term.head(codes.mean(2, keepdim=True))[..., 0]
    expected = by_definition(ours.double(), features.double(), 1.0)
    assert term(reconstruction(images, codes), {"images": images}).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("encoder", "module", "package"),
    [(OpenCLIPText, "open_clip", "open_clip_torch"), (TransformersText, "transformers", "transformers")],
)
def test_a_missing_library_is_named_with_its_package(encoder, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs {module}: pip install {package}"):
        encoder("any")


def test_open_clip_gives_what_its_model_gives():
    open_clip = pytest.importorskip("open_clip")
    text = OpenCLIPText("ViT-B-32").eval()
    embeddings = text.model.encode_text(open_clip.get_tokenizer("ViT-B-32")(TEXTS))
    torch.testing.assert_close(text(TEXTS), embeddings)
    assert embeddings.shape == (3, text.dim)
    assert not any(name.startswith("model.visual") for name in text.state_dict())


def test_features_of_all_positions_are_pooled_to_the_embeddings_of_open_clip():
    open_clip = pytest.importorskip("open_clip")
    text = OpenCLIPText("ViT-B-32", pooled=False).eval()
    features, ids = text(TEXTS), open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    assert features.shape == (3, 77, text.dim)
    ends = features[torch.arange(3), ids.argmax(1)]  # the end of a text has the largest id
    torch.testing.assert_close(ends @ text.model.text_projection, text.model.encode_text(ids))


def test_transformers_gives_what_its_model_gives(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[END]", "a", "red", "fox", "two", "boats"])}
    words_of = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    words_of.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_of, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(tmp_path)
    config = transformers.CLIPTextConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, projection_dim=6, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=5, eos_token_id=2, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    transformers.CLIPTextModelWithProjection(config).save_pretrained(tmp_path)
    text = TransformersText(str(tmp_path)).eval()
    assert text(["a red fox", "two boats a red fox two boats"]).shape == (2, text.dim) == (2, 6)
    torch.testing.assert_close(text(["a red fox", "two"])[:1], text(["a red fox"]), rtol=1e-4, atol=1e-5)
    words = TransformersText(str(tmp_path), pooled=False).eval()
    assert words(["a red fox"]).shape == (1, 5, words.dim) == (1, 5, 8)
    torch.testing.assert_close(words(["a red fox", "two"])[:1], words(["a red fox"]), rtol=1e-4, atol=1e-5)


def test_the_angle_decides_and_not_the_length():
    ours, theirs = torch.randn(4, 6), torch.randn(4, 6)
    torch.testing.assert_close(info_nce(3 * ours, theirs, 5.0, False), info_nce(F.normalize(ours), theirs, 5.0, False))
