"""Who is trained by what, Muon against torch's own, and a state that restores in place."""

import pytest
import torch
from torch import nn

from moltron.config.schema import OptimConfig
from moltron.models.registry import build_model, get_spec
from moltron.train.optim import AdamWFp8, Muon, Optimizer, split

ARCHITECTURE = dict(hidden_size=16, num_layers=2, num_heads=2, ffn_size=40)
PLAN = get_spec("esm2").plan


def tiny(**sizes):
    model = build_model("esm2", ARCHITECTURE | sizes, "cpu")
    model.init_weights(0)
    return model


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.empty_like(p).normal_(generator=generator)


def test_split_names_every_trained_parameter_once():
    model = tiny()
    names = {p: name for name, p in model.named_parameters()}
    hidden, matrices, vectors = ({names[p] for p in group} for group in split(model, PLAN))
    assert hidden == {
        f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    }
    assert matrices == {"embed.weight", "head.dense.weight"}
    assert all(name.endswith(("bias", "norm.weight")) for name in vectors)
    assert hidden | matrices | vectors == {n for n in names.values() if not n.startswith("contact_head")}


OPTIMIZERS = [("adamw", "fp32"), ("muon", "fp32"), ("adamw", "fp8"), ("muon", "fp8")]


@pytest.mark.parametrize(("name", "state"), OPTIMIZERS)
def test_weight_decay_is_on_matrices_only(name, state):
    model = tiny(hidden_size=64)
    optimizer = Optimizer(model, PLAN, OptimConfig(name=name, state=state, weight_decay=0.5), peak=1.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in optimizer.names:
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1)
    for n, p in model.named_parameters():
        decayed = p.ndim == 2 and not n.startswith("contact_head")
        torch.testing.assert_close(
            p.detach(), before[n] * (1 - 0.1 * 0.5 * _scale(optimizer, p)) if decayed else before[n]
        )


def _scale(optimizer, parameter):
    return next(s for o, s in optimizer.optimizers if any(parameter is p for g in o.param_groups for p in g["params"]))


def test_muon_is_torchs_muon():
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 16), (16, 24), (16, 16), (24, 16)]
    ours = [nn.Parameter(torch.empty(s).normal_(generator=generator)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    muon = Muon(ours, lr=0.02, weight_decay=0.1, momentum=0.9)
    muon.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in ours})
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.empty_like(a).normal_(generator=generator)
            b.grad = a.grad.clone()
        muon.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)  # of bf16 iterations; an update is about 0.02 · 3


def test_muon_stacks_are_bounded(monkeypatch):
    monkeypatch.setattr("moltron.train.optim.STACK", 600)
    test_muon_is_torchs_muon()


@pytest.mark.parametrize(("name", "state_dtype"), OPTIMIZERS)
def test_state_restores_in_place(name, state_dtype):
    config = OptimConfig(name=name, state=state_dtype)
    models = [tiny(hidden_size=64), tiny(hidden_size=64)]
    a, b = (Optimizer(m, PLAN, config, peak=4e-4) for m in models)
    for seed in range(3):
        set_gradients(models[0], seed)
        a.step(1e-3)
    with torch.no_grad():
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            q.copy_(p)
        state = b.state_tensors()
        assert state.keys() == a.state_tensors().keys()
        for key, tensor in a.state_tensors().items():
            state[key].copy_(tensor)
    b.set_updates(a.updates)
    for model, optimizer in zip(models, (a, b), strict=True):
        set_gradients(model, 9)
        optimizer.step(1e-3)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)
    kinds = {key.split(".")[1] for key in state}
    expected = {"exp_avg", "exp_avg_sq"} | ({"momentum_buffer"} if name == "muon" else set())
    assert kinds == expected | (set(AdamWFp8.KINDS) if state_dtype == "fp8" else set())
    assert not any("contact_head" in key for key in state)
