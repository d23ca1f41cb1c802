"""The weighted losses of a reconstruction: which are computed, on what, and where gradients go."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tiny_networks import judge, reconstruction
from torch import nn
from torchvision import models

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.loss import LPIPS, ReconstructionLoss, Term, gram_distance
from vistok.loss.frozen import rgb_frames
from vistok.quantizer import FSQ

PIXEL = {name: {"l2": 0.0, name: 1.0} for name in ("l1", "l2", "huber", "logit_laplace", "focal_frequency", "wavelet")}
NETWORK = {name: {"l2": 0.0, name: 1.0, "lpips_net": "squeeze"} for name in ("lpips", "gram")}


class BrightnessTerm(Term):
    """A head on the brightness, of which the first half of the images has the wrong one."""

    def __init__(self, weight=1.0):
        super().__init__(weight)
        self.head = nn.Linear(1, 1)

    def forward(self, reconstruction, batch):
        """Mean of the head."""
        return self.head(reconstruction.images.mean()[None]).mean()


@pytest.fixture
def weights_folder(tmp_path, monkeypatch):
    """LPIPS with SqueezeNet of random weights, where VISTOK_WEIGHTS points."""
    features = models.squeezenet1_1().features.state_dict()
    save_file({f"features.{name}": t for name, t in features.items()}, tmp_path / "squeezenet1_1_features.safetensors")
    channels = (64, 128, 256, 384, 384, 512, 512)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
    save_file(linear, tmp_path / "lpips_squeeze_lin.safetensors")
    monkeypatch.setenv("VISTOK_WEIGHTS", str(tmp_path))
    return tmp_path


def pair(*shape):
    return torch.rand(*shape) * 2 - 1, torch.rand(*shape) * 2 - 1


def test_the_default_is_the_mean_squared_error():
    ours, images = pair(2, 3, 8, 8)
    values = judge(ReconstructionLoss(), ours, images)
    assert values.keys() == {"l2"}
    torch.testing.assert_close(values["l2"], (ours - images).square().mean())


def test_values_are_unweighted_and_weights_are_beside_them():
    ours, images = pair(2, 3, 8, 8)
    loss = ReconstructionLoss(l1=3.0, l2=2.0)
    assert loss.weights == {"l1": 3.0, "l2": 2.0}
    torch.testing.assert_close(judge(loss, ours, images)["l1"], (ours - images).abs().mean())


@pytest.mark.parametrize("delta", [None, 0.1])
def test_huber_has_its_delta(delta):
    ours, images = pair(2, 3, 8, 8)
    value = judge(ReconstructionLoss(l2=0.0, huber=1.0, huber_delta=delta), ours, images)["huber"]
    torch.testing.assert_close(value, F.huber_loss(ours, images, delta=delta or 1.0))


def test_a_loss_of_weight_zero_is_not_computed_and_needs_no_file(monkeypatch):
    monkeypatch.delenv("VISTOK_WEIGHTS", raising=False)
    assert judge(ReconstructionLoss(lpips=0.0), *pair(1, 3, 8, 8)).keys() == {"l2"}


def test_only_active_losses_are_computed():
    loss = ReconstructionLoss(l1=1.0, l2=1.0, terms={"brightness": BrightnessTerm()})
    assert judge(loss, *pair(1, 3, 8, 8), active={"l1", "other"}).keys() == {"l1"}


def test_a_parameter_of_a_loss_that_is_switched_off_has_a_gradient_of_zero_in_training():
    loss = ReconstructionLoss(logit_laplace=1.0, terms={"brightness": BrightnessTerm()})
    judge(loss.train(), *pair(1, 3, 8, 8), active={"l2"})["l2"].backward()
    assert all((p.grad == 0).all() for p in loss.parameters())
    assert len(list(loss.parameters())) == 3


@pytest.mark.parametrize("arguments", PIXEL.values(), ids=PIXEL)
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 8, 16), (2, 4, 8, 8), (2, 3, 5, 8, 8)], ids=str)
def test_pixel_losses_take_images_and_videos_of_any_channels(arguments, shape):
    ours, images = pair(*shape)
    ours.requires_grad_()
    (value,) = judge(ReconstructionLoss(**arguments), ours, images).values()
    value.backward()
    assert value.dtype == torch.float32
    assert ours.grad.isfinite().all()
    assert ours.grad.abs().sum() > 0


@pytest.mark.parametrize("arguments", NETWORK.values(), ids=NETWORK)
@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 4, 32, 32), (2, 3, 2, 32, 32)], ids=str)
def test_networks_see_gray_alpha_and_videos_as_rgb_images(arguments, shape, weights_folder):
    ours, images = pair(*shape)
    loss = ReconstructionLoss(**arguments)
    (value,) = judge(loss, ours, images).values()
    (expected,) = judge(loss, rgb_frames(ours), rgb_frames(images)).values()
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("arguments", [*PIXEL.values(), *NETWORK.values()], ids=[*PIXEL, *NETWORK])
def test_the_gradient_reaches_the_reconstruction_only(arguments, weights_folder):
    ours, images = (values.requires_grad_() for values in pair(2, 3, 32, 32))
    loss = ReconstructionLoss(**arguments)
    sum(judge(loss, ours, images.detach()).values()).backward()
    assert ours.grad.abs().sum() > 0
    assert images.grad is None
    assert {name for name, _ in loss.named_parameters()} <= {"logit_laplace.log_scale"}


@pytest.mark.parametrize("arguments", [*PIXEL.values(), *NETWORK.values()], ids=[*PIXEL, *NETWORK])
def test_autocast_changes_nothing(arguments, weights_folder):
    ours, images = (values.bfloat16().float() for values in pair(2, 3, 32, 32))
    loss = ReconstructionLoss(**arguments)
    expected = judge(loss, ours, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = judge(loss, ours.bfloat16(), images)
    assert all(torch.equal(values[name], expected[name]) for name in expected)


def test_lpips_and_gram_share_one_pass_through_the_network(weights_folder):
    ours, images = pair(2, 3, 32, 32)
    loss = ReconstructionLoss(l2=0.0, lpips=1.0, gram=1.0, lpips_net="squeeze")
    calls = []
    loss.trunk.register_forward_hook(lambda *arguments: calls.append(1))
    values = judge(loss, ours, images)
    lpips = LPIPS("squeeze")
    torch.testing.assert_close(values["lpips"], lpips(ours, images).mean())
    features = zip(lpips.trunk(ours), lpips.trunk(images), strict=True)
    torch.testing.assert_close(values["gram"], sum(gram_distance(a, b) for a, b in features))
    assert len(calls) == 2


def test_gram_alone_needs_no_linear_layers(weights_folder):
    (weights_folder / "lpips_squeeze_lin.safetensors").unlink()
    loss = ReconstructionLoss(l2=0.0, gram=1.0, lpips_net="squeeze")
    assert judge(loss, *pair(1, 3, 32, 32))["gram"] > 0


def test_networks_are_not_in_the_state_dict_and_heads_are(weights_folder):
    loss = ReconstructionLoss(lpips=1.0, lpips_net="squeeze", terms={"brightness": BrightnessTerm()})
    names = {"terms.brightness.head.weight", "terms.brightness.head.bias"}
    assert set(loss.state_dict()) == {name for name, _ in loss.named_parameters()} == names


def test_a_copy_is_independent_of_its_original():
    loss = ReconstructionLoss(l2=0.0, logit_laplace=1.0)
    twin = copy.deepcopy(loss)
    twin.logit_laplace.log_scale.data.fill_(1.0)
    ours, images = pair(1, 3, 8, 8)
    assert judge(loss, ours, images)["logit_laplace"] != judge(twin, ours, images)["logit_laplace"]


def test_a_term_has_its_name_and_weight():
    loss = ReconstructionLoss(terms={"brightness": BrightnessTerm(0.5)})
    ours, images = pair(2, 3, 8, 8)
    assert loss.weights == {"l2": 1.0, "brightness": 0.5}
    value = judge(loss, ours, images)["brightness"]
    torch.testing.assert_close(value, loss.terms["brightness"](reconstruction(ours), {"images": images}))


def test_terms_come_out_of_a_config():
    config = {
        "_target_": "vistok.loss.ReconstructionLoss",
        "l2": 0.0,
        "terms": {"a": {"_target_": f"{__name__}.BrightnessTerm", "weight": 2.0}},
    }
    assert instantiate(OmegaConf.create(config)).weights == {"a": 2.0}


@pytest.mark.parametrize("weights", [{"l1": -1.0}, {"l2": 0.0}])
def test_negative_or_no_weights_are_an_error(weights):
    with pytest.raises(ValueError, match="must not be negative and one must be positive"):
        ReconstructionLoss(**weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"huber_delta": 1.0}, r"huber_delta has no effect without huber: set loss\.huber=1"),
        ({"wavelet_levels": 2}, r"wavelet_levels has no effect without wavelet: set loss\.wavelet=1"),
        ({"lpips_net": "alex"}, r"lpips_net has no effect without lpips or gram: set loss\.lpips=1"),
        ({"lpips_weights": "x"}, r"lpips_weights has no effect without lpips or gram: set loss\.lpips=1"),
        ({"huber": 1.0, "huber_delta": 0.0}, "huber_delta must be positive"),
        ({"wavelet": 1.0, "wavelet_levels": 0}, "wavelet_levels at least 1"),
    ],
)
def test_a_setting_without_effect_or_out_of_range_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionLoss(**arguments)


def test_a_term_may_not_take_the_name_of_another_loss():
    with pytest.raises(ValueError, match="rename lpips"):
        ReconstructionLoss(terms={"lpips": BrightnessTerm()})


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_a_term_without_a_positive_weight_says_how_to_leave_it_out(weight):
    with pytest.raises(ValueError, match=r"leave the term out .*~loss\.terms\.NAME"):
        BrightnessTerm(weight)


def test_an_image_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\) were decoded to \(1, 3, 8, 4\)"):
        judge(ReconstructionLoss(), torch.zeros(1, 3, 8, 4), torch.zeros(1, 3, 8, 8))


def test_images_of_two_channels_are_refused_by_networks():
    with pytest.raises(ValueError, match=r"c = 1, 3 or 4, got \(1, 2, 8, 8\)"):
        rgb_frames(torch.zeros(1, 2, 8, 8))


def test_what_is_transparent_is_white():
    images = torch.rand(1, 4, 2, 2) * 2 - 1
    images[:, 3] = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])
    seen = rgb_frames(images)
    assert (seen[..., 0] == 1).all()
    assert torch.equal(seen[..., 1], images[:, :3, :, 1])


def test_pixel_losses_of_a_decoder_of_features_are_refused():
    tokenizer = vistok.Tokenizer(
        CNNEncoder(base_channels=32, num_blocks=1), FSQ((8, 5, 5)), CNNDecoder(base_channels=32, num_blocks=1)
    )
    loss = ReconstructionLoss(l1=1.0)
    loss.attach(tokenizer)
    tokenizer.decoder.output = "features"
    with pytest.raises(ValueError, match=r"CNNDecoder decodes features, which l1, l2 cannot compare .*FeatureDistil"):
        loss.attach(tokenizer)
