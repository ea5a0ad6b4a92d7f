"""DistPro: the search's hypergradient against double backward, what a search leaves, and how it is replayed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import expit, softmax
from torch import Tensor, nn
from torch.func import functional_call

from checks import Interrupt, bits, rows
from configs import composed
from experiments.cell import run_cell
from experiments.meaning import identity, needs_of, settle
from experiments.schema import with_recipe
from kt import hypergradient
from kt.classifier import Classifier
from kt.data import build_data
from kt.data.loaders import StreamingLoader, split
from kt.engine import Engine, measured_loop, seed_everything
from kt.errors import UserError
from kt.features import Features
from kt.functional import hierarchical_context, pathway_weights
from kt.methods import build_method
from kt.methods.distpro import Transform
from kt.settings import Schedule, defaults
from kt.stages import Head, Piece, Stage, head_of, stages_of
from kt.train import fit
from kt.transfer import TransferModel, frozen_statistics
from method_settings import DATASET, SCHEDULE, make_classifier, make_data, make_model, make_process

# ------------------------------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("biased_softmax", lambda x: softmax(np.append(x, 1))[:-1]),
        ("softmax", softmax),
        ("biased_l1", lambda x: np.abs(x) / (1 + np.linalg.norm(x, 1))),
        ("l1", lambda x: np.abs(x) / np.linalg.norm(x, 1)),
        ("sigmoid", expit),
    ],
)
def test_normalisations(name: str, expected: Any) -> None:
    logits = torch.tensor([[0.5, -2.0, 1.0, 0.1], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    for found, row in zip(pathway_weights(logits, name), logits.numpy(), strict=True):
        np.testing.assert_allclose(found.numpy(), expected(row), rtol=1e-12)


def test_limits_of_normalisations() -> None:
    """Every pathway can vanish under the biased one alone; as many equal logits as start make 1 / (L + 1)."""
    assert pathway_weights(torch.full((27,), -1e9)).sum() == 0
    assert pathway_weights(torch.full((27,), 1e9)).sum() == pytest.approx(1)
    assert pathway_weights(torch.ones(27))[0] == pytest.approx(1 / 28)
    with pytest.raises(ValueError, match="did you mean 'softmax'"):
        pathway_weights(torch.ones(3), "sofmax")


# ---------------------------------------------------------------------------------------------- pathways and transforms


def layers(transform: nn.Module) -> list[str]:
    """What a transform is made of, as text."""
    found = []
    for module in transform.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            found.append(f"{module.in_channels}-{module.out_channels}:{module.kernel_size[0]}")
        elif isinstance(module, nn.BatchNorm2d | nn.ReLU):
            found.append("bn" if isinstance(module, nn.BatchNorm2d) else "relu")
    return found


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("conv1", "6-9:1 bn"),
        ("conv2", "6-6:1 bn 6-1:1 6-9:3 bn"),
        ("conv3", "6-6:1 bn 6-1:1 6-6:3 bn 6-9:3 bn"),
        ("complex", "6-6:3 bn relu 6-1:1 6-6:3 bn relu 6-9:3 bn"),
    ],
)
def test_transforms_are_those_of_the_released_code(kind: str, expected: str) -> None:
    torch.manual_seed(0)
    transform = Transform(kind, 6, 9)
    assert " ".join(layers(transform)) == expected
    assert transform(torch.rand(2, 6, 4, 4), torch.Size((8, 8))).shape == (2, 9, 8, 8)
    wide = Transform(kind, 520, 530).before[0]
    assert wide.out_channels == (530 if kind == "conv1" else 512)
    fan_out = wide.out_channels * wide.kernel_size[0] ** 2
    assert wide.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)


def test_attention_is_a_product_without_a_sigmoid_and_enlarging_takes_the_nearest() -> None:
    transform = Transform("conv2", 2, 2).eval()
    for module in transform.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    transform.before[0].weight.data[:, :, 0, 0] = torch.eye(2)
    transform.before[2].conv.weight.data[0, :, 0, 0] = torch.tensor([3.0, -1.0])
    transform.after[0].weight.data[:, :, 1, 1] = torch.eye(2)
    x = torch.rand(1, 2, 2, 2)
    expected = (x * (3 * x[:, :1] - x[:, 1:])).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(transform(x, torch.Size((4, 4))), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "count", "some"),
    [
        ("wrn_16_2", "wrn_40_2", {}, 27, ("t1-s1-conv1", "t3-s1-conv3")),
        ("shufflenet_v2_32", "resnet32x4", {}, 27, ("t1-s3-conv2",)),
        ("resnet18", "resnet34", {}, 15, ("t1-s1-complex", "t5-s5-complex")),
        ("mobilenet_v1", "resnet50", {}, 15, ("t4-s5-complex",)),
        ("wrn_16_2", "wrn_40_2", {"connections": "rising", "transforms": ["complex"], "pooled": True}, 10, ()),
    ],
)
def test_pathways_of_a_pair(student: str, teacher: str, options: dict, count: int, some: tuple[str, ...]) -> None:
    pair = [make_classifier(name, 10, 0) for name in (student, teacher)]
    method = build_method("distpro", *pair, process="equal", **options)
    names = [str(pathway) for pathway in method.pathways]
    assert len(names) == len(set(names)) == count == method.factor == len(method.transforms)
    assert set(some) <= set(names)
    if count == 15:
        assert all(pathway.ours >= pathway.theirs for pathway in method.pathways)


# -------------------------------------------------------------------------------------------------------- hypergradient


class Smooth(nn.Module):
    """Two convolutions with batch normalisation and no ReLU, and dropout, for derivatives that exist everywhere."""

    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.Tanh(), nn.Dropout(dropout))
        self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.Tanh())
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(x)).mean((2, 3)))


@stages_of.register
def _(network: Smooth) -> list[Stage]:
    width = network.fc.in_features // 2
    return [Stage("one", 2, width, (network.first,)), Stage("two", 4, 2 * width, (network.second,))]


@head_of.register
def _(network: Smooth) -> Head:
    return Head((Piece(lambda x: x.mean((2, 3))),), (), network.fc)


class Setup:
    """A search in the midst of a training with momentum and weight decay, in double precision."""

    def __init__(self, how: str = "difference", dropout: float = 0.0, normalisation: str = "biased_softmax"):
        seed_everything(0)
        student, teacher = Classifier(Smooth(4, dropout)), Classifier(Smooth(6))
        options = {"hypergradient": how, "normalisation": normalisation, "factor": 3.0}
        method: Any = build_method("distpro_search", student, teacher, **options)
        self.model = TransferModel(student, method, {"teacher": teacher}).double()
        self.method = method
        with torch.no_grad():
            method.logits.copy_(torch.linspace(-1, 1.5, len(method.logits)))
        groups = [{"params": [*student.parameters()]}, {"params": [*method.transforms.parameters()]}]
        self.optimizer = torch.optim.SGD(groups, 0.3, 0.9, weight_decay=0.01)
        self.batch, self.held_out = self.draw(), self.draw()
        for _ in range(2):
            self.optimizer.zero_grad()
            self.train_loss(method.weigh().detach()).backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.targets = method.targets(method.features(self.model, self.batch)[1], method.everything)

    def draw(self) -> dict[str, Tensor]:
        return {"inputs": torch.rand(8, 3, 12, 12, dtype=torch.float64), "labels": torch.randint(5, (8,))}

    def train_loss(self, weights: Tensor) -> Tensor:
        """The label loss and the weighted distances, from hooks on the networks' own forward."""
        found: dict[Any, Tensor] = {}
        hooks = [
            module.register_forward_hook(lambda module, args, output, key=(who, level): found.update({key: output}))
            for who, network in (("s", self.model.student.network), ("t", self.model.teacher.network))
            for level, module in enumerate((network.first, network.second))
        ]
        with torch.no_grad():
            self.model.teacher(self.batch["inputs"])
        task = F.cross_entropy(self.model.student(self.batch["inputs"]), self.batch["labels"])
        for hook in hooks:
            hook.remove()
        total = task
        for weight, pathway, transform in zip(weights, self.method.pathways, self.method.transforms, strict=True):
            target = found["t", pathway.theirs]
            guess = transform(found["s", pathway.ours], target.shape[2:])
            total = total + 3.0 * weight * hierarchical_context(guess, target)
        return total

    def exact(self) -> Tensor:
        """The hypergradient by double backward through the optimizer's step."""
        network = self.model.student.network
        names, parameters = zip(*network.named_parameters(), strict=True)
        logits = self.method.logits
        with frozen_statistics(self.model.student, self.method):
            loss = self.train_loss(pathway_weights(logits, self.method.normalisation))
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            moved = {
                name: theta - 0.3 * (0.9 * self.optimizer.state[theta]["momentum_buffer"] + g + 0.01 * theta)
                for name, theta, g in zip(names, parameters, gradients, strict=True)
            }
            images = self.model.student.normalise(self.held_out["inputs"])
            # As every classifier's loss, in single precision.
            outer = F.cross_entropy(functional_call(network, moved, (images,)).float(), self.held_out["labels"])
        return torch.autograd.grad(outer, logits)[0]

    def found(self) -> Tensor:
        own = self.optimizer.param_groups[0]["params"]
        with frozen_statistics(self.model.student, self.method):
            gradients = torch.autograd.grad(self.train_loss(self.method.weigh().detach()), own)
        return self.method.hypergradient(
            self.model, self.batch, self.targets, self.held_out, self.optimizer, gradients
        )[0]


