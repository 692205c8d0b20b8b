"""Networks as pure functions: multi-layer perceptrons, a recurrent one, and any nn.Module."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperadam.tasks.base import Params, make_generator
from hyperadam.tasks.supervised import Predict

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "elu": F.elu,
    "tanh": torch.tanh,
}

INIT_STD = 0.1
"""Of the papers' initial parameters, all of them."""


def _normal_params(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> Params:
    return {
        name: INIT_STD * torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }


def _channels_last(value: Tensor) -> Tensor:
    """Convolutions' weights and images in the order of memory that a CPU computes them in."""
    return value.to(memory_format=torch.channels_last) if value.dim() == 4 else value


class PlainNetwork:
    """A network with nothing random and nothing normalised: the same in training and validation."""

    def masks(self, seed: int, step: int, batch_size: int) -> list[Tensor]:
        return []

    def outputs(self, params: Params, inputs: Tensor, masks: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError

    def predictor(self, params: Params, inputs: Iterator[Tensor]) -> Predict:
        return lambda own: self.outputs(params, own, [])


@dataclasses.dataclass(frozen=True)
class MLP(PlainNetwork):
    """Linear layers with an activation between them.

    Attributes:
        sizes: of the inputs, of each layer's outputs.
        activation: a name of :data:`ACTIVATIONS`.
    """

    sizes: tuple[int, ...]
    activation: str = "sigmoid"

    def init_params(self, generator: torch.Generator) -> Params:
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(self.sizes), start=1):
            shapes[f"linear{layer}.weight"] = (fan_out, fan_in)
            shapes[f"linear{layer}.bias"] = (fan_out,)
        return _normal_params(shapes, generator)

    def outputs(self, params: Params, inputs: Tensor, masks: Sequence[Tensor]) -> Tensor:
        activation = ACTIVATIONS[self.activation]
        x = inputs.flatten(1).to(params["linear1.weight"].dtype)
        for layer in range(1, len(self.sizes)):
            if layer > 1:
                x = activation(x)
            x = F.linear(x, params[f"linear{layer}.weight"], params[f"linear{layer}.bias"])
        return x


@dataclasses.dataclass(frozen=True)
class LSTM(PlainNetwork):
    """Stacked LSTM layers that read a sequence, and a linear layer behind the last step.

    Each layer has one matrix for its gates (input, candidate, forget, output) and a forget bias of
    1 that is no parameter, as TensorFlow's BasicLSTMCell, which the papers use.

    Attributes:
        hidden: units of a layer.
        layers: how many.
        inputs: numbers read at a step; what comes as an image is read row by row.
        classes: numbers that come out, logits; 0: one number, as itself.
    """

    hidden: int = 20
    layers: int = 1
    inputs: int = 1
    classes: int = 0

    def init_params(self, generator: torch.Generator) -> Params:
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(1, self.layers + 1):
            fan_in = (self.inputs if layer == 1 else self.hidden) + self.hidden
            shapes[f"lstm{layer}.weight"] = (4 * self.hidden, fan_in)
            shapes[f"lstm{layer}.bias"] = (4 * self.hidden,)
        count = self.classes or 1
        shapes["linear.weight"], shapes["linear.bias"] = (count, self.hidden), (count,)
        return _normal_params(shapes, generator)

    def outputs(self, params: Params, inputs: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """Of (batch, steps) or (batch, ..., steps, inputs): (batch,), or (batch, classes)."""
        inputs = inputs.to(params["linear.weight"].dtype).reshape(len(inputs), -1, self.inputs)
        zeros = inputs.new_zeros(len(inputs), self.hidden)
        states = [(zeros, zeros)] * self.layers
        for value in inputs.unbind(1):
            x = value
            for layer, (h, c) in enumerate(states):
                weight, bias = (params[f"lstm{layer + 1}.{name}"] for name in ("weight", "bias"))
                gates = F.linear(torch.cat([x, h], dim=-1), weight, bias).chunk(4, dim=-1)
                take, candidate, keep, out = gates
                c = torch.sigmoid(keep + 1) * c + torch.sigmoid(take) * torch.tanh(candidate)
                x = torch.sigmoid(out) * torch.tanh(c)
                states[layer] = (x, c)
        outputs = F.linear(x, params["linear.weight"], params["linear.bias"])
        return outputs.squeeze(-1) if self.classes == 0 else outputs


class ModuleNetwork:
    """An ``nn.Module`` whose parameters are given from outside.

    Batch normalisation takes each training batch's own statistics. For validation they are averaged
    over training batches with the parameters as they are then, so nothing but parameters is carried
    from step to step (Y. Wu and J. Johnson, "Rethinking 'batch' in BatchNorm", 2021, section 3).

    Args:
        build: makes the module; called for each initialisation too.
        init: ``"normal"``: weights and biases as the papers have them, N(0, 0.1²), but those of
            normalisations, which begin as 1 and 0; ``"own"``: as the module has them.
        mask_shapes: shapes of the masks that the module takes behind its inputs, without the batch;
            each a factor for units, 0 or ``1 / (1 - dropout)``.
        dropout: how often they are 0.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        init: Literal["normal", "own"] = "own",
        mask_shapes: Sequence[tuple[int, ...]] = (),
        dropout: float = 0.5,
    ) -> None:
        self.build, self.init = build, init
        self.mask_shapes, self.dropout = tuple(mask_shapes), dropout
        self.validating = self._made(0)
        self.training = copy.deepcopy(self.validating)
        for module in self.training.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        for module in self.validating.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None  # a plain average

    def _made(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    def init_params(self, generator: torch.Generator) -> Params:
        return {name: _channels_last(value) for name, value in self._init(generator).items()}

    def _init(self, generator: torch.Generator) -> Params:
        if self.init == "own":
            seed = int(torch.randint(2**62, (), generator=generator))
            made = self._made(seed)
            return {name: value.detach().clone() for name, value in made.named_parameters()}
        own = {
            f"{prefix}.{name}".lstrip("."): value.detach().clone()
            for prefix, module in self.validating.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for name, value in module.named_parameters(recurse=False)
        }
        shapes = {name: tuple(v.shape) for name, v in self.validating.named_parameters()}
        drawn = _normal_params({n: s for n, s in shapes.items() if n not in own}, generator)
        return {name: own[name] if name in own else drawn[name] for name in shapes}

    def masks(self, seed: int, step: int, batch_size: int) -> list[Tensor]:
        keep, generator = 1 - self.dropout, make_generator(seed, "masks", step)
        return [
            torch.bernoulli(torch.full((batch_size, *shape), keep), generator=generator) / keep
            for shape in self.mask_shapes
        ]

    def outputs(self, params: Params, inputs: Tensor, masks: Sequence[Tensor]) -> Tensor:
        dtype = next(iter(params.values())).dtype
        arguments = [x.to(dtype) if x.is_floating_point() else x for x in (inputs, *masks)]
        outputs: Tensor = torch.func.functional_call(self.training, params, tuple(arguments))
        return outputs

    def predictor(self, params: Params, inputs: Iterator[Tensor]) -> Predict:
        module = copy.deepcopy(self.validating)
        buffers = dict(module.named_buffers())

        def call(own: Tensor) -> Tensor:
            ones = [torch.ones(len(own), *shape) for shape in self.mask_shapes]
            outputs: Tensor = torch.func.functional_call(module, (params, buffers), (own, *ones))
            return outputs

        if buffers:
            module.train()
            for batch in inputs:
                call(batch)
        module.eval()
        return call
