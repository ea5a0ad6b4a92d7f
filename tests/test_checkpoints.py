"""Weights as others have saved them."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import sys
import types
import uuid
import zipfile
import zlib
from collections import defaultdict, deque
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from mmengine.model import BaseModel
from mmengine.runner import Runner
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from checks import bits
from kt.errors import UserError
from kt.models import build_network
from kt.models.checkpoints import PREFIXES, load_weights, read_state

KEY = "teacher.checkpoint"


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def loaded(network: nn.Module, path: Path) -> dict[str, Any]:
    load_weights(network, path, KEY)
    return bits(network.state_dict())


class Trained(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.network = small()

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> dict[str, torch.Tensor]:
        return {"loss": self.network(torch.stack(inputs)).sum()}


def test_a_file_of_mmengines_runner_gives_its_averaged_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner = Runner(
        Trained(),
        str(tmp_path),
        train_dataloader={
            "dataset": [{"inputs": torch.rand(3, 4, 4)}] * 2,
            "batch_size": 2,
            "sampler": {"type": "DefaultSampler"},
            "collate_fn": {"type": "pseudo_collate"},
        },
        train_cfg={"by_epoch": True, "max_epochs": 2},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        custom_hooks=[{"type": "EMAHook", "momentum": 0.5}],
        default_scope="mmengine",
        experiment_name=tmp_path.name,
    )
    runner.train()
    path = tmp_path / "epoch_2.pth"
    assert {"message_hub", "ema_state_dict"} <= torch.load(path, weights_only=False).keys()
    averaged = next(hook.ema_model for hook in runner.hooks if hasattr(hook, "ema_model"))
    with caplog.at_level(logging.WARNING, "kt"):
        found = loaded(small(1), path)
    assert found == bits(averaged.module.network.state_dict()) != bits(runner.model.network.state_dict())
    assert caplog.messages == [f"{path}: the averaged weights (EMA) are taken, `state_dict`"]


def test_files_of_timm(tmp_path: Path) -> None:
    def made() -> nn.Module:
        return timm.create_model("test_resnet", num_classes=5)

    model, average = made(), ModelEmaV3(made())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    arguments = argparse.Namespace(model="test_resnet", output=tmp_path)
    saver = CheckpointSaver(model, optimizer, arguments, average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=np.float64(0.5))
    assert loaded(made(), tmp_path / "last.pth.tar") == bits(average.module.state_dict()) != bits(model.state_dict())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert loaded(made(), tmp_path / "model.safetensors") == bits(model.state_dict())


def test_files_of_torchvision(tmp_path: Path) -> None:
    model = torchvision.models.resnet18(num_classes=5)
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    assert loaded(build_network("resnet18", 5), tmp_path / "resnet18.pth") == bits(model.state_dict())


@pytest.mark.parametrize(
    "content,named",
    [
        ({"state_dict": 0, "state_dict_ema": 1}, "state_dict_ema"),  # timm
        ({"model": 0, "model_ema": 1}, "model_ema"),  # torchvision's reference script, DETR
        ({"state_dict": 0, "ema_state_dict": 1}, "ema_state_dict"),
        ({"state_dict": 1, "ema_state_dict": 0, "meta": {"mmengine_version": "0.10"}}, "state_dict"),
        ({"state_dict": 1, "state_dict_ema": None}, None),
        ({"state_dict": 1, "state_dict_ema": {}}, None),
        ({"model": 1}, None),
    ],
)
def test_averaged_weights_come_first(
    content: dict[str, Any], named: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    networks = small(0), AveragedModel(small(1)) if named == "model_ema" else small(1)
    filled = {key: networks[part].state_dict() if isinstance(part, int) else part for key, part in content.items()}
    torch.save({**filled, "args": argparse.Namespace(lr=0.1), "epoch": 3}, tmp_path / "file.pth")
    assert loaded(small(2), tmp_path / "file.pth") == bits(small(1).state_dict())
    assert [message.partition("taken, ")[2] for message in caplog.messages] == ([f"`{named}`"] if named else [])


@pytest.mark.parametrize("prefix", [*PREFIXES, "module.student.network.", "model.module.architecture."])
def test_prefixes_and_missing_counters(prefix: str, tmp_path: Path) -> None:
    source = small()
    state = {prefix + name: value for name, value in source.state_dict().items() if "num_batches" not in name}
    torch.save({"state_dict": {**state, "method.adapter.weight": torch.ones(1)}}, tmp_path / "file.pth")
    assert loaded(small(1), tmp_path / "file.pth") == bits(source.state_dict())


def test_harmless_objects_beside_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = type("PosixPath", (), {"__module__": "pathlib._local", "__reduce__": lambda path: (type(path), ())})
    monkeypatch.setitem(sys.modules, "pathlib._local", types.SimpleNamespace(PosixPath=newer))  # Python 3.13's
    beside = {
        "best": np.float32(0.5),
        "when": np.arange(3),
        "flag": np.bool_(True),
        "losses": defaultdict(list, {"ce": [1.0]}),
        "last": deque([1.0, 2.0], maxlen=2),
        "where": tmp_path,
        "args": argparse.Namespace(lr=np.float64(0.1)),
        "torch": torch.__version__,
        "begun": datetime.now(timezone.utc),
        "took": timedelta(1),
        "id": uuid.uuid4(),
        "frozen": frozenset({"stem"}),
        "epochs": range(3),
        "more": types.SimpleNamespace(a=1),
        "there": newer(),
    }
    torch.save({"state_dict": small().state_dict(), **beside}, tmp_path / "file.pth")
    assert loaded(small(1), tmp_path / "file.pth") == bits(small().state_dict())


class Evil:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        """What pickle demands of a function."""


@pytest.fixture
def allowed() -> Iterator[None]:
    """Something that other code of this process lets torch run."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([os.mkdir])
    yield
    assert os.mkdir in torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_in_a_file_is_run(zipped: bool, tmp_path: Path, allowed: None) -> None:
    calls = [
        ("holds posix.mkdir, code .* meant to do harm", Evil(os.mkdir, str(tmp_path / "made"))),
        ("holds exec, code .* meant to do harm", Evil(exec, f"import os; os.mkdir({str(tmp_path / 'made')!r})")),
        ("", Evil(Evil(getattr, type(tmp_path), "mkdir"), tmp_path / "made")),
    ]
    for name, call in calls:
        path = tmp_path / "file.pth"
        torch.save({"state_dict": {}, "call": call}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=f"{KEY}=.*{name}") as caught:
            read_state(path, KEY)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "made").exists()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 45\n"


