"""A tokenizer and a discriminator that train in milliseconds, and the textbook's way of training them."""

import copy

import torch
import torch.nn.functional as F

import vistok
from vistok.decoder import CNNDecoder
from vistok.discriminator import PatchDiscriminator
from vistok.encoder import CNNEncoder
from vistok.loss import AdversarialLoss, ReconstructionLoss
from vistok.quantizer import FSQ
from vistok.training.module import TokenizerModule
from vistok.training.schedule import constant


def make_module(norm="batch", optimizer=None, schedules=None, kind=TokenizerModule, **arguments):
    """A module of both players, of a `kind` of modules; the arguments are those of `AdversarialLoss`."""
    torch.manual_seed(0)
    tokenizer = vistok.Tokenizer(
        CNNEncoder(base_channels=32, num_blocks=1), FSQ((5, 5)), CNNDecoder(base_channels=32, num_blocks=1)
    )
    discriminator = PatchDiscriminator(base_channels=32, num_layers=2, norm=norm)
    settings = {"start": 0, "discriminator_start": 0, "warmup": 0, "lr": 2e-3, **arguments}
    return kind(
        tokenizer,
        ReconstructionLoss(l1=0.5, l2=1.0),
        optimizer=optimizer or (lambda module: torch.optim.AdamW(module.parameters(), lr=1e-3)),
        scheduler=constant,
        adversarial=AdversarialLoss(discriminator, **settings),
        schedules=schedules,
        whiten=False,
    )


def make_batches(count, size=4):
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(size, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(count)]
    return [{"images": batch, "keys": [f"{n}-{i}" for i in range(size)]} for n, batch in enumerate(images)]


def textbook(module, batches, weight, adaptive=False, autocast=False):
    """Gradients of two backward passes, one per player, on the same reconstructions.

    The tokenizer's comes first. Each is averaged over the batches, as accumulation does. The discriminator of the first
    pass is a copy, so that its batch statistics are not updated a third time.

    Returns:
        Gradients by parameter name for the tokenizer and for the discriminator, and the trained copy of the latter.
    """
    tokenizer = copy.deepcopy(module.tokenizer).train()
    discriminator = copy.deepcopy(module.adversarial.discriminator).train()
    for batch in batches:
        images = batch["images"]
        # As Lightning does: each use of a weight is a cast of its own.
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            reconstructions = tokenizer(images.contiguous(memory_format=torch.channels_last)).images
            ours = reconstructions.float()
            distance = 0.5 * F.l1_loss(ours, images) + F.mse_loss(ours, images)
            heard = -copy.deepcopy(discriminator)(reconstructions).float().mean()
            real, fake = discriminator(images).float(), discriminator(reconstructions.detach()).float()
            critic = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        factor = weight
        if adaptive:
            last = tokenizer.decoder.last_layer
            norms = [torch.autograd.grad(value, last, retain_graph=True)[0].norm() for value in (distance, heard)]
            factor = weight * (norms[0] / (norms[1] + 1e-4))
        ((distance + factor * heard) / len(batches)).backward()
        (critic / len(batches)).backward()
    return (
        {name: value.grad for name, value in tokenizer.named_parameters()},
        {name: value.grad for name, value in discriminator.named_parameters()},
        discriminator,
    )