@pytest.mark.parametrize(("how", "error"), [("difference", 1e-3), ("jvp", 1e-11)])
@pytest.mark.parametrize("normalisation", ["biased_softmax", "l1", "sigmoid"])
def test_hypergradient_is_that_of_double_backward(how: str, error: float, normalisation: str) -> None:
    setup = Setup(how, normalisation=normalisation)
    exact, found = setup.exact(), setup.found()
    assert ((found - exact).norm() / exact.norm()).item() < error
    assert exact.norm() > 1e-6


def test_nothing_is_changed_by_the_hypergradient() -> None:
    setup = Setup(dropout=0.3)
    own = setup.optimizer.param_groups[0]["params"]
    gradients = [torch.rand_like(parameter) for parameter in own]

    def state() -> list[Any]:
        model = setup.model
        momenta = {str(i): each["momentum_buffer"] for i, each in enumerate(setup.optimizer.state.values())}
        grads = [parameter.grad for parameter in model.parameters()]
        modes = [module.training for module in model.modules()]
        networks = [bits(each) for each in (model.state_dict(), model.teacher.state_dict(), momenta)]
        return [*networks, grads, modes, torch.get_rng_state().tolist()]

    before = state()
    setup.method.hypergradient(setup.model, setup.batch, setup.targets, setup.held_out, setup.optimizer, gradients)
    assert state() == before


