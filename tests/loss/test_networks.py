"""Losses that look through networks of timm: what the networks see, and which latents they judge."""

import os

import pytest
import timm
import torch
import torch.nn.functional as F
from skimage import data
from tiny_networks import CNN, VIT, reconstruction
from torch import nn

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.loss import (
    FeatureContrast,
    FeatureDistillation,
    FrozenBackbone,
    LatentAlignment,
    PerceptualLoss,
    ReconstructionLoss,
)
from vistok.loss.backbone import WeightsNotFoundError
from vistok.quantizer import FSQ

SIZE = 32
DIM = 3


@pytest.fixture(scope="module")
def tokenizer():
    return vistok.Tokenizer(
        CNNEncoder(base_channels=32, num_blocks=1), FSQ((8, 5, 5)), CNNDecoder(base_channels=32, num_blocks=1)
    )


def pair(*shape):
    return torch.rand(*shape) * 2 - 1, torch.rand(*shape) * 2 - 1


def attached(term, tokenizer):
    term.attach(tokenizer)
    return term


@pytest.mark.parametrize("model", [VIT, CNN])
@torch.no_grad()
def test_the_network_sees_what_the_preprocessing_of_timm_gives(model, networks):
    images, _ = pair(2, 3, SIZE, SIZE)
    backbone = FrozenBackbone(model, networks, size=SIZE)
    network = timm.create_model(model, img_size=SIZE) if model == VIT else timm.create_model(model)
    network.load_state_dict(backbone.network.state_dict())
    config = timm.data.resolve_data_config(model=network)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    inputs = (images / 2 + 0.5 - mean) / std
    torch.testing.assert_close(backbone.embedding(images, logits=True), network.eval()(inputs))


@torch.no_grad()
def test_images_are_resized_with_antialiasing(networks):
    images, _ = pair(1, 3, 48, 80)
    backbone = FrozenBackbone(CNN, networks, size=SIZE)
    small = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
    torch.testing.assert_close(backbone.embedding(images), backbone.embedding(small))


@torch.no_grad()
def test_without_a_size_images_are_seen_as_they_are(networks):
    images, _ = pair(1, 3, 32, 64)
    features = FrozenBackbone(CNN, networks, size=None).levels(images, [1, 2])
    assert [tuple(level.shape[2:]) for level in features] == [(8, 16), (4, 8)]


@torch.no_grad()
def test_levels_of_a_transformer_are_normalised_and_have_no_class_token(networks):
    images, _ = pair(2, 3, SIZE, SIZE)
    backbone = FrozenBackbone(VIT, networks, size=SIZE)
    (last,) = backbone.levels(images, [-1])
    tokens = backbone.network.forward_features(backbone._inputs(images))[:, backbone.network.num_prefix_tokens :]
    torch.testing.assert_close(last.flatten(2).mT, tokens)


@pytest.mark.parametrize("model", [VIT, CNN])
@torch.no_grad()
def test_the_classifier_behind_the_last_level_gives_features_of_its_width(model, networks):
    images, _ = pair(2, 3, SIZE, SIZE)
    backbone = FrozenBackbone(model, networks, size=SIZE)
    last, classifier = backbone.dense(images, -1), backbone.network.get_classifier()
    projected = torch.einsum("bchw,kc->bkhw", last, classifier.weight) + classifier.bias[:, None, None]
    torch.testing.assert_close(backbone.dense(images, None), projected)


def test_a_model_without_a_classifier_has_nothing_behind_its_last_level(networks):
    backbone = FrozenBackbone(VIT, networks, size=SIZE)
    backbone.network.reset_classifier(0)
    with pytest.raises(ValueError, match="test_vit has none: write level=-1"):
        backbone.dense(torch.zeros(1, 3, SIZE, SIZE), None)


def test_the_folder_may_come_from_the_environment_and_a_file_by_itself(networks, monkeypatch):
    monkeypatch.setenv("VISTOK_WEIGHTS", str(networks))
    images, _ = pair(1, 3, SIZE, SIZE)
    by_folder, by_file = FrozenBackbone(CNN), FrozenBackbone(CNN, networks / f"{CNN}.safetensors")
    assert torch.equal(by_folder.embedding(images), by_file.embedding(images))


def test_missing_weights_say_what_to_write(tmp_path):
    with pytest.raises(WeightsNotFoundError, match=r"test_resnet\.safetensors .*pretrained=FILE.*VISTOK_WEIGHTS.*timm"):
        FrozenBackbone(CNN, tmp_path)


def test_an_unknown_model_names_similar_ones():
    with pytest.raises(ValueError, match="no model 'convnext_enormous'; similar names: convnext"):
        FrozenBackbone("convnext_enormous")


