"""Adversarial loss of a tokenizer and a discriminator.

I. Goodfellow et al.: Generative Adversarial Networks, https://arxiv.org/abs/1406.2661; for tokenizers P. Esser,
R. Rombach, B. Ommer: Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841.
"""

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.optim import param_groups_weight_decay  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from vistok import distributed
from vistok.discriminator.augmentation import AUGMENTATIONS, Augmentation, draw_augmentation
from vistok.discriminator.base import Discriminator

# What the discriminator and the generator minimise.
KINDS = {
    "hinge": ("hinge", "linear"),
    "vanilla": ("cross_entropy", "linear"),
    "non_saturating": ("cross_entropy", "softplus"),
    "hinge_non_saturating": ("hinge", "softplus"),
}
ADAPTIVE_EPSILON = 1e-4
LECAM_DECAY = 0.999


class AdversarialLoss(nn.Module):
    """What a discriminator and the tokenizer it judges minimise, in one forward pass for both.

    The sum of the terms has exactly the two gradients of the game: the tokenizer's term is computed with the parameters
    of the discriminator detached, the discriminator's terms with the reconstructions detached. So one backward pass and
    one optimiser with a parameter group for each player are enough.

    In logits r of images and f of reconstructions, the discriminator minimises ``mean relu(1 - r) + mean relu(1 + f)``
    (hinge) or ``mean softplus(-r) + mean softplus(f)`` (cross-entropy), halved, and the tokenizer ``-mean f`` (linear)
    or ``mean softplus(-f)``:

    - ``hinge``: hinge and linear, as VQGAN.
    - ``vanilla``: cross-entropy and linear, the other choice of VQGAN.
    - ``non_saturating``: cross-entropy and softplus, as StyleGAN2 and BSQ.
    - ``hinge_non_saturating``: hinge and softplus, as Open-MAGVIT2 (where softplus is of the mean logit of an image).

    `start`, `discriminator_start` and `warmup` are optimiser steps if they are integers, and shares of the training if
    they are floats. The discriminator trains before the tokenizer listens to it: a random one, heard at full weight, is
    what ruins reconstructions the moment it is switched on.

    As in `vistok.quantizer.Quantizer`, `forward` collects and `update` or `discard` decide: the moving averages and the
    buffers of the discriminator (statistics of batch normalisation) keep nothing of a rejected step.

    Args:
        discriminator: Judges images and reconstructions.
        kind: ``hinge``, ``vanilla``, ``non_saturating`` or ``hinge_non_saturating``.
        weight: Weight of the tokenizer's term.
        max_adaptive_weight: None leaves that weight fixed. A number multiplies it by the adaptive weight of VQGAN (its
            equation 7) and caps that; published is 10000, which is no cap in effect.
        start: When the tokenizer begins to listen.
        discriminator_start: When the discriminator begins to train.
        warmup: How long the weight of the tokenizer's term rises linearly, from `start` on.
        lecam: Weight of the regularisation by H.-Y. Tseng et al., https://arxiv.org/abs/2104.03310, with moving
            averages of decay 0.999 over all ranks.
        r1: Weight (gamma) of the gradient penalty on images, https://arxiv.org/abs/1801.04406: the discriminator
            minimises ``r1 / 2`` times the squared norm of the gradient of an image's mean logit besides.
        r1_every: Optimiser steps between penalties, each of which counts that many times.
        augmentations: Any of ``color``, ``translation`` and ``cutout``, see `vistok.discriminator.draw_augmentation`.
            Images and reconstructions get the same.
        lr: Peak learning rate of the discriminator; it follows the schedule of the tokenizer's.
        betas: Of the discriminator's optimiser.
        weight_decay: Of the discriminator, not applied to biases and norms.
        clip: Largest norm of the discriminator's gradient; None does not clip it.

    Raises:
        ValueError: If an argument is out of range.
    """

    averages: Tensor
    averaged_steps: Tensor

    def __init__(
        self,
        discriminator: Discriminator,
        kind: str = "hinge",
        weight: float = 0.5,
        max_adaptive_weight: float | None = None,
        start: int | float = 0.2,
        discriminator_start: int | float = 0.15,
        warmup: int | float = 0.05,
        lecam: float = 0.0,
        r1: float = 0.0,
        r1_every: int = 16,
        augmentations: Sequence[str] = (),
        lr: float = 1e-4,
        betas: Sequence[float] = (0.5, 0.9),
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if weight <= 0:
            raise ValueError(
                f"weight must be positive, got {weight}: discriminator=none trains without a discriminator"
            )
        if max_adaptive_weight is not None and max_adaptive_weight <= 0:
            raise ValueError(f"max_adaptive_weight must be positive, or null for none, got {max_adaptive_weight}")
        if min(lecam, r1) < 0 or r1_every < 1:
            raise ValueError(f"lecam and r1 must not be negative and r1_every positive, got {lecam}, {r1}, {r1_every}")
        if clip is not None and clip <= 0:
            raise ValueError(f"clip must be positive, or null to clip nothing, got {clip}")
        if unknown := set(augmentations) - set(AUGMENTATIONS):
            raise ValueError(f"no augmentation {min(unknown)}: there are {', '.join(AUGMENTATIONS)}")
        for name, value in (("start", start), ("discriminator_start", discriminator_start), ("warmup", warmup)):
            if value < 0 or (isinstance(value, float) and value >= 1):
                raise ValueError(f"{name} must be steps (an integer) or a share of the training below 1, got {value}")
        self.discriminator = discriminator
        self._critic, self._generator = KINDS[kind]
        self.weight = weight
        self.max_adaptive_weight = max_adaptive_weight
        self.start, self.discriminator_start, self.warmup = start, discriminator_start, warmup
        self.lecam, self.r1, self.r1_every = lecam, r1, r1_every
        self.augmentations = tuple(augmentations)
        self.lr, self.betas, self.weight_decay, self.clip = lr, tuple(betas), weight_decay, clip
        # Mean logits of images and of reconstructions.
        self.register_buffer("averages", torch.zeros(2))
        self.register_buffer("averaged_steps", torch.zeros((), dtype=torch.int64))
        self._collected: list[Tensor] = []
        self._buffers_before: list[Tensor] | None = None

    def weights(self, step: int, total_steps: int) -> dict[str, float]:
        """Weight of each term in an optimiser step; a term of weight zero is not computed.

        Raises:
            ValueError: If the tokenizer would listen to a discriminator that has not begun to train.
        """
        start, discriminator_start, warmup = (
            round(value * total_steps) if isinstance(value, float) else value
            for value in (self.start, self.discriminator_start, self.warmup)
        )
        if discriminator_start > start:
            raise ValueError(
                f"the tokenizer would listen from step {start} on to a discriminator that trains from step "
                f"{discriminator_start} on: set discriminator.adversarial.discriminator_start below its start"
            )
        trains = step >= discriminator_start
        loudness = min((step - start + 1) / max(warmup, 1), 1.0) if step >= start else 0.0
        return {
            "adversarial": self.weight * loudness,
            "discriminator": float(trains),
            "lecam": self.lecam * trains,
            "r1": self.r1 / 2 * self.r1_every * (trains and step % self.r1_every == 0),
        }

    def forward(
        self,
        reconstructions: Float[Tensor, "b c *size"],
        images: Float[Tensor, "b c *size"],
        active: Collection[str],
    ) -> tuple[dict[str, Float[Tensor, ""]], dict[str, Float[Tensor, ""]]]:
        """Unweighted terms of a batch, and what to log of the discriminator.

        Args:
            reconstructions: In about [-1, 1], with gradient.
            images: Likewise, without.
            active: Names of the terms to compute: ``adversarial``, which the tokenizer minimises, and
                ``discriminator``, ``lecam`` and ``r1``, which the discriminator does.
        """
        augment = draw_augmentation(self.augmentations, images)
        terms: dict[str, Tensor] = {}
        if self._buffers_before is None:
            self._buffers_before = [buffer.clone() for buffer in self.discriminator.buffers()]
        if "adversarial" in active:
            frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
            fake = self._judge(augment(reconstructions), frozen)
            terms["adversarial"] = -fake.mean() if self._generator == "linear" else F.softplus(-fake).mean()
        real = self.discriminator(augment(images)).float()
        fake = self.discriminator(augment(reconstructions.detach())).float()
        loss = F.softplus if self._critic == "cross_entropy" else lambda logits: F.relu(1 + logits)
        terms["discriminator"] = (loss(-real).mean() + loss(fake).mean()) / 2
        means = torch.stack([real.detach().mean(), fake.detach().mean()])
        if "lecam" in active:
            distance = F.relu(real - self.averages[1]).square().mean() + F.relu(self.averages[0] - fake).square().mean()
            # There is nothing to compare with in the first step.
            terms["lecam"] = torch.where(self.averaged_steps > 0, distance, 0.0)
            self._collected.append(means)
        if "r1" in active:
            terms["r1"] = self._gradient_penalty(images, augment)
        accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return terms, {"logits_real": means[0], "logits_fake": means[1], "discriminator_accuracy": accuracy}

    def _judge(self, images: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Logits, with other parameters, that leave the buffers of the discriminator as they are."""
        buffers = {name: buffer.clone() for name, buffer in self.discriminator.named_buffers()}
        return functional_call(self.discriminator, parameters | buffers, (images,)).float()

    def _gradient_penalty(self, images: Tensor, augment: Augmentation) -> Tensor:
        """Squared norm of the gradient of each image's mean logit, averaged."""
        images = images.detach().requires_grad_()
        # The fused kernels of attention have no second derivative.
        with torch.autocast(images.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
            logits = self._judge(augment(images), dict(self.discriminator.named_parameters()))
            (gradient,) = torch.autograd.grad(logits.flatten(1).mean(1).sum(), images, create_graph=True)
        return gradient.float().square().flatten(1).sum(1).mean()

    @torch.no_grad()
    def update(self) -> None:
        """Apply what `forward` collected for an accepted optimiser step. Collective: every rank calls it alike."""
        if self._collected:
            means = distributed.all_reduce_sum(torch.stack(self._collected).mean(0)) / distributed.world_size()
            self.averages.lerp_(means, torch.where(self.averaged_steps == 0, 1.0, 1 - LECAM_DECAY))
            self.averaged_steps += 1
        self._collected, self._buffers_before = [], None

    @torch.no_grad()
    def discard(self) -> None:
        """Undo what `forward` did for an optimiser step that was rejected."""
        for buffer, before in zip(self.discriminator.buffers(), self._buffers_before or (), strict=False):
            buffer.copy_(before)
        self._collected, self._buffers_before = [], None

    def add_to(self, optimizer: Optimizer) -> None:
        """Give an optimiser the parameters of the discriminator, with their own settings.

        Raises:
            ValueError: If the optimiser has no such settings.
        """
        settings = {"lr": self.lr, "betas": self.betas}
        if missing := settings.keys() - optimizer.defaults.keys():
            raise ValueError(
                f"{type(optimizer).__name__} has no {min(missing)}, which the discriminator sets: use "
                "optimizer.opt=adamw"
            )
        for group in param_groups_weight_decay(self.discriminator, self.weight_decay):
            if group["params"]:
                optimizer.add_param_group({**group, **settings})


def adaptive_weight(
    loss: Float[Tensor, ""], term: Float[Tensor, ""], layer: Tensor, maximum: float, scale: float = 1.0
) -> Float[Tensor, ""]:
    """Ratio of the gradients' norms of a loss and of a term at a layer, at most `maximum`.

    Equation 7 of https://arxiv.org/abs/2012.09841; VA-VAE, https://arxiv.org/abs/2501.01423, has it for a term of the
    latents. Both gradients are averaged over ranks first: every rank comes to the same weight, that of one process on
    the joined batch. In the authors' programs each rank has its own.

    Args:
        loss: Weighted sum of the reconstruction terms.
        term: Unweighted, what the weight is for.
        layer: Weight of the layer that both are functions of.
        maximum: Of the weight.
        scale: Multiplies both while their gradients are computed, so that float16 can hold these.
    """
    norms = []
    for value in (loss, term):
        (gradient,) = torch.autograd.grad(value * scale, layer, retain_graph=True)
        gradient = distributed.all_reduce_sum(gradient.float() / (scale * distributed.world_size()))
        norms.append(torch.linalg.vector_norm(gradient))
    return (norms[0] / (norms[1] + ADAPTIVE_EPSILON)).clamp(max=maximum)
