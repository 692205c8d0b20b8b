"""Two thetas side by side, in one rule with the channels of both."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hyperadam.errors import ConfigError
from hyperadam.rule import SIZES, AdamCandidatesRule, Rule
from hyperadam.weights.store import Weights, rule_from_dict

_NOT_OF_THETA = ("calibrated",)


def join_weights(first: Weights, second: Weights) -> Weights:
    """Weights whose steps have the mean that the two have on average.

    The channels of both lie side by side and don't see each other, so that the mean of the joint
    update is the sum of the means of both, for which the lr is half of theirs: exactly, up to
    roundings. The variance is twice the geometric mean of theirs, which is the sum where they are
    equal; with ``variance_base`` that is of the VarBlocks' part, which counts in units of the joint
    mean. Meta-training can go on with the result as with any other (docs/method.md, "Joining").

    Args:
        first, second: of Variational HyperAdam or of HyperAdam, with rules that differ in their
            channels and moments alone, and with the same lr and schedule. Whether the learning
            rate is calibrated, of which theta knows nothing, is as the first has it.

    Raises:
        ConfigError: their rules, lrs or schedules can't be joined.
    """
    pair = (first, second)
    rule = _joint_rule(first.rule, second.rule)
    for name in ("lr", "schedule"):
        ours = [getattr(weights, name) for weights in pair]
        if ours[0] != ours[1]:
            raise ConfigError(f"weights are joined that have one {name}; got {ours}")
    theta = {
        name: _joint(name, shape, rule, [weights.rule for weights in pair],
                     [weights.theta[name].double() for weights in pair]).to(first.theta[name].dtype)
        for name, shape in rule.theta_shapes().items()
    }  # fmt: skip
    notes = {
        name: separator.join(dict.fromkeys(getattr(weights, name) for weights in pair))
        for name, separator in (
            ("preset", " joined with "), ("data", ","), ("commit", ", "), ("licence", " AND "),
        )
    }  # fmt: skip
    return Weights(
        rule=rule,
        theta=theta,
        lr=first.lr / 2,
        schedule=first.schedule,
        steps=first.steps + second.steps,
        date=max(first.date, second.date),
        **notes,
    )


def _joint_rule(first: Rule, second: Rule) -> Rule:
    for rule in (first, second):
        if not (isinstance(rule, AdamCandidatesRule) and rule.preprocessing):
            raise ConfigError(
                f"only rules with candidates and preprocessing are joined; got {rule}"
            )
    ours = [rule.to_dict() for rule in (first, second)]
    differing = [
        name
        for name in ours[0]
        if name not in (*SIZES, *_NOT_OF_THETA) and ours[0][name] != ours[1].get(name)
    ]
    if differing:
        raise ConfigError(f"rules are joined that have the same {', '.join(differing)}; got {ours}")
    settings = {**ours[0], "channels": first.channels + second.channels}
    if _decays(first):
        settings["moment_decays"] = tuple(sorted({*_decays(first), *_decays(second)}))
    return rule_from_dict(settings)


def _decays(rule: Rule) -> tuple[float, ...]:
    return tuple(getattr(rule, "moment_decays", ()))


def _joint(
    name: str, shape: tuple[int, ...], rule: Rule, rules: list[Rule], parts: list[Tensor]
) -> Tensor:
    """One tensor of the joint theta: the parts as blocks, 0 where one would see the other."""
    if name == "linear_var1.weight":
        return torch.cat(parts, dim=-1) / 2
    if name == "linear_var1.bias":
        return (parts[0] + parts[1]) / 2 + math.log(2)
    if name.endswith(".bias"):  # gates, each with its channels
        gates = shape[0] // rule.channels
        return torch.cat([part.view(gates, -1) for part in parts], dim=-1).flatten()
    gates, joint = shape[0] // rule.channels, torch.zeros(shape, dtype=torch.float64)
    begin = 0
    for own, part in zip(rules, parts, strict=True):
        end = begin + own.channels
        if name == "pre_linear.weight":  # features are seen by both
            joint[begin:end, _features(own, rule)] = part
        else:
            blocks = joint.view(gates, rule.channels, -1, rule.channels)
            blocks[:, begin:end, :, begin:end] = part.view(gates, own.channels, -1, own.channels)
        begin = end
    return joint


def _features(own: Rule, rule: Rule) -> list[int]:
    """Where a rule's features are among the joint rule's."""
    if not _decays(rule):
        return [0]
    places = [_decays(rule).index(decay) for decay in _decays(own)]
    return [2 * place + which for place in places for which in (0, 1)]
