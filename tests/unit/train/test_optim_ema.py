"""Optimizer groups, schedule, gradient norm, average and precision."""

import itertools
import logging
import math

import pytest
import torch
from torch import nn

from parallel.gradients import clip_gradients, gradient_norm
from vidit.config import Model, Train
from vidit.model.dit import DiT
from vidit.train import optim, precision
from vidit.train.ema import Ema
from vidit.train.muon import Muon
from vidit.train.optim import build_optimizer, learning_rate
from vidit.train.precision import choose_device, choose_dtype


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


class TestSchedule:
    def test_constant(self):
        c = Train(learning_rate=2e-3)
        assert [learning_rate(c, step) for step in (0, 5, 10**6)] == [2e-3] * 3

    def test_warm_up(self):
        c = Train(learning_rate=1.0, warmup_steps=4, steps=10)
        assert [learning_rate(c, step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]

    def test_cosine(self):
        c = Train(learning_rate=2.0, schedule="cosine", steps=8)
        assert learning_rate(c, 0) == 2
        assert learning_rate(c, 2) == pytest.approx(1 + math.cos(math.pi / 4))
        assert learning_rate(c, 4) == pytest.approx(1)
        assert learning_rate(c, 8) == pytest.approx(0)
        assert learning_rate(c, 9) == pytest.approx(0), "no second rise beyond the end"

    def test_cosine_after_warm_up_to_a_floor(self):
        c = Train(learning_rate=1.0, schedule="cosine", steps=12, warmup_steps=4, final_learning_rate=0.1)
        rates = [learning_rate(c, step) for step in range(13)]
        assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
        assert rates[4] == pytest.approx(1)
        assert rates[8] == pytest.approx(0.55)
        assert rates[12] == pytest.approx(0.1)
        assert all(a > b for a, b in itertools.pairwise(rates[4:]))

    def test_all_warm_up(self):
        c = Train(learning_rate=1.0, schedule="cosine", steps=4, warmup_steps=4)
        assert [learning_rate(c, step) for step in range(4)] == [0.25, 0.5, 0.75, 1]


def named(model):
    return dict(model.named_parameters())


def hidden_network():
    """Two layers as the denoiser names them, between an embedding and a head."""
    torch.manual_seed(0)
    block = nn.ModuleDict({"mlp": nn.Linear(8, 8), "modulation": nn.Linear(2, 8)})
    return nn.ModuleDict({"embed": nn.Linear(4, 8), "blocks": nn.ModuleDict({"0": block}), "head": nn.Linear(8, 2)})


class TestAdamW:
    def test_matrices_decay_vectors_do_not(self):
        model = network()
        c = Train(weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
        (adamw,) = build_optimizer(c, named(model)).members
        decayed, rest = adamw.param_groups
        assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[2].weight)}
        assert {id(p) for p in rest["params"]} == {id(p) for p in model.parameters() if p.ndim == 1}
        assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0)
        assert all(g["betas"] == (0.8, 0.9) and g["eps"] == 1e-6 for g in (decayed, rest))

    def test_frozen_parameters_and_empty_groups_are_left_out(self):
        model = network()
        model[0].requires_grad_(False)
        held = {id(p) for p, _ in build_optimizer(Train(), named(model)).states()}
        assert held == {id(p) for n, p in model.named_parameters() if not n.startswith("0.")}
        (adamw,) = build_optimizer(Train(), {"w": model[2].weight}).members
        assert len(adamw.param_groups) == 1

    def test_a_step_is_adamw(self):
        """One update by hand (1711.05101, algorithm 2): the bias-corrected moments of step 1 are g and g^2."""
        c = Train(learning_rate=0.01, weight_decay=0.1, eps=1e-8)
        w, b = nn.Parameter(torch.tensor([[1.0, -2.0]])), nn.Parameter(torch.tensor([3.0]))
        optimizer = build_optimizer(c, {"w": w, "b": b})
        w.grad, b.grad = torch.tensor([[0.5, -0.1]]), torch.tensor([2.0])
        optimizer.step()
        torch.testing.assert_close(w.data, torch.tensor([[1 * (1 - 1e-3) - 0.01, -2 * (1 - 1e-3) + 0.01]]))
        torch.testing.assert_close(b.data, torch.tensor([3 - 0.01]))


