"""Adapters and their gradients as views of two flat buffers: one optimiser kernel, one all-reduce per step."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

# Keys of AdamW's state: the running means of the gradient and of its square.
MOMENTS = ("exp_avg", "exp_avg_sq")
# AdamW as the reference configures it; source: spec/training.md 2.13.
BETAS = (0.9, 0.95)
EPSILON = 1e-8
# In elements: 256 bytes, CUDA's alignment.
ALIGNMENT = 64


class FlatAdamW:
    """AdamW for one float32 tensor, with the kernel of ``torch.optim.AdamW(fused=True)``.

    That class would import torch._dynamo, a second of processor time at every start.

    state   by name: ``step``, the number of steps taken, shape (); ``MOMENTS``, in the shape of the values
    """

    def __init__(self, values: torch.Tensor, gradient: torch.Tensor, learning_rate: float, weight_decay: float) -> None:
        self.values, self.gradient = values, gradient
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.state = {
            "step": torch.zeros((), device=values.device),
            **{moment: torch.zeros_like(values) for moment in MOMENTS},
        }

    def step(self, skip: torch.Tensor | None = None) -> None:
        """Take a step. skip: float32 of shape (); where it is 1 the device changes neither values nor state."""
        steps, means, squares = (self.state[name] for name in ("step", *MOMENTS))
        steps += 1
        torch._fused_adamw_(
            [self.values],
            [self.gradient],
            [means],
            [squares],
            [],
            [steps],
            lr=self.learning_rate,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=self.weight_decay,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
            found_inf=skip,
        )
        if skip is not None:
            steps -= skip


class FlatGradients:
    """float32 gradients in one flat buffer, of tensors that are in another buffer in the same order."""

    def __init__(self, parameters: dict[str, nn.Parameter], values: torch.Tensor, scalars: int) -> None:
        """values: the buffer the parameters are views of; scalars: extra float32 values that are reduced with them."""
        self.parameters, self._values = parameters, values.detach()
        # The scalars come before the gradient, padded so that the gradient is aligned.
        room = -(-scalars // ALIGNMENT) * ALIGNMENT
        self._reduced = torch.zeros(room + len(values), device=values.device)[room - scalars :]
        self.scalars, self.gradient = self._reduced[:scalars], self._reduced[scalars:]
        self.gradients = {name: gradient for name, _, gradient in self._views(self.gradient)}
        # The tensors autograd differentiates, in the order of the buffers; it adds their gradients in place.
        self.leaves: list[torch.Tensor] = list(parameters.values())
        self._found_in = list(self.gradients.values())

    def _views(self, *flats: torch.Tensor) -> Iterator[tuple]:
        """Name and parameter, with its part of each flat buffer in its shape."""
        offset = 0
        for name, parameter in self.parameters.items():
            end = offset + parameter.numel()
            yield name, parameter, *(flat[offset:end].view(parameter.shape) for flat in flats)
            offset = end

    def join(self, groups: Sequence[Sequence[nn.Parameter]]) -> list[torch.Tensor]:
        """One leaf per group of neighbouring parameters, over their values and gradients; autograd sees these instead.

        groups   all parameters, in their order
        """
        assert [id(member) for members in groups for member in members] == [id(p) for p in self.parameters.values()]
        sizes = [sum(member.numel() for member in members) for members in groups]
        rest = [self.gradient.numel() - sum(sizes)]
        self.leaves = [values.requires_grad_() for values in self._values.split(sizes + rest)[: len(sizes)]]
        self._found_in = list(self.gradient.split(sizes + rest)[: len(sizes)])
        for leaf, gradient in zip(self.leaves, self._found_in, strict=True):
            leaf.grad = gradient
        return self.leaves

    def zero(self) -> None:
        self._reduced.zero_()

    def add_gradients(self, loss: torch.Tensor) -> None:
        """A backward pass that adds to the gradient in a few launches; plain autograd adds each leaf's separately."""
        found = torch.autograd.grad(loss, self.leaves, allow_unused=True)
        pairs = [(sum_, value) for sum_, value in zip(self._found_in, found, strict=True) if value is not None]
        torch._foreach_add_([gradient for gradient, _ in pairs], [value for _, value in pairs])

    def scalars_and_gradient(self, count: int) -> torch.Tensor:
        """One span that holds the scalars and the first ``count`` elements of the gradient."""
        return self._reduced[: self.scalars.numel() + count]


class FlatAdapters(FlatGradients):
    """The trainable tensors, their gradients and their AdamW moments, all float32 and contiguous in one order."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], learning_rate: float, weight_decay: float, scalars: int
    ) -> None:
        device = next(iter(parameters.values())).device
        assert all(p.dtype == torch.float32 and p.device == device for p in parameters.values())
        self.values = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
        super().__init__(parameters, self.values, scalars)
        for name, parameter, values in self._views(self.values):
            parameter.data, parameter.grad = values, self.gradients[name]
        self.optimizer = FlatAdamW(self.values, self.gradient, learning_rate, weight_decay)

    def step(self, skip: torch.Tensor | None = None) -> None:
        """Take an optimiser step; see ``FlatAdamW.step``."""
        self.optimizer.step(skip)
        self._tell_of_change()

    def _tell_of_change(self) -> None:
        # Storage is shared, but version counters are not: caches of values derived from the parameters check these.
        torch.autograd.graph.increment_version(self.parameters.values())

    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """AdamW's running means by name, copied to the CPU."""
        held = self.optimizer.state
        return {moment: {name: mean.clone() for name, _, mean in self._views(held[moment].cpu())} for moment in MOMENTS}

    def restore(
        self, adapters: dict[str, torch.Tensor], moments: dict[str, dict[str, torch.Tensor]], step: int
    ) -> None:
        """Load the values and ``moments`` that an optimiser had after ``step`` steps."""
        held = self.optimizer.state
        for name, _, values, *means in self._views(self.values, *(held[moment] for moment in MOMENTS)):
            values.copy_(adapters[name])
            for moment, mean in zip(MOMENTS, means, strict=True):
                mean.copy_(moments[moment][name])
        held["step"].fill_(step)
        self._tell_of_change()
