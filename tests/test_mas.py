"""Multiple auxiliary subspaces: what each step moves, against rounds and derivatives written out anew."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import kt.methods.mas
from checks import bits
from configs import composed
from experiments.meaning import identify, identity, settle
from kt.data import build_data, fingerprint, unlabelled
from kt.data.fingerprint import combined
from kt.engine import Engine, PhaseLoop, measured_loop
from kt.errors import UserError
from kt.functional import image_errors, pair_weights, subspace_loss
from kt.hypergradient import derivatives_ahead
from kt.methods.mas import AuxiliaryNetworks
from kt.models.names import IMAGENET
from kt.settings import Schedule, defaults
from kt.train import fit
from kt.transfer import TransferModel
from method_settings import DATASET, SCHEDULE, make_data, make_model

NAMES = ("as", "mas", "m2as", "m2a2s")
META = {"pair_weights": "meta"}
UNIFORM = {"pair_weights": "uniform"}


@pytest.fixture(scope="module")
def batch() -> Any:
    return next(make_data().train.epoch(0))


def make_loop(model: TransferModel, batch: Any, folder: Path, **schedule: Any) -> PhaseLoop:
    """A loop at the first round, whose source images are the batch mirrored."""
    engine = Engine({**defaults(Schedule), **SCHEDULE, **schedule}, torch.device("cpu"), folder)
    loop = measured_loop(model, model.method.phases()[-1], batch, engine)
    if "source" in loop.loaders:
        loop.loaders["source"].batch = {**batch, "inputs": batch["inputs"].flip(3)}  # type: ignore[attr-defined]
    loop.epoch = 1
    return loop


def test_the_losses_are_the_equations() -> None:
    random = np.random.default_rng(0)
    shape, sources, images = (3, 2, 2), 2, 4
    targets = random.normal(size=(2, images, *shape))
    mapped = random.normal(size=(sources + 1, 2, images, *shape))
    weights = random.uniform(size=(sources + 1, 2, images))
    for used in (weights, np.ones_like(weights)):
        to_many = many_to_many = 0.0
        for n in range(images):
            for q in range(2):
                error = [((mapped[p, q, n] - targets[q, n]) ** 2).mean() * used[p, q, n] for p in range(sources + 1)]
                to_many += error[-1] / (images * 2)
                many_to_many += sum(error[:-1]) / (images * sources * 2)
        rows = [
            [image_errors(*map(torch.from_numpy, (x, y))) for x, y in zip(row, targets, strict=True)] for row in mapped
        ]
        errors = torch.stack([torch.stack(row) for row in rows])
        given = torch.from_numpy(used)
        assert subspace_loss(errors, given).item() == pytest.approx(many_to_many + to_many)
        assert subspace_loss(errors[-1:], given[-1:]).item() == pytest.approx(to_many)
    assert subspace_loss(errors).item() == pytest.approx(many_to_many + to_many)
    summed = image_errors(torch.from_numpy(mapped[0, 0]), torch.from_numpy(targets[0]), "sum")
    np.testing.assert_allclose(summed, ((mapped[0, 0] - targets[0]) ** 2).sum((1, 2, 3)))
    with pytest.raises(ValueError, match="reduction 'total': expected mean or sum"):
        image_errors(torch.zeros(1, 2), torch.zeros(1, 2), "total")


def test_pair_weights_average_to_one() -> None:
    logits = torch.randn(3, 5, 4)
    exponents = np.exp(logits.numpy())
    np.testing.assert_allclose(pair_weights(logits), 4 * exponents / exponents.sum(-1, keepdims=True), rtol=1e-5)
    assert torch.equal(pair_weights(torch.zeros(2, 4)), torch.ones(2, 4))


@pytest.mark.parametrize(("direct", "interpolated"), [(0, False), (0, True), (1, True)])
def test_step_two_finds_the_map_between_the_networks(direct: int, interpolated: bool) -> None:
    """Where the student's features are an affine map of the teacher's, nothing is left for step 3 to change."""
    torch.manual_seed(0)
    source = torch.randn(32, 4, 3, 3)
    weight, bias = torch.randn(4, 4), torch.randn(4)
    target = torch.einsum("dc,nchw->ndhw", weight, source) + bias[:, None, None]
    networks = AuxiliaryNetworks("fc", 4, [4] * direct, [4], interpolated)
    optimizer = torch.optim.Adam(networks.parameters(), 0.02)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)

    def errors() -> Tensor:
        return torch.stack(
            [torch.stack([image_errors(x, target) for x in row]) for row in networks([source], [target])]
        )

    for _ in range(800):
        optimizer.zero_grad()
        subspace_loss(errors()).backward()
        optimizer.step()
        decay.step()
    target.requires_grad_()
    assert errors().max() < 1e-6
    subspace_loss(errors()).backward()
    assert target.grad is not None and target.grad.abs().max() < 1e-5
    if not interpolated:
        layer = networks.adapter[0]
        torch.testing.assert_close(layer.weight[:, :, 0, 0], weight, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(layer.bias, bias, rtol=1e-3, atol=1e-3)


@contextlib.contextmanager
def watched(loop: PhaseLoop, see: Callable[[str, dict[str, Any]], None]) -> Iterator[None]:
    """Within, every update is told with its arguments before it is made."""
    update = loop.update

    def told(name: str, *losses: Tensor, **arguments: Any) -> None:
        see(name, {**dict(zip(("loss",), losses, strict=False)), **arguments})
        update(name, *losses, **arguments)

    loop.update = told  # type: ignore[method-assign]
    yield
    del loop.update


@pytest.mark.parametrize("name", NAMES)
def test_each_update_moves_its_own_side_alone(name: str, batch: Any, tmp_path: Path) -> None:
    model = make_model(name, 10, **({} if name == "as" else META))
    loop = make_loop(model, batch, tmp_path)
    states: list[tuple[str, dict[str, bytes]]] = []

    def state() -> dict[str, bytes]:
        return bits({key: value for key, value in model.named_parameters()})

    prefixes = {"auxiliary": "method.networks.", "meta": "method.meta.", "main": "student."}

    def see(update: str, arguments: dict[str, Any]) -> None:
        states.append((update, state()))
        if "loss" in arguments:  # it could not even move another side
            named = dict(model.named_parameters())
            reached = torch.autograd.grad(arguments["loss"], [*named.values()], retain_graph=True, allow_unused=True)
            found = {key for key, gradient in zip(named, reached, strict=True) if gradient is not None}
            assert found and all(key.startswith(prefixes[update]) for key in found), update

    with watched(loop, see):
        loop.step(batch)
    after = [before for _, before in states[1:]] + [state()]
    names = [update for update, _ in states]
    assert names == ["auxiliary"] * 2 + ([] if name == "as" else ["meta"]) + ["main"]
    for (update, before), now in zip(states, after, strict=True):
        moved = {key for key in now if now[key] != before[key]}
        assert moved and all(key.startswith(prefixes[update]) for key in moved), update
    assert {key.partition(".")[0] for key in dict(model.named_parameters())} == {"student", "method"}


@pytest.mark.parametrize(("name", "options"), [("mas", META), ("l2t", {})])
def test_a_meta_network_learns_at_every_so_many_updates(
    name: str, options: dict[str, Any], batch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop(make_model(name, 10, meta_interval=2, **options), batch, tmp_path)
    learning = []
    for step in range(5):
        monkeypatch.setattr(loop, "numbered", lambda each, step=step: {**each, "step": step, "total": 5})
        with watched(loop, lambda update, _: learning.append(step) if update == "meta" else None):  # noqa: B023
            loop.step(batch)
    assert learning == [0, 2, 4]


def test_the_first_epochs_train_the_student_alone(batch: Any, tmp_path: Path) -> None:
    model, plain = make_model("m2as", 10), make_model("none", 10)
    loop = make_loop(model, batch, tmp_path)
    loop.epoch = 0
    told: list[str] = []
    before = bits(model.method.state_dict())
    with watched(loop, lambda update, _: told.append(update)):
        loop.step(batch)
    make_loop(plain, batch, tmp_path / "plain").step(batch)
    assert told == ["main"] and bits(model.method.state_dict()) == before
    assert bits(model.student.state_dict()) == bits(plain.student.state_dict())


@pytest.mark.parametrize(
    ("name", "options", "student", "teacher"),
    [
        ("as", {}, 1, 1),
        ("m2as", UNIFORM, 1, 1),
        ("m2as", META, 4, 1),  # the task's loss one step ahead, and one pass to each side
        ("m2a2s", UNIFORM, 2, 2),  # source images
    ],
)
def test_passes_are_shared(name: str, options: Any, student: int, teacher: int, batch: Any, tmp_path: Path) -> None:
    model = make_model(name, 10, **options, aux_updates=5)
    loop = make_loop(model, batch, tmp_path)
    counts: Counter[str] = Counter()
    for who, network in (("student", model.student.network), ("teacher", model.teacher.network)):
        network.layer1.register_forward_hook(lambda *_, who=who: counts.update([who]))
    loop.step(batch)
    assert counts == {"student": student, "teacher": teacher}


@pytest.mark.parametrize("name", ["mas", "m2a2s"])
def test_only_the_target_batch_moves_running_statistics(name: str, batch: Any, tmp_path: Path) -> None:
    model, plain = make_model(name, 10, **META), make_model("none", 10)
    for each in (model, plain):
        make_loop(each, batch, tmp_path / str(id(each))).step(batch)
    found, expected = (bits(dict(each.student.named_buffers())) for each in (model, plain))
    assert found == expected


def by_hand(model: TransferModel, batch: Any, method: Any) -> None:
    """A round of plain torch, with passes of their own for each step, in the order of the paper's equations."""
    student = model.student.network
    lr, momentum, decay = SCHEDULE["lr"], 0.9, 5e-4
    main = torch.optim.SGD(student.parameters(), lr, momentum, weight_decay=decay)
    auxiliary = torch.optim.Adam(method.networks.parameters(), 1e-3)

    def maps(classifier: Any, inputs: Tensor) -> list[Tensor]:
        x, found = classifier.normalise(inputs), []
        for stage in classifier.stages:
            x = stage(x)
            found.append(x)
        return [*found, x.mean((2, 3))[:, :, None, None]]

    def error(networks: Any, theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> Tensor:
        if not networks.projections:
            return (networks.adapter(theirs[-1]) - ours[-1]).pow(2).mean()
        inputs = [*theirs[: networks.direct], networks.adapter(theirs[2])]
        rows = []
        for x, row in zip(inputs, networks.projections, strict=True):
            found = []
            for convolution, y in zip(row, ours[:-1], strict=True):
                resized = F.interpolate(x, y.shape[2:], mode="bilinear", align_corners=False)
                found.append((convolution(resized) - y).pow(2).mean())
            rows.append(sum(found) / len(found))
        return rows[-1] + (sum(rows[:-1]) / len(rows[:-1]) if rows[1:] else 0)  # type: ignore[return-value]

    sets = list(zip(method.networks, [batch["inputs"], batch["inputs"].flip(3)], strict=False))
    for _ in range(2):
        auxiliary.zero_grad()
        for networks, inputs in sets:
            buffers = {key: value.clone() for key, value in student.named_buffers()}
            with torch.no_grad():
                theirs, ours = maps(model.teacher, inputs), maps(model.student, inputs)
            for key, value in student.named_buffers():
                value.copy_(buffers[key])
            error(networks, theirs, ours).backward()
        auxiliary.step()
    with torch.no_grad():
        theirs = maps(model.teacher, batch["inputs"])
    ours = maps(model.student, batch["inputs"])
    shares = (0.8, 0.2) if len(sets) > 1 else (1.0,)
    match = sum(share * error(networks, theirs, ours) for share, (networks, _) in zip(shares, sets, strict=True))
    main.zero_grad()
    (F.cross_entropy(student.fc(ours[-1].flatten(1)), batch["labels"]) + 3.0 * match).backward()
    main.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_round_is_the_papers(name: str, batch: Any, tmp_path: Path) -> None:
    options = {"weight": 3.0, **({} if name == "as" else {**UNIFORM, "stages": "blocks"})}
    options |= {"source_weight": 0.2} if name == "m2a2s" else {}
    models = [make_model(name, 10, **options).to(torch.float64) for _ in range(2)]
    batch = {**batch, "inputs": batch["inputs"].double()}
    for model in models:
        model.train()
    make_loop(models[0], batch, tmp_path).step(batch)
    by_hand(models[1], batch, models[1].method)
    for (key, found), expected in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9, msg=key)