class TestMuon:
    def test_it_takes_the_matrices_of_the_layers(self):
        model = hidden_network()
        adamw, muon = build_optimizer(Train(optimizer="muon"), named(model)).members
        assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(model["blocks"]["0"]["mlp"].weight)]
        both = [id(p) for member in (adamw, muon) for g in member.param_groups for p in g["params"]]
        assert sorted(both) == sorted(id(p) for p in model.parameters())

    def test_every_matrix_of_a_denoiser_block_but_its_modulation(self):
        with torch.device("meta"):
            dit = DiT(Model.preset("S"), 8, (3, 8, 8), 64)
        _, muon = build_optimizer(Train(optimizer="muon"), {f"dit.{n}": p for n, p in named(dit).items()}).members
        held = {id(p) for g in muon.param_groups for p in g["params"]}
        for name, p in dit.blocks.named_parameters():
            matrix = name.endswith(".weight") and p.ndim == 2 and ".modulation." not in name
            assert (id(p) in held) == matrix, name
        assert len(held) == 12 * 6 + 6 * 4, "query, key, value, out and an MLP in 12 blocks, half of them with text"

    def test_an_update_is_orthogonal_and_as_large_as_adamws(self):
        """The update is 0.2 sqrt(max(rows, columns)) times a matrix whose singular values are near 1."""
        model = hidden_network()
        optimizer = build_optimizer(Train(optimizer="muon", learning_rate=0.01), named(model))
        weight = model["blocks"]["0"]["mlp"].weight
        before = weight.detach().clone()
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        values = torch.linalg.svdvals((weight.detach() - before) / (0.01 * 0.2 * math.sqrt(8)))
        assert (values > 0.4).all()
        assert (values < 1.4).all()

    def test_it_is_torchs(self, monkeypatch):
        """Five steps beside `torch.optim.Muon`, whose products are in bf16 on every device."""
        monkeypatch.setattr(optim, "has_bf16", lambda _: True)
        ours, theirs = hidden_network()["blocks"], hidden_network()["blocks"]
        c = Train(optimizer="muon", learning_rate=0.02, weight_decay=0.1, muon_momentum=0.9)
        _, muon = build_optimizer(c, {f"blocks.{n}": p for n, p in named(ours).items()}).members
        weight = theirs["0"]["mlp"].weight
        torchs = torch.optim.Muon([weight], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
        start = weight.detach().clone()
        for step in range(5):
            for p in (ours["0"]["mlp"].weight, weight):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            muon.step()
            torchs.step()
        moved = (weight.detach() - start).norm()
        assert (ours["0"]["mlp"].weight.detach() - weight.detach()).norm() < 0.02 * moved

    def test_it_refuses_what_is_no_matrix(self):
        with pytest.raises(ValueError, match=r"not a parameter of shape \(8,\); give it to AdamW"):
            Muon([nn.Parameter(torch.zeros(8))], 0.1, 0.0, 0.9, torch.float32)


def test_rate_reaches_every_group():
    optimizer = build_optimizer(Train(optimizer="muon"), named(hidden_network()))
    optimizer.set_learning_rate(0.125)
    assert [g["lr"] for member in optimizer.members for g in member.param_groups] == [0.125, 0.125, 0.125]


class TestClip:
    def gradients(self, scale):
        model = network()
        for n, p in enumerate(model.parameters()):
            p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
        next(model.parameters()).grad = None
        return model

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
    def test_it_is_torchs(self, scale):
        ours, theirs = self.gradients(scale), self.gradients(scale)
        norm = gradient_norm(ours.parameters())
        flat = torch.cat([p.grad.flatten() for p in ours.parameters() if p.grad is not None])
        torch.testing.assert_close(norm, flat.norm())
        clip_gradients(ours.parameters(), 1.5, norm)
        torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.5), norm)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.equal(a.grad, b.grad)
        assert gradient_norm(ours.parameters()) <= 1.5 + 1e-5

    def test_a_small_gradient_stays(self):
        model = self.gradients(1e-3)
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        clip_gradients(model.parameters(), 1.0, gradient_norm(model.parameters()))
        assert all(
            torch.equal(a, p.grad)
            for a, p in zip(before, (p for p in model.parameters() if p.grad is not None), strict=True)
        )

    def test_what_is_not_finite_shows(self):
        model = self.gradients(1.0)
        model[2].bias.grad[0] = float("nan")
        assert gradient_norm(model.parameters()).isnan()