def test_a_model_of_one_size_asks_for_it(networks):
    with pytest.raises(ValueError, match="takes one size only: write size=160"):
        FrozenBackbone(VIT, networks, size=None)


@pytest.mark.parametrize("train", [True, False])
def test_a_frozen_network_stays_frozen(networks, train):
    term = PerceptualLoss(CNN, pretrained=networks, size=SIZE)
    parent = nn.ModuleDict({"term": term, "layer": nn.Linear(1, 1)}).train(train).bfloat16()
    network = term.backbone.network
    assert not network.training
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in network.parameters())
    assert set(parent.state_dict()) == {"layer.weight", "layer.bias"}
    parent.to("meta")
    assert {t.device.type for t in network.state_dict().values()} == {"meta"}


def test_a_loss_does_not_change_the_network(networks):
    term = PerceptualLoss(CNN, pretrained=networks, size=SIZE).train()
    before = {name: t.clone() for name, t in term.backbone.network.state_dict().items()}
    ours, images = pair(2, 3, SIZE, SIZE)
    term(reconstruction(ours.requires_grad_()), {"images": images}).backward()
    assert all(torch.equal(t, before[name]) for name, t in term.backbone.network.state_dict().items())


@pytest.mark.parametrize("model", [VIT, CNN])
@pytest.mark.parametrize(
    ("levels", "distance"), [(None, "l1"), (None, "l2"), (None, "cosine"), ([-1], "gram"), ([0, 2], "cosine")]
)
def test_perceptual_loss_is_the_mean_distance_over_levels(model, levels, distance, networks):
    ours, images = pair(2, 3, SIZE, SIZE)
    term = PerceptualLoss(model, levels=levels, distance=distance, pretrained=networks, size=SIZE)
    if levels is None:
        features = [[term.backbone.embedding(x, logits=True)] for x in (ours, images)]
    else:
        features = [term.backbone.levels(x, levels) for x in (ours, images)]
    expected = []
    for a, b in zip(*features, strict=True):
        a, b = a.double(), b.double()
        if distance == "l1":
            expected.append((a - b).abs().mean())
        elif distance == "l2":
            expected.append((a - b).square().mean())
        elif distance == "cosine":
            expected.append(1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())
        else:
            grams = [torch.einsum("bchw,bdhw->bcd", x, x) / x[0].numel() for x in (a, b)]
            expected.append((grams[0] - grams[1]).square().sum((1, 2)).mean())
    value = term(reconstruction(ours), {"images": images})
    assert value.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


@pytest.mark.parametrize("levels", [None, [1, 2]])
def test_the_gradient_of_a_perceptual_loss_reaches_the_reconstruction_only(levels, networks):
    ours, images = (values.requires_grad_() for values in pair(2, 3, SIZE, SIZE))
    term = PerceptualLoss(CNN, levels=levels, pretrained=networks, size=SIZE)
    term(reconstruction(ours), {"images": images}).backward()
    assert ours.grad.abs().sum() > 0
    assert images.grad is None


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 4, 32, 32), (2, 3, 3, 32, 32)], ids=str)
def test_a_perceptual_loss_takes_gray_alpha_and_videos(shape, networks):
    ours, images = pair(*shape)
    term = PerceptualLoss(CNN, pretrained=networks, size=SIZE)
    assert term(reconstruction(ours), {"images": images}) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distance": "lpips"}, "one of l1, l2, cosine, gram, got 'lpips'"),
        ({"distance": "gram"}, r"write levels=\[-1\]"),
        ({"levels": []}, "at least one level"),
        ({"weight": 0.0}, "leave the term out"),
    ],
)
def test_a_wrong_argument_is_an_error_before_a_file_is_looked_for(arguments, message):
    with pytest.raises(ValueError, match=message):
        PerceptualLoss(CNN, **{"pretrained": "nowhere", **arguments})


def test_distillation_of_the_teachers_own_features_is_zero(networks, tokenizer):
    images, _ = pair(2, 3, SIZE, SIZE)
    term = FeatureDistillation(VIT, pretrained=networks, size=SIZE, source="codes", head="none")
    term.head = nn.Identity()
    features = term.teacher.levels(images, [-1])[0]
    assert term(reconstruction(images, codes=3 * features), {"images": images}).item() == pytest.approx(0, abs=1e-6)
    assert term(reconstruction(images, codes=-features), {"images": images}).item() == pytest.approx(2, abs=1e-6)


def test_a_decoder_of_features_is_distilled_as_it_is(networks, tokenizer, monkeypatch):
    images, _ = pair(2, 3, SIZE, SIZE)
    term = FeatureDistillation(VIT, pretrained=networks, size=SIZE)
    monkeypatch.setattr(tokenizer.decoder, "output", "features")
    term.attach(tokenizer)
    features = term.teacher.levels(images, [-1])[0]
    decoded = torch.randn_like(features).requires_grad_()
    value = term(reconstruction(decoded), {"images": images})
    torch.testing.assert_close(value, 1 - F.cosine_similarity(decoded, features).mean())
    value.backward()
    assert decoded.grad.abs().sum() > 0
    assert not list(term.parameters())