def meta_gradients(
    name: str, batch: Any, folder: Path, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor, Tensor]:
    """The meta network's gradient, that by a backward pass through the update, and that of the update's own loss."""
    if exact:
        monkeypatch.setattr(kt.methods.mas, "derivatives_ahead", functools.partial(derivatives_ahead, how="jvp"))
    model = make_model(name, 10, **META, weight=3.0).to(torch.float64)
    loop = make_loop(model, batch, folder, optimizer="sgd", lr=0.05)
    meta = [*model.method.meta.parameters()]
    with torch.no_grad():
        for parameter in meta:
            parameter.copy_(torch.randn_like(parameter))
    loop.step(batch)  # so that there is momentum
    flat: dict[str, Tensor] = {}

    def see(update: str, arguments: dict[str, Any]) -> None:
        def gradient(loss: Tensor) -> Tensor:
            found = torch.autograd.grad(loss, meta, retain_graph=True)
            return torch.cat([each.flatten() for each in found]).clone()

        if update == "auxiliary":
            return
        if update == "meta":
            flat["found"] = gradient(arguments["loss"])
            flat["through"], flat["own"] = through_the_update(model, loop, batch, gradient)

    with watched(loop, see):
        loop.step(batch)
    return flat["found"], flat["through"], flat["own"]


