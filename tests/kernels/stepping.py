"""Driving a rule in tiles from tests."""

from __future__ import annotations

import dataclasses

import torch

from conftest import random_theta
from hyperadam.kernels import TILE, Lanes, Part, TiledState, TileLayout, lay_out
from hyperadam.kernels.tiled import ReferenceTiledRule


class Stepper:
    """A tiled rule with state and buffers for parts of the given sizes."""

    def __init__(self, tiled, rule, counts, *, dtype=torch.float32, state_dtype=None, **part):
        self.tiled, self.rule = tiled, rule
        self.parts = [dataclasses.replace(p, **part) for p in lay_out(counts)]
        self.layout = TileLayout.of(rule)
        tiles = sum(p.num_tiles for p in self.parts)
        shape = (tiles, self.layout.num_rows, TILE)
        self.state = TiledState(torch.zeros(shape, dtype=state_dtype or dtype))
        self.steps = torch.zeros(len(counts), dtype=torch.int64)
        self.peak = torch.zeros(1, dtype=torch.float64) if rule.has_peak else None
        grad, mean, log_var = torch.zeros(3, tiles * TILE, dtype=dtype)
        self.lanes = Lanes(grad, mean, log_var if rule.has_variance else None, direction=grad)

    def step(self, grads, parts=None, reduce=None):
        """One step; returns each part's direction, and whether the gradient was finite."""
        parts = self.parts if parts is None else parts
        numbers = [self.number(part) for part in parts]
        for part, grad in zip(parts, grads, strict=True):
            self.lanes.grad[part.lanes] = grad
        finite = self.tiled.step(
            self.state, parts, self.steps[numbers] + 1, self.lanes, reduce, self.peak
        )
        if bool(finite):
            self.steps[numbers] += 1
        return [self.lanes.direction[part.lanes].clone() for part in parts], bool(finite)

    def number(self, part: Part) -> int:
        return [p.first_tile for p in self.parts].index(part.first_tile)

    def fields(self, number=0):
        """A part's state by field."""
        part = self.parts[number]
        return self.layout.unpack(self.state.tiles_TRx[part.tiles], part.count)

    def values(self, name):
        """The parts' mean or log-variance, one behind the other."""
        lanes = getattr(self.lanes, name)
        return None if lanes is None else torch.cat([lanes[part.lanes] for part in self.parts])


def segments_are_problems_by_themselves(make, rule, counts, assert_close):
    """Parts of two problems, mixed and at different steps, beside each problem alone.

    Args:
        make: of a rule and its theta, the tiled rule.
        counts: coordinates of four parts.
        assert_close: how numbers are compared, actual and expected.
    """
    theta = random_theta(rule)
    segments, steps = [1, 0, 1, 0], torch.tensor([2, 0, 2, 0])
    generator = torch.Generator().manual_seed(0)

    def stepper(tiled):
        made = Stepper(tiled, rule, counts)
        made.parts = [
            dataclasses.replace(part, segment=segment, seed=10 + segment, sample=segment == 0)
            for part, segment in zip(made.parts, segments, strict=True)
        ]
        made.steps = steps.clone()
        return made

    joint = stepper(make(rule, theta))
    joint.state.tiles_TRx.uniform_(0.1, 1, generator=generator)
    start = joint.state.tiles_TRx.clone()
    if rule.has_peak:
        joint.peak = torch.tensor([5.0, 0.01], dtype=torch.float64)
    peaks = None if joint.peak is None else joint.peak.clone()
    grads = [torch.randn(count, generator=generator) for count in counts]
    directions, _ = joint.step(grads)
    for segment in (0, 1):
        alone = stepper(ReferenceTiledRule(rule, theta))
        alone.state.tiles_TRx.copy_(start)
        if peaks is not None:
            alone.peak = peaks[segment : segment + 1].clone()
        mine = [i for i in range(len(counts)) if segments[i] == segment]
        expected, _ = alone.step([grads[i] for i in mine], [alone.parts[i] for i in mine])
        assert_close(torch.cat([directions[i] for i in mine]), torch.cat(expected))
        for i in mine:
            lanes = alone.parts[i].lanes
            assert_close(joint.lanes.log_var[lanes], alone.lanes.log_var[lanes])
            for field, value in alone.fields(i).items():
                assert_close(joint.fields(i)[field], value)
        if peaks is not None:
            assert_close(joint.peak[segment], alone.peak[0])