class TestEma:
    def test_formula(self):
        """a_n = d_n a_(n-1) + (1 - d_n) w_n with d_n = min(decay, (1 + n) / (10 + n))."""
        model = network()
        ema = Ema(model, 0.5)
        expected = {name: p.detach().double() for name, p in model.named_parameters()}
        for n in range(20):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn(p.shape))
            ema.update(model, n)
            d = min(0.5, (1 + n) / (10 + n))
            expected = {k: d * e + (1 - d) * model.get_parameter(k).detach().double() for k, e in expected.items()}
        for name, value in expected.items():
            torch.testing.assert_close(ema.averages[name].double(), value, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(("n", "decay"), [(0, 0.1), (8, 0.5), (10**6, 0.999)])
    def test_decay_starts_low(self, n, decay):
        weight = nn.Module()
        weight.w = nn.Parameter(torch.zeros(1))
        ema = Ema(weight, 0.999)
        nn.init.ones_(weight.w)
        ema.update(weight, n)
        assert ema.averages["w"].item() == pytest.approx(1 - decay, rel=1e-5)

    def test_decay_zero_follows(self):
        model = network()
        ema = Ema(model, 0.0)
        nn.init.ones_(model[0].weight)
        ema.update(model, 100)
        assert torch.equal(ema.averages["0.weight"], model[0].weight)

    def test_applied_and_back_is_exact(self):
        model = network()
        ema = Ema(model, 0.9)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.7).add_(0.3)
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        averages = {k: v.clone() for k, v in ema.averages.items()}
        with ema.applied(model):
            assert all(torch.equal(v, averages[k]) for k, v in model.state_dict().items())
            assert not model.training
        assert model.training
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        assert all(torch.equal(v, averages[k]) for k, v in ema.averages.items())

    @pytest.mark.parametrize("fails_at", [0, 2, 5, None])
    def test_an_error_anywhere_leaves_the_weights_as_they_were(self, fails_at, monkeypatch):
        """No memory for the copy of the first, third or last of six parameters; or in the work inside."""
        model = network()
        ema = Ema(model, 0.9)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.7).add_(0.3)
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        averages = {k: v.clone() for k, v in ema.averages.items()}
        exchange, calls = Ema._exchange, []

        def failing(*arguments):
            calls.append(arguments)
            if len(calls) - 1 == fails_at:
                raise torch.OutOfMemoryError
            exchange(*arguments)

        monkeypatch.setattr(Ema, "_exchange", failing)
        with pytest.raises((torch.OutOfMemoryError, KeyError)), ema.applied(model):
            raise KeyError
        assert model.training
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        assert all(torch.equal(v, averages[k]) for k, v in ema.averages.items())

    def test_averages_are_copies_of_what_is_trained(self):
        model = network().to(torch.bfloat16)
        model[0].requires_grad_(False)
        ema = Ema(model, 0.9)
        assert list(ema.averages) == ["1.weight", "1.bias", "2.weight", "2.bias"]
        assert all(a.dtype == torch.float32 and not a.requires_grad for a in ema.averages.values())
        nn.init.zeros_(model[2].weight)
        assert ema.averages["2.weight"].any()
        with ema.applied(model):
            assert model[0].weight.any()

    def test_applied_and_update_leave_no_graph(self):
        model = network()
        ema = Ema(model, 0.9)
        ema.update(model, 3)
        with ema.applied(model):
            pass
        assert all(p.is_leaf and p.requires_grad and p.grad is None for p in model.parameters())


class TestPrecision:
    def test_asked_for(self):
        cpu = torch.device("cpu")
        assert choose_dtype("fp32", cpu) == torch.float32
        assert choose_dtype("bf16", cpu) == torch.bfloat16

    @pytest.mark.parametrize("native", [True, False])
    def test_auto_and_the_warning(self, native, monkeypatch, caplog):
        monkeypatch.setattr(precision, "has_bf16", lambda device: native)
        cpu = torch.device("cpu")
        assert choose_dtype("auto", cpu) == (torch.bfloat16 if native else torch.float32)
        with caplog.at_level(logging.WARNING):
            choose_dtype("fp32", cpu)
            assert not caplog.records
            choose_dtype("bf16", cpu)
        assert bool(caplog.records) != native

    def test_device(self, monkeypatch):
        assert choose_device("cpu") == torch.device("cpu")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(RuntimeError, match=r"train\.device=cuda, .* use train\.device=auto or cpu"):
            choose_device("cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert [choose_device(n).type for n in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