def through_the_update(
    model: TransferModel, loop: PhaseLoop, batch: Any, gradient: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Steps the student with a graph, as the schedule's SGD does, and takes the task's loss of what comes out."""
    method, network = model.method, model.student.network
    parameters = dict(network.named_parameters())
    buffers = {key: value.clone() for key, value in network.named_buffers()}

    def features(values: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = network

            def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
                found = []
                for stage in model.student.stages:
                    x = stage(x)
                    found.append(x)
                return network.fc(x.mean((2, 3))), [found[i] for i in method.ours]

        named = {
            f"network.{key}": value for key, value in (values | {k: b.clone() for k, b in buffers.items()}).items()
        }
        return torch.func.functional_call(Both(), named, (model.student.normalise(batch["inputs"]),))

    with torch.no_grad():
        theirs = model.teacher.extract(batch["inputs"])
        sources = [theirs[j] for j in method.theirs]
        _, targets = features(dict(parameters))
        mapped = [networks(sources, targets) for networks in method.networks]
    logits, targets = features(dict(parameters))
    inputs = [*(sources if method.direct else []), sources[-1]]
    weights = torch.stack(
        [
            (len(targets) * torch.softmax(layer(x.mean((2, 3))), 1)).T
            for layer, x in zip(method.meta, inputs, strict=True)
        ]
    )
    errors = torch.stack(
        [
            sum(
                torch.stack([(x - y).pow(2).mean((1, 2, 3)) for x, y in zip(each[p], targets, strict=True)])
                / len(mapped)
                for each in mapped
            )
            for p in range(len(inputs))
        ]
    )
    weighted = (weights * errors).mean((1, 2))
    match = weighted[-1] + (weighted[:-1].mean() if method.direct else 0)
    loss = F.cross_entropy(logits, batch["labels"]) + 3.0 * match
    gradients = torch.autograd.grad(loss, [*parameters.values()], create_graph=True)
    (optimizer,) = [each.optimizer for name, each in loop.optimizers.items() if name == "main"]
    stepped = {
        key: p - 0.05 * (g + 0.9 * optimizer.state[p]["momentum_buffer"] + 5e-4 * p)
        for (key, p), g in zip(parameters.items(), gradients, strict=True)
    }
    outer = F.cross_entropy(features(stepped)[0], batch["labels"])
    return gradient(outer), gradient(loss)


@pytest.mark.parametrize(("name", "exact"), [("mas", True), ("m2as", True), ("m2a2s", True), ("m2as", False)])
def test_weights_follow_what_the_update_does_to_the_task(
    name: str, exact: bool, batch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = {**batch, "inputs": batch["inputs"].double()}
    found, through, own = meta_gradients(name, batch, tmp_path, exact, monkeypatch)
    error = (found - through).norm() / through.norm()
    assert error < (1e-6 if exact else 0.1)  # a classifier's loss is in single precision
    # Not the gradient of the loss itself, which only knows which pairs match already.
    assert (own - through).norm() / through.norm() > 0.5


def test_weights_of_pairs_are_logged(batch: Any, tmp_path: Path) -> None:
    loop = make_loop(make_model("m2as", 10), batch, tmp_path)
    logged = loop.step(batch)
    names = [f"weight_{row}_layer{q}" for row in ("layer1", "layer2", "layer3", "adapted") for q in (1, 2, 3)]
    assert [name for name in logged if name.startswith("weight_")] == names
    assert [logged[name].item() for name in names] == [1.0] * 12
    for _ in range(3):
        logged = loop.step(batch)
    values = torch.stack([logged[name] for name in names]).view(4, 3)
    torch.testing.assert_close(values.mean(1), torch.ones(4))
    assert (values - 1).abs().max() > 1e-6
    assert {"loss_task", "loss_match", "loss_align", "unexplained", "accuracy"} < {*logged}


def test_what_is_unexplained_is_one_for_a_constant() -> None:
    torch.manual_seed(0)
    target = torch.randn(64, 8, 4, 4) * torch.rand(8, 1, 1) + 3
    mean = target.mean((0, 2, 3), keepdim=True).expand_as(target)
    unexplained = kt.methods.mas.unexplained
    assert unexplained([[mean]], [target]).item() == pytest.approx(1, abs=1e-4)
    assert unexplained([[target]], [target]).item() == 0
    assert unexplained([[target], [mean]], [target]).item() == pytest.approx(0.5, abs=1e-4)


def test_squeeze_and_excitation_weighs_the_teachers_channels_first() -> None:
    squeezed, plain = (AuxiliaryNetworks(kind, 32, [], [8], False).adapter for kind in ("se", "fc"))
    assert [type(layer).__name__ for layer in squeezed] == ["SqueezeExcitation", "Conv2d"] and len(plain) == 1
    assert (squeezed[0].fc1.in_channels, squeezed[0].fc1.out_channels) == (32, 2)


def test_no_layers_are_one_line() -> None:
    with pytest.raises(
        UserError, match=r"^method.stages=\[\]: expected a list of integer >= 0 of length >= 1 or one of"
    ):
        make_model("m2as", 10, stages=[])


def test_too_short_a_training_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^method.first_epochs=2: the training has 2 in all; expected fewer"):
        fit(make_model("as", 10, first_epochs=2), make_data(), tmp_path, SCHEDULE)


@pytest.mark.parametrize(
    "length", [["schedule.epochs=2"], ["schedule.epochs=null", "schedule.iterations=90", "schedule.interval=45"]]
)
def test_too_short_a_training_is_told_before_its_teacher_trains(length: list[str]) -> None:
    with pytest.raises(UserError, match=r"^method.first_epochs=2: the training has 2 in all; expected fewer"):
        composed("method=mas", "method.first_epochs=2", "teacher=resnet56", "student=resnet20", *length)


def test_missing_source_images_are_told(tmp_path: Path) -> None:
    data = make_data()
    del data.further["source"]
    with pytest.raises(UserError, match="^method=m2a2s: needs unlabelled source images; name them by dataset@method"):
        fit(make_model("m2a2s", 10), data, tmp_path, SCHEDULE)


def indices(loader: Any) -> list[int]:
    return sorted(torch.cat([batch["indices"] for batch in loader.plain().epoch(0)]).tolist())


def test_a_share_of_the_source_images_is_the_same_for_every_seed() -> None:
    first, second = (unlabelled(DATASET, 0.25, ".", batch_size=8, seed=seed) for seed in (0, 1))
    assert indices(first) == indices(second) != list(range(16)) and len(indices(first)) == 16
    orders = [next(each.epoch(0))["indices"].tolist() for each in (first, second)]
    assert orders[0] != orders[1]
    with pytest.raises(UserError, match=r"method.source_share=0.01: takes \d of \d+ images; expected a share of two"):
        unlabelled(DATASET, 0.01, ".", batch_size=8, seed=0)
    some = indices(unlabelled({**DATASET, "subset": 20}, 1.0, ".", batch_size=8, seed=0))
    assert len(some) == 20


def test_any_folder_of_images_will_do(tmp_path: Path) -> None:
    settings = {**DATASET, "name": "unlabelled", "folder": "pictures"}
    with pytest.raises(UserError, match="^method.source.folder=pictures: there are no images in "):
        unlabelled(settings, 1.0, tmp_path, batch_size=2, seed=0)
    for name in ("a.png", "deep/er/b.jpg", "notes.txt"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("txt"):
            path.write_text("none")
        else:
            Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(path)
    loader = unlabelled(settings, 1.0, tmp_path, batch_size=2, seed=0)
    assert next(loader.epoch(0))["inputs"].shape == (2, 3, 32, 32)
    with pytest.raises(UserError, match="^dataset.name=unlabelled: has no test images"):
        build_data(settings, tmp_path, batch_size=2, seed=0)
    with pytest.raises(UserError, match="^method.source.folder=null: expected the folder"):
        unlabelled({**settings, "folder": None}, 1.0, tmp_path, batch_size=2, seed=0)


SMALL = ("method=m2a2s", "teacher=resnet56", "dataset=scenes_small", "dataset@teacher.dataset=scenes")


def test_source_images_are_part_of_what_a_cell_is() -> None:
    plain = settle(composed(*SMALL))
    assert plain["method"]["source"] == composed("dataset=scenes")["dataset"]  # the teacher's
    assert settle(plain) == plain
    cells = {
        identity(composed(*SMALL, *more))
        for more in (
            [],
            ["method.source_share=0.02"],
            ["dataset@method.source=scenes_small"],
            ["dataset@method.source=imagefolder", "method.source.folder=pets"],
            ["dataset@method.source=imagefolder", "method.source.folder=cars"],
        )
    }
    assert len(cells) == 5
    named, resident = (
        composed(*SMALL, "dataset@method.source=scenes", *more) for more in ([], ["method.source.resident=true"])
    )
    assert identity(named) == identity(plain) == identity(resident)


def test_the_state_of_the_source_images_is_the_cells_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "REUSED", -1)  # look anew every time
    folder = tmp_path / "data" / "pictures"
    folder.mkdir(parents=True)
    source = ("dataset@method.source=unlabelled", "method.source.folder=pictures")
    config = settle(composed(*SMALL, *source, f"data_root={tmp_path / 'data'}", f"output_root={tmp_path / 'out'}"))
    assert combined(identify(config).states) is None  # no image yet
    (folder / "a.png").write_bytes(b"one")
    first = combined(identify(config).states)
    (folder / "a.png").write_bytes(b"other")
    assert None is not first != combined(identify(config).states)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["dataset@method.source=scenes_small", "method.source.validation=0.1"],
            "method.source.validation=0.1: expected 0",
        ),
        (["method.source_share=2"], "method.source_share=2: expected a number > 0 and <= 1"),
        (["dataset@method.source=scenes_seg"], "method.source.task=segmentation: expected classification"),
        (["dataset@method.source=scenes", "method.source.name=scnes"], "method.source.name=scnes: .*mean 'scenes'"),
        (["dataset@method.source=unlabelled", "method.source.folder=../a"], "method.source.folder=../a: expected a fo"),
        (["teacher.checkpoint=t.pth", "teacher.dataset=null"], "method.source=null: expected the dataset of the unlab"),
        (["method=mas", "dataset@method.source=scenes"], "method.source: unknown key for method mas"),
    ],
)
def test_mistakes_about_source_images_are_one_line(more: list[str], words: str) -> None:
    given = {line.partition("=")[0] for line in more}
    with pytest.raises(UserError, match=f"^{words}"):
        settle(composed(*(line for line in SMALL if line.partition("=")[0] not in given), *more))


@pytest.mark.parametrize("name", NAMES)
def test_detectors_are_refused_in_one_line(name: str) -> None:
    pytest.importorskip("mmdet")
    from kt.mm import KnowledgeTransfer
    from kt.models.dense import dense_config

    model = dense_config("retinanet_resnet18", 3, 0.25, (64, 64), IMAGENET)
    with pytest.raises(
        UserError, match=f"^method={name}: teaches classifiers only; for detectors and segmentors choose "
    ):
        KnowledgeTransfer(model, {"type": name})