@pytest.mark.parametrize(
    "content,what",
    [
        (b"", "this is an empty file"),
        (LFS, "this is a Git LFS pointer; .*git lfs pull"),
        (b"\n<!DOCTYPE html><html><title>404</title></html>", "this is a web page"),
        (zipfile, "this is a zip archive"),
        (b"PK\x03\x04 the rest is missing", "this is a zip archive"),
        (zlib, "this is a zip archive that torch.save has not written, or a damaged one"),
        (b'{"metadata": {}, "weight_map": {}}', "this is a JSON file; .*index"),
        (torch.jit, "this is a TorchScript archive; save the state_dict"),
        (pickle, "expected a file of torch.save or safetensors$"),  # and not torch's advice to run its code
        (b"weights", "expected a file of torch.save or safetensors"),
        (b'\x20\x00\x00\x00\x00\x00\x00\x00{"weight":', "expected a file of torch.save or safetensors"),
        (None, "Is a directory"),
        ([1, 2], "expected a state dict, the file holds something else"),
        ({"state_dict": {1: torch.zeros(1)}}, "expected a state dict, the file holds something else"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(content: Any, what: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    if content is None:
        path.mkdir()
    elif content is zipfile:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "weights are elsewhere")
    elif content is zlib:  # names that are no UTF-8, though they say so
        torch.save(small().state_dict(), path)
        archived = path.read_bytes().replace(b"data.pkl", b"\xf4ata.pkl")
        path.write_bytes(archived)
    elif content is torch.jit:
        torch.jit.save(torch.jit.trace(small().eval(), torch.zeros(1, 3, 4, 4)), str(path))
    elif content is pickle:
        path.write_bytes(pickle.dumps({"model": {"weight": np.zeros(3)}}))
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=f"^{KEY}='.*': .*{what}") as caught:
        read_state(path, KEY)
    assert "\n" not in str(caught.value)


def test_a_head_for_other_classes_is_refused_by_name_and_shape(tmp_path: Path) -> None:
    torch.save(
        {"module." + name: value for name, value in build_network("resnet8", 5).state_dict().items()}, tmp_path / "x"
    )
    with pytest.raises(UserError, match=r"2 of another shape; fc.bias is \(5,\) in the file and \(7,\) in the network"):
        load_weights(build_network("resnet8", 7), tmp_path / "x", KEY)
