from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.optimizer import MasterAdamW


def layer(dtype):
    torch.manual_seed(0)
    return nn.Linear(3, 2).to(dtype)


def test_float32_steps_are_those_of_plain_adamw():
    ours, plain = layer(torch.float32), layer(torch.float32)
    optimizer = MasterAdamW(ours, lr=0.1, weight_decay=0.0, max_grad_norm=0.5)
    adamw = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.0)
    for step in range(3):
        inputs = torch.ones(4, 3) * (step + 1)
        ours(inputs).square().sum().backward()
        optimizer.collect()
        norm = optimizer.clip()
        optimizer.step()
        plain(inputs).square().sum().backward()
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(plain.parameters(), 0.5)))
        adamw.step()
        adamw.zero_grad()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())


def test_bfloat16_weights_keep_updates_that_would_round_away():
    model = layer(torch.bfloat16)
    before = model.weight.detach().float().clone()
    optimizer = MasterAdamW(model, lr=2e-5, weight_decay=0.0, max_grad_norm=1.0)
    for _ in range(200):
        model(torch.ones(1, 3, dtype=torch.bfloat16)).float().sum().backward()
        optimizer.collect()
        optimizer.step()
    moved = before - model.weight.detach().float()
    assert moved.min() > 3e-3  # 200 steps of 2e-5 are 4e-3; rounded each time, weights of 0.5 would not move


def test_bfloat16_gradients_of_micro_batches_add_up_in_float32():
    model = layer(torch.bfloat16)
    optimizer = MasterAdamW(model, lr=1e-3, weight_decay=0.0, max_grad_norm=1e9)
    for scale in [256.0] + [0.5] * 64:
        (model.bias.float().sum() * scale).backward()
        optimizer.collect()
    assert optimizer.clip() == pytest.approx((2 * (256 + 32) ** 2) ** 0.5)  # bfloat16 would have kept 256


def test_a_step_without_gradients_changes_nothing():
    model = layer(torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = MasterAdamW(model, lr=0.1, weight_decay=0.1, max_grad_norm=1.0)
    optimizer.collect()
    assert optimizer.clip() == 0.0
    optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_weight_decay_spares_biases():
    model = layer(torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = MasterAdamW(model, lr=0.1, weight_decay=0.5, max_grad_norm=1.0)
    (model(torch.ones(1, 3)) * 0).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.bias.detach(), before["bias"], rtol=0, atol=0)
    torch.testing.assert_close(model.weight.detach(), before["weight"] * 0.95)


def test_gradients_left_by_someone_else_are_no_part_of_the_first_step():
    model = layer(torch.float32)
    model(torch.ones(1, 3)).sum().backward()
    optimizer = MasterAdamW(model, lr=0.1, weight_decay=0.0, max_grad_norm=1.0)
    assert optimizer.clip() == 0.0