def searching(tmp_path: Path, precision: str = "fp32", **options: Any) -> tuple[Any, Any]:
    """A search's loop before its first step, and the batch that each of its loaders gives."""
    model = make_model("distpro_search", 10, **options)
    batch = next(make_data().train.epoch(0))
    engine = Engine({**defaults(Schedule), **SCHEDULE}, torch.device("cpu"), tmp_path, precision=precision)
    return measured_loop(model, model.method.phases()[-1], batch, engine), batch


def test_a_step_of_the_search(tmp_path: Path) -> None:
    """The logits move by Adam's step against the hypergradient; the networks by the loss with the *new* weights.

    Every pathway takes part, whatever its logit, and the train pass is the only one that moves running statistics.
    """
    loop, batch = searching(tmp_path)
    model, twin = loop.model, copy.deepcopy(loop.model)
    low = torch.where(torch.arange(len(model.method.logits)) % 2 == 0, -3.0, 1.0)
    for each in (model, twin):
        each.method.logits.data.copy_(low)
    slopes = []
    original = model.method.hypergradient
    model.method.hypergradient = lambda *args: slopes.append(original(*args)) or slopes[-1]
    logged = loop.step(batch)
    logits = model.method.logits.detach()
    assert slopes[0][0].abs().min() > 0
    torch.testing.assert_close(logits, low - 0.05 * slopes[0][0].sign(), rtol=1e-3, atol=1e-4)
    weights = softmax(np.append(logits.double().numpy(), 1.0))[:-1]
    ours, theirs = twin.method.features(twin, batch)
    everything = twin.method.everything
    distances = twin.method.distances(
        twin.method.maps(ours, everything), twin.method.targets(theirs, everything), everything
    )
    loss = ours.task(batch).loss + len(everything) * sum(w * d for w, d in zip(weights, distances, strict=True))
    assert logged["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    trained = [*twin.student.parameters(), *twin.method.transforms.parameters()]
    optimizer = torch.optim.SGD(trained, SCHEDULE["lr"], 0.9, weight_decay=5e-4)
    loss.backward()
    optimizer.step()
    twin.method.logits.data.copy_(logits)
    for key, value in twin.state_dict().items():
        if "extra_state" not in key:
            torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert torch.equal(model.method.get_extra_state(), logits[None])


def test_no_pass_of_the_hypergradient_is_in_reduced_precision(tmp_path: Path, monkeypatch: Any) -> None:
    loop, batch = searching(tmp_path, "bf16")
    seen: list[torch.dtype] = []
    inside = hypergradient.directional

    def watched(losses: Any, *args: Any) -> Tensor:
        hooks = [m.register_forward_hook(lambda m, x, y: seen.append(y.dtype)) for m in loop.model.modules()]
        found = inside(losses, *args)
        for hook in hooks:
            hook.remove()
        return found

    monkeypatch.setattr(hypergradient, "directional", watched)
    loop.step(batch)
    assert set(seen) == {torch.float32}


def test_each_network_runs_as_often_as_it_must(tmp_path: Path) -> None:
    """One pass over the teacher, four over the student (the last without its head), three over each transform."""
    loop, batch = searching(tmp_path)
    calls: dict[str, int] = {}
    watched = {"student": loop.model.student.network, "teacher": loop.model.teacher.network}
    parts = {f"{who}.{part}": getattr(each, part) for who, each in watched.items() for part in ("conv1", "fc")}
    parts |= {f"transform{i}": each for i, each in enumerate(loop.model.method.transforms)}
    for name, module in parts.items():
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    loop.step(batch)
    expected = {"teacher.conv1": 1, "student.conv1": 4, "student.fc": 2}
    assert calls == expected | dict.fromkeys((f"transform{i}" for i in range(18)), 3)


LEVELS, CLEAN = 3, 2


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Data and a teacher that has learnt them, `(data, teacher)`."""
    dataset = {**DATASET, "train_size": 800, "image_size": 24}
    data = build_data(dataset, Path("."), batch_size=32, seed=0, device=torch.device("cpu"))
    teacher = make_classifier("resnet20", 10, 1)
    schedule = {"epochs": 8, "batch_size": 32, "lr": 0.01, "optimizer": "adamw", "policy": "cosine"}
    fit(TransferModel(teacher, build_method("none", teacher, None)), data, tmp_path_factory.mktemp("t"), schedule)
    return data, teacher


@pytest.mark.parametrize("first_order", [False, True])
def test_a_pathway_that_helps_gains_weight(first_order: bool, problem: Any, tmp_path: Path) -> None:
    """The last level is the trained teacher's, others are noise. By the training loss's own gradient all sink."""
    data, teacher = problem
    student = make_classifier("resnet8", 10, 2)
    method: Any = build_method("distpro_search", student, teacher, transforms=["conv1"])
    true_targets = method.targets

    def targets(theirs: Any, live: Any) -> dict[int, Tensor]:
        scaled = {level: (x - x.mean()) / x.std() for level, x in true_targets(theirs, live).items()}
        return {level: x if level == CLEAN else torch.randn_like(x) for level, x in scaled.items()}

    def slope(model: TransferModel, batch: Any, targets: Any, *rest: Any) -> tuple[Tensor, Tensor]:
        distances = method.all_distances(Features(model.student, batch["inputs"]), targets).detach()
        return torch.autograd.grad(method.weigh(), method.logits, method.factor * distances)[0], distances.sum()

    method.targets = targets
    if first_order:
        method.hypergradient = slope
    schedule = {"epochs": 5, "batch_size": 32, "lr": 0.05, "policy": "constant"}
    fit(TransferModel(student, method, {"teacher": teacher}), data, tmp_path, schedule)
    logits = method.logits.detach().view(LEVELS, -1)
    if first_order:
        assert logits.max() < -1
    else:
        assert logits[CLEAN].mean() > 1 and logits[CLEAN].mean() > logits[:CLEAN].mean(1).max() + 0.5


# -------------------------------------------------------------------------------------------------------------- process


def test_a_search_killed_in_mid_epoch_leaves_the_same_process(tmp_path: Path) -> None:
    data = make_data()
    for folder, stops in (("whole", ()), ("stopped", (Interrupt(2), Interrupt(5)))):
        for stop in stops:
            with pytest.raises(KeyboardInterrupt):
                fit(make_model("distpro_search", 10), data, tmp_path / folder, SCHEDULE, extra_hooks=[stop])
        fit(make_model("distpro_search", 10), data, tmp_path / folder, SCHEDULE)
    whole, stopped = (torch.load(tmp_path / folder / "process.pth") for folder in ("whole", "stopped"))
    assert whole["logits"].shape == whole["weights"].shape == (6, 18) and whole["steps_per_epoch"] == 3
    assert whole["pair"]["teacher"] == {"network": "CifarResNet", "channels": [8, 8, 16]}
    assert whole["logits"].dtype == whole["weights"].dtype == torch.float32
    assert {key: value for key, value in whole.items() if not isinstance(value, Tensor)} == {
        key: value for key, value in stopped.items() if not isinstance(value, Tensor)
    }
    for key in ("logits", "weights"):
        assert torch.equal(whole[key], stopped[key])
    assert torch.equal(whole["weights"], pathway_weights(whole["logits"]))


def test_a_split_is_disjoint_and_pure() -> None:
    data = make_data()
    train, held = split(data.train, 0.2)
    assert (len(train.indices), len(held.indices)) == (51, 13)
    assert sorted([*train.indices.tolist(), *held.indices.tolist()]) == list(range(64))
    again = split(make_data().train, 0.2)[1]
    assert torch.equal(again.indices, held.indices)
    assert not torch.equal(split(make_data(seed=1).train, 0.2)[1].indices, held.indices)
    batch, other = next(held.epoch(3)), next(again.epoch(3))
    assert all(torch.equal(batch[key], other[key]) for key in batch)
    assert set(batch["indices"].tolist()) <= set(held.indices.tolist())
    assert torch.equal(batch["labels"], data.train.labels[batch["indices"]])
    options: dict[str, Any] = {"batch_size": 4, "augmentation": "none", "shuffle": True, "seed": 0}
    options |= {"device": torch.device("cpu"), "indices": torch.arange(10, 30)}
    streaming = StreamingLoader([], torch.zeros(20, dtype=torch.long), **options)  # type: ignore[arg-type]
    parts = [part.indices for part in split(streaming, 0.25)]
    assert [len(part) for part in parts] == [15, 5] and sorted(torch.cat(parts).tolist()) == list(range(10, 30))


def replaying(tmp_path: Path, steps: int = 1, **options: Any) -> tuple[Any, Any]:
    """A replaying loop before its first step, and its batch."""
    model = make_model("distpro", 10, **options)
    batch = next(make_data().train.epoch(0))
    engine = Engine({**defaults(Schedule), **SCHEDULE, "epochs": steps}, torch.device("cpu"), tmp_path)
    return measured_loop(model, model.method.phases()[-1], batch, engine), batch


def test_a_dropped_pathway_is_not_computed(tmp_path: Path) -> None:
    """Nor is it trained: not its transform, not by weight decay either. What comes back later learns on."""
    loop, batch = replaying(tmp_path, 3)
    process = make_process("conv1", "conv2")
    calls: list[int] = []
    for number, transform in enumerate(loop.model.method.transforms):
        transform.register_forward_hook(lambda *_, number=number: calls.append(number))
    for step in range(3):
        calls.clear()
        before = bits(loop.model.method.transforms.state_dict())
        logged = loop.step(batch)
        loop.iter += 1
        live = (process["logits"][step] > 0.5).nonzero().flatten().tolist()
        assert calls == live and len(live) == logged["live"] == 9
        after = bits(loop.model.method.transforms.state_dict())
        assert {int(key.split(".")[0]) for key in after if after[key] != before[key]} == set(live)
    loop, batch = replaying(tmp_path, 3, clip=None)
    assert loop.step(batch)["live"] == 18


def test_the_row_follows_from_the_step_alone() -> None:
    method: Any = make_model("distpro", 10, clip=None).method
    process = make_process("conv1", "conv2")["weights"]
    for step, expected in ((0, process[0]), (4, process[2]), (1, (process[0] + process[1]) / 2), (2, process[1])):
        live, weights = method.row({"step": step, "total": 5})
        assert live == list(range(18))
        torch.testing.assert_close(torch.tensor(weights), expected)
    final: Any = make_model("distpro", 10, process="final", clip=None).method
    for step in (0, 9):
        torch.testing.assert_close(torch.tensor(final.row({"step": step, "total": 10})[1]), process[2])
    clipped: Any = make_model("distpro", 10, process="final").method
    assert clipped.row({"step": 0, "total": 10})[0] == list(range(9, 18))
    border: Any = make_model("distpro", 10, process="final", clip=make_process("conv1", "conv2")["logits"][2, 9].item())
    assert border.method.row({"step": 0, "total": 10})[0] == list(range(10, 18))


@pytest.mark.parametrize(("factor", "expected"), [("pathways", 18), (2.5, 2.5)])
def test_equal_weights_are_the_mean_distance_times_the_factor(tmp_path: Path, factor: Any, expected: float) -> None:
    loop, batch = replaying(tmp_path, process="equal", factor=factor)
    method, everything = loop.model.method, loop.model.method.everything
    twin = copy.deepcopy(loop.model)
    ours, theirs = method.features(twin, batch)
    distances = twin.method.distances(method.maps(ours, everything), method.targets(theirs, everything), everything)
    mean = torch.stack(distances).mean().item()
    logged = loop.step(batch)
    assert logged["loss_pathways"].item() == pytest.approx(mean, rel=1e-5)
    assert (logged["loss"] - logged["loss_task"]).item() == pytest.approx(expected * mean, rel=1e-4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {**make_process("conv1"), "pathways": ["t1-s1-complex"]},
            "a process of 1 pathways, among them t1-s1-complex; ",
        ),
        (make_process("conv1"), r"a process of 9 pathways; expected the 18 of this pair, t1-s1-conv1 to t3-s3-conv2"),
        ({"logits": 1}, "this is something else"),
        (b"text", "expected a file of torch.save"),
        (None, "there is no such file"),
    ],
)
def test_a_process_that_does_not_fit_is_one_line(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "process.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    pair = [make_classifier(name, 10, 0) for name in ("resnet8", "resnet20")]
    with pytest.raises(UserError, match=rf"^method\.file=\S*process\.pth'?: .*{words}") as caught:
        build_method("distpro", *pair, files={"search": path}, transforms=["conv1", "conv2"])
    assert "\n" not in str(caught.value)


def test_without_a_process_there_is_one_line() -> None:
    pair = [make_classifier(name, 10, 0) for name in ("resnet8", "resnet20")]
    with pytest.raises(UserError, match=r"^method\.process=final: needs a searched process; .* or choose equal"):
        build_method("distpro", *pair, process="final")


# ---------------------------------------------------------------------------------------------------------------- cells

PAIR = ("method=distpro", "teacher=resnet20", "student=resnet8", "+schedule@teacher.schedule=scenes")


def search_of(*overrides: str) -> dict[str, Any]:
    return dict(needs_of(settle(composed(*PAIR, *overrides)))["search"].config)  # type: ignore[union-attr]


def test_one_search_serves_all_lengths_seeds_and_uses_of_a_pair() -> None:
    found = identity(search_of())
    for change in ("schedule.epochs=3", "schedule.lr=0.5", "seed=4", "method.process=final", "method.clip=null"):
        assert identity(search_of(change)) == found, change
    changes = ("method.search.seed=1", "method.search.schedule.epochs=3", "method.search.normalisation=softmax")
    changes += ("method.factor=1", "method.transforms=[conv1]", "student=resnet20", "dataset.subset=100")
    changes += ("teacher.schedule.epochs=7", "+dataset@method.search.dataset=scenes_small")
    assert len({found, *(identity(search_of(change)) for change in changes)}) == len(changes) + 1
    assert identity(search_of("student@method.search.student=resnet20")) == identity(search_of("student=resnet20"))
    alone = ("method=distpro_search", *PAIR[1:])
    assert identity(composed(*alone)) == found
    assert identity(composed(*PAIR, "schedule.epochs=3", "cell=search")) == found


def test_the_replaying_cell_is_what_it_replays() -> None:
    cells = [identity(composed(*PAIR, *more)) for more in ((), ("method.search.seed=1",), ("method.process=final",))]
    assert len(set(cells)) == 3
    equal = [identity(composed(*PAIR, "method.process=equal", *more)) for more in ((), ("method.search.seed=1",))]
    assert equal[0] == equal[1]
    assert set(needs_of(settle(composed(*PAIR, "method.process=equal")))) == {"teacher"}


def test_a_search_has_the_replaying_cells_teacher() -> None:
    small = "dataset@method.search.dataset"
    config = settle(composed(*PAIR, f"+{small}=scenes_small"))
    search = needs_of(config)["search"].config  # type: ignore[union-attr]
    assert identity(needs_of(search)["teacher"].config) == identity(needs_of(config)["teacher"].config)  # type: ignore[union-attr]
    assert (search["dataset"]["image_size"], config["dataset"]["image_size"]) == (24, 48)
    assert with_recipe({small: "cifar100"})["schedule@method.search.schedule"] == "scenes_small"
    other = ("teacher@method.search.teacher=resnet56", "student@method.search.student=resnet20")
    search = needs_of(settle(composed(*PAIR, *other)))["search"].config  # type: ignore[union-attr]
    teacher = needs_of(search)["teacher"].config  # type: ignore[union-attr]
    assert teacher["student"]["network"] == {**search["teacher"]["network"], "name": "resnet56", "width": 0.25}
    assert teacher["schedule"] == needs_of(config)["teacher"].config["schedule"]  # type: ignore[union-attr]
    assert search["student"]["network"]["name"] == "resnet20"


def test_a_mistake_in_a_searchs_own_part_bears_its_key() -> None:
    for line, words in (
        ("method.search.sead=1", r"method\.search\.sead: unknown key.*'seed'"),
        ("method.search.schedule.epoch=1", r"method\.search\.schedule\.epoch: unknown key"),
        ("method.search.validation=2", r"method\.search\.validation=2: expected a number"),
    ):
        with pytest.raises(UserError, match=words):
            composed(*PAIR, line)
    with pytest.raises(UserError, match=r"method\.search\.teacher\.sead: unknown key"):
        composed(*PAIR, "teacher@method.search.teacher=resnet56", "method.search.teacher.sead=1")


def test_a_searched_process_is_replayed_from_its_cell_and_from_its_file(tmp_path: Path) -> None:
    small = ("dataset.train_size=64", "dataset.test_size=32", "schedule.batch_size=16", f"output_root={tmp_path}")
    small += ("schedule.epochs=2", "teacher.schedule.epochs=1", "method.transforms=[conv1]", "wandb.mode=disabled")
    search = ("method.search.schedule.epochs=1", "method.search.schedule.batch_size=16")
    done = run_cell(composed(*PAIR[:3], *small, *search))
    folder = tmp_path / "cells" / done["needs"]["search"]
    process = torch.load(folder / "process.pth")
    assert process["logits"].shape == (3, 9)
    assert {row["live"] for row in rows(tmp_path / "cells" / done["id"]) if row["kind"] == "train"} == {9.0}
    copied = tmp_path / "mine.pth"
    copied.write_bytes((folder / "process.pth").read_bytes())
    again = run_cell(composed(*PAIR[:3], *small, *search, f"method.file={copied}"))
    assert again["id"] != done["id"] and again["metrics"] == done["metrics"]
    with pytest.raises(UserError, match=r"^method\.file=\S*none\.pth: expected a readable file"):
        run_cell(composed(*PAIR[:3], *small, f"method.file={tmp_path}/none.pth"))