def test_a_decoder_of_images_cannot_predict_features(networks, tokenizer):
    with pytest.raises(ValueError, match=r"CNNDecoder decodes images: choose a decoder .* or write source=codes"):
        FeatureDistillation(VIT, pretrained=networks, size=SIZE).attach(tokenizer)


def test_a_decoder_of_other_channels_is_told_their_number(networks, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer.decoder, "output", "features")
    term = attached(FeatureDistillation(VIT, pretrained=networks, size=SIZE), tokenizer)
    with pytest.raises(ValueError, match="number of output channels to 64"):
        term(reconstruction(torch.zeros(1, 5, 2, 2)), {"images": torch.zeros(1, 3, SIZE, SIZE)})


@pytest.mark.parametrize(
    "make",
    [
        lambda **kwargs: FeatureDistillation(VIT, **{"source": "codes", "head": "linear", **kwargs}),
        lambda **kwargs: LatentAlignment(VIT, cosine_margin=0.0, distance_margin=0.0, **kwargs),
        lambda **kwargs: FeatureContrast(VIT, **kwargs),
    ],
    ids=["distillation", "alignment", "contrast"],
)
class TestLatentTerms:
    """What holds for every term with a teacher."""

    def test_the_gradient_reaches_the_codes_and_the_head_only(self, make, networks, tokenizer):
        term = attached(make(pretrained=networks, size=SIZE), tokenizer)
        images = pair(2, 3, SIZE, SIZE)[0].requires_grad_()
        codes, features = (torch.randn(2, DIM, 4, 4).requires_grad_() for _ in range(2))
        term(reconstruction(images, codes, features), {"images": images}).backward()
        assert codes.grad.abs().sum() > 0
        assert all(p.grad.abs().sum() > 0 for p in term.parameters())
        assert features.grad is None
        assert images.grad is None

    def test_only_the_head_is_in_the_state_dict(self, make, networks, tokenizer):
        term = attached(make(pretrained=networks, size=SIZE), tokenizer)
        assert set(term.state_dict()) - {"log_scale"} == {"head.weight", "head.bias"}
        assert {name for name, _ in term.named_parameters()} == set(term.state_dict())

    def test_features_before_the_quantizer_may_be_chosen_and_channels_of_them(self, make, networks, tokenizer):
        term = attached(make(pretrained=networks, size=SIZE, source="features", channels=[1, 3]), tokenizer)
        images, _ = pair(2, 3, SIZE, SIZE)
        features = torch.randn(2, DIM, 4, 4).requires_grad_()
        term(reconstruction(images, features=features), {"images": images}).backward()
        assert features.grad[:, 0].abs().max() == 0
        assert features.grad[:, 1:].abs().min() > 0

    def test_it_asks_to_be_attached(self, make, networks):
        term = make(pretrained=networks, size=SIZE)
        with pytest.raises(ValueError, match=r"call loss\.attach\(tokenizer\)"):
            term(reconstruction(torch.zeros(1, 3, SIZE, SIZE)), {"images": torch.zeros(1, 3, SIZE, SIZE)})


@pytest.mark.parametrize("margins", [(0.5, 0.25), (0.0, 0.0)])
def test_alignment_is_the_formula_of_the_paper(margins, networks, tokenizer):
    images, _ = pair(2, 3, SIZE, SIZE)
    term = LatentAlignment(
        VIT,
        cosine_weight=0.7,
        cosine_margin=margins[0],
        distance_weight=0.3,
        distance_margin=margins[1],
        pretrained=networks,
        size=SIZE,
    )
    term.attach(tokenizer)
    codes = torch.randn(2, DIM, 2, 2)
    latents = term.head(codes).double().flatten(2)
    features = term.teacher.levels(images, [-1])[0].double().flatten(2)

    def cosine(a, b):
        return (a @ b / (a.norm() * b.norm())).item()

    points, pairs = [], []
    for z, f in zip(latents, features, strict=True):
        for i in range(4):
            points.append(max(0, 1 - margins[0] - cosine(z[:, i], f[:, i])))
            pairs += [max(0, abs(cosine(z[:, i], z[:, j]) - cosine(f[:, i], f[:, j])) - margins[1]) for j in range(4)]
    expected = 0.7 * sum(points) / len(points) + 0.3 * sum(pairs) / len(pairs)
    value = term(reconstruction(images, codes), {"images": images})
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_a_finer_teacher_is_averaged_over_each_position(networks, tokenizer):
    images, _ = pair(2, 3, 64, 64)
    term = attached(FeatureDistillation(VIT, source="codes", head="mlp", pretrained=networks, size=64), tokenizer)
    codes = torch.randn(2, DIM, 2, 2)
    targets = F.avg_pool2d(term.teacher.levels(images, [-1])[0], 2)
    expected = 1 - F.cosine_similarity(term.head(codes), targets).mean()
    torch.testing.assert_close(term(reconstruction(images, codes), {"images": images}), expected)


