"""Training with the encoder and decoder divided among processes (FSDP), for tokenizers of billions of parameters.

Y. Zhao et al.: PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, https://arxiv.org/abs/2304.11277, in
PyTorch's second form, ``torch.distributed.fsdp.fully_shard``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from vistok import distributed
from vistok.config import build, config_of
from vistok.hub.bundle import Unfilled
from vistok.tokenizer import Tokenizer
from vistok.training.module import TokenizerModule


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP over all processes, with whole checkpoints, which any number of them resumes."""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Of the weights in training, also when a signal ends the run in the middle of a validation."""
        module = self.lightning_module
        assert isinstance(module, ShardedTokenizerModule)
        module.leave_copy()
        return super().lightning_module_state_dict()


class ShardedTokenizerModule(TokenizerModule):
    """Trains a tokenizer whose encoder and decoder are divided among the processes of a `ShardedStrategy`.

    Each process holds a share of their parameters, gradients and optimiser states, and gathers the parameters of one
    block at a time. Projections, quantizer, loss and discriminator are whole on every process; their gradients are
    averaged once per optimiser step. A validation works on a whole copy of the tokenizer, so that processes may have
    different numbers of batches. Arguments are those of `TokenizerModule`.

    Raises:
        ValueError: If the tokenizer has several encoders, or the weight of the adversarial term is adaptive.
    """

    strategy_name = "fsdp"

    def __init__(
        self, tokenizer: Tokenizer, *args: Any, optimizer: Callable[[nn.Module], Optimizer], **kwargs: Any
    ) -> None:
        # FSDP divides contiguous parameters only.
        kwargs["channels_last"] = False
        super().__init__(tokenizer, *args, optimizer=lambda module: split_groups(optimizer(module)), **kwargs)
        if type(tokenizer) is not Tokenizer:
            raise ValueError(f"trainer.strategy=fsdp cannot divide a {type(tokenizer).__name__}: use ddp")
        if self.adversarial is not None and self.adversarial.max_adaptive_weight is not None:
            raise ValueError(
                "the adaptive weight needs the gradient of a whole layer, and trainer.strategy=fsdp divides it: use "
                "the fixed weight, discriminator.adversarial.max_adaptive_weight=null, or trainer.strategy=ddp"
            )
        if self.frozen:
            raise ValueError("trainer.strategy=fsdp divides what learns: leave out module.freeze, or use ddp")
        if self.loss.adaptive:
            raise ValueError(
                f"the adaptive weight of {min(self.loss.adaptive)} needs gradients of its own, which "
                "trainer.strategy=fsdp does not give: use the fixed weight, max_adaptive_weight=null, or "
                "trainer.strategy=ddp"
            )
        self._divided: Tokenizer | None = None

    @override
    def configure_model(self) -> None:
        """Divide what `ShardedStrategy` gives each process a share of."""
        if isinstance(next(self.tokenizer.decoder.parameters()), DTensor):
            return
        # As DDP does: processes may have drawn different weights.
        for value in (*self.parameters(), *self.buffers()):
            distributed.broadcast(value.detach())
        mesh = self.device_mesh["data_parallel"]  # pyright: ignore[reportOptionalSubscript]
        divide(self.tokenizer.encoder, mesh)
        divide(self.tokenizer.decoder, mesh)

    @override
    def whole_tokenizer(self) -> Tokenizer:
        """A copy that is whole on every process. Collective."""
        with torch.no_grad():
            state = {name: whole(value) for name, value in self.tokenizer.state_dict().items()}
        with Unfilled([value.shape for value in state.values()]):
            tokenizer = build(config_of(self.tokenizer))
        tokenizer.load_state_dict(state)
        return tokenizer.to(self.device).eval().requires_grad_(False)

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._divided, self.tokenizer = self.tokenizer, self.whole_tokenizer()

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.leave_copy()

    def leave_copy(self) -> None:
        """Go on with the weights in training, if a validation is under way."""
        if self._divided is not None:
            self.tokenizer, self._divided = self._divided, None

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Average what FSDP does not."""
        for parameter in self.parameters():
            if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
                distributed.all_reduce_sum(parameter.grad).div_(distributed.world_size())
        super().on_before_optimizer_step(optimizer)

    @override
    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        shares = [value.to_local() for value in gradients if isinstance(value, DTensor)]
        square = torch.zeros((), device=self.device)
        if shares:
            square = distributed.all_reduce_sum(torch.nn.utils.get_total_norm(shares).square())
        rest = [value for value in gradients if not isinstance(value, DTensor)]
        if rest:
            square = square + torch.nn.utils.get_total_norm(rest).square()
        return square.sqrt()

    @override
    def _clip(self, parameters: Sequence[Tensor], limit: float) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        factor = (limit / (self._norm(gradients) + 1e-6)).clamp(max=1)
        for value in gradients:
            (value.to_local() if isinstance(value, DTensor) else value).mul_(factor)

    @override
    def _reach_all(self, total: Tensor, weights: Any) -> Tensor:
        # What a term leaves out has no gradient on any process, and nobody waits for one.
        return total


def divide(network: nn.Module, mesh: DeviceMesh) -> None:
    """Give each process of a mesh a share of a network's parameters, block by block."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for module in lists for block in module if type(block).forward is not nn.Module.forward]
    # From the inside out, as FSDP asks for.
    for module in (*reversed(blocks), network):
        if next(module.parameters(), None) is not None:
            fully_shard(module, mesh=mesh)


def whole(value: Tensor) -> Tensor:
    """A tensor that is not divided. Collective."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def split_groups(optimizer: Optimizer) -> Optimizer:
    """Give divided parameters groups of their own: the kernels of optimisers take no mixture."""
    for group in list(optimizer.param_groups):
        divided = [value for value in group["params"] if isinstance(value, DTensor)]
        rest = [value for value in group["params"] if not isinstance(value, DTensor)]
        if divided and rest:
            group["params"] = rest
            optimizer.add_param_group({**group, "params": divided})
    return optimizer
