"""Driving a rule in tiles from tests."""

from __future__ import annotations

import dataclasses

import torch

from hyperadam.kernels import TILE, Lanes, Part, TiledState, TileLayout, lay_out


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