def test_frames_of_a_video_are_averaged_over_the_time_of_a_code(networks, tokenizer):
    videos, _ = pair(2, 3, 4, SIZE, SIZE)
    term = attached(FeatureDistillation(VIT, source="codes", head="linear", pretrained=networks, size=SIZE), tokenizer)
    codes = torch.randn(2, DIM, 2, 2, 2)
    frames = torch.stack([term.teacher.levels(videos[:, :, t], [-1])[0] for t in range(4)], 2)
    expected = 1 - F.cosine_similarity(term.head(codes), frames.unflatten(2, (2, 2)).mean(3)).mean()
    torch.testing.assert_close(term(reconstruction(videos, codes), {"images": videos}), expected)


def test_a_sequence_that_is_a_grid_is_compared_in_raster_order(networks, tokenizer):
    images, _ = pair(2, 3, SIZE, SIZE)
    term = attached(FeatureDistillation(VIT, source="codes", head="linear", pretrained=networks, size=SIZE), tokenizer)
    codes = torch.randn(2, DIM, 2, 2)
    as_grid = term(reconstruction(images, codes), {"images": images})
    torch.testing.assert_close(term(reconstruction(images, codes.flatten(2)), {"images": images}), as_grid)


def test_an_adaptive_weight_needs_a_projection_and_another_loss(networks):
    encoder, decoder = CNNEncoder(base_channels=32, z_channels=3), CNNDecoder(base_channels=32, z_channels=3)
    bare = vistok.Tokenizer(encoder, FSQ((8, 5, 5)), decoder, projection="none")
    term = LatentAlignment(VIT, pretrained=networks, size=SIZE, max_adaptive_weight=1e4)
    with pytest.raises(ValueError, match="write projection=linear, or max_adaptive_weight=null"):
        term.attach(bare)
    with pytest.raises(ValueError, match=r"there are none: set loss.l1=1, or max_adaptive_weight=null"):
        ReconstructionLoss(l2=0.0, terms={"alignment": term})


def test_tokens_without_a_place_are_refused(networks, tokenizer):
    term = attached(LatentAlignment(VIT, pretrained=networks, size=SIZE), tokenizer)
    images = torch.zeros(1, 3, SIZE, SIZE)
    with pytest.raises(ValueError, match=r"teacher has a grid of \(2, 2\), the tokenizer \(7,\)\. .*FeatureContrast"):
        term(reconstruction(images, torch.zeros(1, DIM, 7)), {"images": images})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "latents"}, "one of codes, features, decoded, got 'latents'"),
        ({"head": "deep"}, "one of none, linear, mlp, got 'deep'"),
        ({"source": "decoded"}, "write head=none and channels=null"),
        ({"channels": [2, 1]}, r"\[first, last\) with first < last, got \[2, 1\]"),
        ({"cosine_weight": 0.0, "distance_weight": 0.0}, "one must be positive"),
        ({"max_adaptive_weight": 0.0}, "max_adaptive_weight must be positive"),
        ({"max_adaptive_weight": 1.0, "source": "decoded", "head": "none"}, "needs source=codes or features"),
    ],
)
def test_a_wrong_argument_of_a_latent_term_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        LatentAlignment(VIT, **{"pretrained": "nowhere", **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"channels": [0, 9]}, "at or below the 3 of the quantizer, got 9"), ({"head": "none"}, "write head=linear")],
)
def test_a_term_that_does_not_fit_the_tokenizer_is_an_error(arguments, message, networks, tokenizer):
    term = LatentAlignment(VIT, pretrained=networks, size=SIZE, **arguments)
    with pytest.raises(ValueError, match=message):
        term.attach(tokenizer)


@pytest.mark.skipif("VISTOK_WEIGHTS" not in os.environ, reason="VISTOK_WEIGHTS")
@pytest.mark.parametrize(("picture", "name"), [("coffee", 967), ("chelsea", 285)])  # espresso, Egyptian cat
def test_real_weights_recognise_a_picture(picture, name):
    image = torch.from_numpy(getattr(data, picture)().copy()).permute(2, 0, 1)[None] / 127.5 - 1
    logits = FrozenBackbone("tf_efficientnet_lite0").embedding(image, logits=True)
    assert logits.argmax().item() == name
