"""torch.optim.swa_utils: averages of the weights, their learning rates and batch statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import BatchNorm1d, Linear, Sequential, Tanh
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from hyperadam import VariationalHyperAdam
from integration.examples import are_equal, run_example, values

LR, SWA_LR = 1e-2, 1e-3
ANNEAL, EPOCHS = 3, 6


def test_the_example():
    names = run_example("Averaged weights")
    averaged, batches, optimizer = names["averaged"], names["batches"], names["optimizer"]
    assert int(averaged.n_averaged) == 4
    assert optimizer.param_groups[0]["lr"] == pytest.approx(optimizer.weights.lr / 4)
    assert not are_equal(values(averaged), values(names["model"]))
    hidden = torch.stack([averaged.module[0](inputs) for inputs, _ in batches]).detach()
    norm = averaged.module[1]
    torch.testing.assert_close(norm.running_mean, hidden.mean((0, 1)))
    torch.testing.assert_close(norm.running_var, hidden.var(dim=1).mean(0))


class Run:
    """A network that is averaged after each epoch, under a learning rate that is annealed."""

    def __init__(self, seed=0, **averaging):
        torch.manual_seed(seed)
        self.model = Sequential(Linear(4, 8), BatchNorm1d(8), Tanh(), Linear(8, 1))
        self.optimizer = VariationalHyperAdam(self.model.parameters(), lr=LR)
        self.averaged = AveragedModel(self.model, **averaging)
        self.scheduler = SWALR(
            self.optimizer, swa_lr=SWA_LR, anneal_epochs=ANNEAL, anneal_strategy="linear"
        )
        self.lrs, self.seen = [], []

    def train(self, epochs):
        for epoch in epochs:
            self.lrs.append(self.optimizer.param_groups[0]["lr"])
            generator = torch.Generator().manual_seed(epoch)
            for inputs in torch.randn(3, 16, 4, generator=generator):
                self.optimizer.zero_grad()
                mse_loss(self.model(inputs), inputs.square().sum(dim=1, keepdim=True)).backward()
                self.optimizer.step()
            self.scheduler.step()
            self.averaged.update_parameters(self.model)
            self.seen.append(values(self.model))

    def parts(self):
        return [self.model, self.optimizer, self.averaged, self.scheduler]


def test_the_average_and_the_learning_rates():
    run = Run()
    run.train(range(EPOCHS))
    for average, *seen in zip(values(run.averaged), *run.seen, strict=True):
        torch.testing.assert_close(average, torch.stack(seen).mean(0))
    steps = [min(epoch / ANNEAL, 1) for epoch in range(EPOCHS)]
    assert run.lrs == pytest.approx([LR + step * (SWA_LR - LR) for step in steps])


@pytest.mark.parametrize("kind", ["mean", "moving"])
def test_a_resumed_run_has_the_same_bits(tmp_path, kind):
    def make(seed):
        if kind == "mean":
            return Run(seed)
        return Run(seed, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

    whole, part, resumed = make(0), make(0), make(1)
    whole.train(range(EPOCHS))
    part.train(range(2))
    torch.save([thing.state_dict() for thing in part.parts()], tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    for thing, state in zip(resumed.parts(), saved, strict=True):
        thing.load_state_dict(state)
    resumed.train(range(2, EPOCHS))
    assert are_equal(values(whole.model), values(resumed.model))
    assert are_equal(values(whole.averaged), values(resumed.averaged))


def test_averaging_leaves_the_optimizer_alone():
    """``update_bn`` and the copy in AveragedModel touch nothing that the optimizer has."""
    run, other = Run(), Run()
    for epoch in range(EPOCHS):
        run.train([epoch])
        update_bn([torch.randn(16, 4)], copy.deepcopy(run.averaged))
        other.train([epoch])
    assert are_equal(values(run.model), values(other.model))
