"""mmcv's operators without a compiler, against what the compiled ones gave and against finite differences.

`python tests/test_operators.py` writes `operators.json` anew, where mmcv's own operators are installed.
"""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

REASON = "mmcv is not installed (bash install.sh full)"
pytest.importorskip("mmcv", reason=REASON)

RECORD = Path(__file__).with_name("operators.json")
ROOT = Path(__file__).resolve().parent.parent
MAPS, POOLED = (2, 3, 7, 9), (3, 4)
ROIS = {
    "boxes": [[0, 1.5, 2.25, 20.0, 17.5], [1, 0.0, 0.0, 35.5, 27.0], [1, 12.0, 8.0, 12.5, 8.25]],
    # Beside the map, across its edge, without extent, and as large as four maps.
    "outside": [[0, -40, -30, -20, -10], [0, 30, 20, 80, 90], [1, 20, 20, 20, 20], [1, -36, -28, 72, 56]],
    "none": [],
}
CASES = list(itertools.product(ROIS, (True, False), (0, 2)))


def numbers(*shape: int, prime: int = 7919) -> Tensor:
    """Numbers in (-1, 1) that look drawn and are the same everywhere: no generator, no transcendental function."""
    index = torch.arange(int(np.prod(shape)), dtype=torch.int64)
    return (((index * prime) % 2003).float() / 1001.5 - 1).reshape(shape)


def boxes(count: int) -> tuple[Tensor, Tensor]:
    """Boxes that overlap in crowds, and their scores."""
    corners = 40 + 12 * numbers(count, 2, prime=1299709)
    sizes = 12 + 10 * numbers(count, 2, prime=104729)
    return torch.cat((corners, corners + sizes), 1), numbers(count, prime=15485863)


def align(
    ext: ModuleType, rois: Tensor, aligned: bool, ratio: int, maps: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """What an operator module pools from maps, and the gradient for them."""
    size = {"aligned_height": POOLED[0], "aligned_width": POOLED[1], "spatial_scale": 0.25}
    size |= {"sampling_ratio": ratio, "pool_mode": 1, "aligned": aligned}
    output, back = maps.new_zeros(len(rois), maps.shape[1], *POOLED), maps.new_zeros(maps.shape)
    empty = maps.new_zeros(0)
    ext.roi_align_forward(maps, rois, output, empty, empty, **size)
    ext.roi_align_backward(grad.contiguous(), rois, empty, empty, back, **size)
    return output, back


def results(ext: ModuleType) -> dict[str, Tensor]:
    """All that is recorded, by name."""
    found = {}
    for kind, aligned, ratio in CASES:
        rois = torch.tensor(ROIS[kind], dtype=torch.float32).reshape(-1, 5)
        grad = numbers(len(rois), MAPS[1], *POOLED, prime=611953)
        output, back = align(ext, rois, aligned, ratio, numbers(*MAPS), grad)
        found |= {f"roi_align {kind} {aligned} {ratio}": output, f"backward {kind} {aligned} {ratio}": back}
    for count, threshold, offset in itertools.product((0, 1, 60), (0.3, 0.5, 0.7), (0, 1)):
        kept = ext.nms(*boxes(count), iou_threshold=threshold, offset=offset)
        found[f"nms {count} {threshold} {offset}"] = kept
    # Equal scores, as an undertrained detector gives: which of two boxes is the better one is a matter of sorting.
    corners, scores = boxes(900)
    for levels in (1, 4, 300):
        ties = (scores * levels).round() / levels
        found[f"nms with {levels} scores"] = ext.nms(corners, ties, iou_threshold=0.7, offset=0)
    return found


@pytest.fixture(scope="module")
def ext() -> ModuleType:
    """kt's operators, whatever mmcv is installed."""
    import kt.operators

    return kt.operators


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def test_the_bits_of_the_compiled_operators(ext: ModuleType, record: dict[str, Any]) -> None:
    found = results(ext)
    assert list(found) == list(record["results"])
    for name, tensor in found.items():
        kept = record["results"][name]
        array = np.frombuffer(base64.b64decode(kept["bytes"]), kept["dtype"]).reshape(kept["shape"])
        assert (str(tensor.numpy().dtype), list(tensor.shape)) == (kept["dtype"], kept["shape"]), name
        assert tensor.numpy().tobytes() == array.tobytes(), name
    # A record of nothing would agree with anything.
    assert found["roi_align boxes True 0"].abs().min() > 0 and 5 < len(found["nms 60 0.5 0"]) < 50
    assert found["nms 60 0.5 0"].tolist() != found["nms 60 0.5 1"].tolist()


@pytest.mark.parametrize(("kind", "aligned", "ratio"), CASES)
def test_channels_last_is_read_as_what_it_is(ext: ModuleType, kind: str, aligned: bool, ratio: int) -> None:
    """The compiled operators read such memory in the wrong order."""
    rois = torch.tensor(ROIS[kind], dtype=torch.float32).reshape(-1, 5)
    grad = numbers(len(rois), MAPS[1], *POOLED)
    plain = align(ext, rois, aligned, ratio, numbers(*MAPS), grad)
    maps = numbers(*MAPS).to(memory_format=torch.channels_last)
    assert not maps.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(align(ext, rois, aligned, ratio, maps, grad), plain, strict=True))
    # Gradients may arrive, and be wanted, in that order as well.
    back = torch.zeros(MAPS).to(memory_format=torch.channels_last)
    empty = maps.new_zeros(0)
    size = {"aligned_height": POOLED[0], "aligned_width": POOLED[1], "spatial_scale": 0.25, "sampling_ratio": ratio}
    last = grad.to(memory_format=torch.channels_last) if len(rois) else grad
    ext.roi_align_backward(last, rois, empty, empty, back, **size, pool_mode=1, aligned=aligned)
    assert torch.equal(back, plain[1])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_the_gradient_of_roi_align(ext: ModuleType, aligned: bool, ratio: int) -> None:
    rois = torch.tensor(ROIS["boxes"] + ROIS["outside"], dtype=torch.float64)
    maps, grad = numbers(*MAPS).double(), numbers(len(rois), MAPS[1], *POOLED).double()
    _, back = align(ext, rois, aligned, ratio, maps, grad)

    def total(x: Tensor) -> float:
        return float((align(ext, rois, aligned, ratio, x, grad)[0] * grad).sum())

    torch.testing.assert_close(back, differences(total, maps), rtol=1e-8, atol=1e-8)


def differences(function: Any, x: Tensor, step: float = 1e-6) -> Tensor:
    """The gradient of a scalar function by central differences, in float64."""
    found = torch.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.clone(), x.clone()
        up[index] += step
        down[index] -= step
        found[index] = (function(up) - function(down)) / (2 * step)
    return found


def reference_nms(corners: np.ndarray, scores: np.ndarray, threshold: float, offset: int) -> list[int]:
    """Greedy suppression, pair by pair."""
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        x1, y1, x2, y2 = corners[index]
        overlapped = False
        for other in kept:
            a1, b1, a2, b2 = corners[other]
            width = max(0.0, min(x2, a2) - max(x1, a1) + offset)
            height = max(0.0, min(y2, b2) - max(y1, b1) + offset)
            area = (x2 - x1 + offset) * (y2 - y1 + offset) + (a2 - a1 + offset) * (b2 - b1 + offset)
            overlapped |= width * height / (area - width * height) > threshold
        if not overlapped:
            kept.append(int(index))
    return kept


@pytest.mark.parametrize("offset", [0, 1])
def test_suppression_against_pairs(ext: ModuleType, offset: int) -> None:
    corners, scores = boxes(80)
    for threshold in (0.2, 0.45, 0.8):
        found = ext.nms(corners, scores, iou_threshold=threshold, offset=offset).tolist()
        assert found == reference_nms(corners.double().numpy(), scores.numpy(), threshold, offset)


def test_half_precision_computes_in_single(ext: ModuleType) -> None:
    rois = torch.tensor(ROIS["boxes"], dtype=torch.float32)
    maps, grad = numbers(*MAPS).bfloat16(), numbers(len(rois), MAPS[1], *POOLED).bfloat16()
    found = align(ext, rois.bfloat16(), True, 2, maps, grad)
    wanted = align(ext, rois.bfloat16().float(), True, 2, maps.float(), grad.float())
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(found, wanted, strict=True))


# -------------------------------------------------------------------------------------------------------- focal losses


def focal_of(p: np.ndarray, gamma: float, alpha: float) -> np.ndarray:
    """Lin et al. 2017, equation 5, of the probability of what is true."""
    return -alpha * (1 - p) ** gamma * np.log(p)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.0, 0.5), (1.5, 0.9)])
def test_sigmoid_focal_loss(ext: ModuleType, gamma: float, alpha: float, weighted: bool) -> None:
    logits = 3 * numbers(6, 4).double()
    target = torch.tensor([0, 1, 2, 3, 4, 4])  # 4 is background
    weight = torch.tensor([0.5, 2.0, 1.5, 3.0], dtype=torch.float64) if weighted else torch.empty(0)
    if weighted:
        target = target.clamp(max=3)  # compiled operators read past the weights for background

    def loss(x: Tensor) -> Tensor:
        output = torch.zeros_like(x)
        ext.sigmoid_focal_loss_forward(x, target, weight, output, gamma=gamma, alpha=alpha)
        return output

    p = 1 / (1 + np.exp(-logits.numpy()))
    truth = target.numpy()[:, None] == np.arange(4)
    wanted = np.where(truth, focal_of(p, gamma, alpha), focal_of(1 - p, gamma, 1 - alpha))
    wanted = wanted * weight.numpy()[target][:, None] if weighted else wanted
    np.testing.assert_allclose(loss(logits).numpy(), wanted, rtol=1e-12)
    back = torch.zeros_like(logits)
    ext.sigmoid_focal_loss_backward(logits, target, weight, back, gamma=gamma, alpha=alpha)
    torch.testing.assert_close(back, differences(lambda x: float(loss(x).sum()), logits), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.0, 0.5), (0.5, 1.0)])
def test_softmax_focal_loss(ext: ModuleType, gamma: float, alpha: float, weighted: bool) -> None:
    logits = 3 * numbers(5, 4).double()
    target = torch.tensor([0, 3, 2, 1, -1])  # below 0 is ignored
    weight = torch.tensor([0.5, 2.0, 1.5, 3.0], dtype=torch.float64) if weighted else torch.empty(0)

    def loss(x: Tensor) -> Tensor:
        output = x.new_zeros(len(x))
        ext.softmax_focal_loss_forward(x.softmax(1), target, weight, output, gamma=gamma, alpha=alpha)
        return output

    e = np.exp(logits.numpy())
    p = (e / e.sum(1, keepdims=True))[np.arange(5), target.numpy()]
    wanted = focal_of(p, gamma, alpha) * (weight.numpy()[target] if weighted else 1.0) * (target.numpy() >= 0)
    np.testing.assert_allclose(loss(logits).numpy(), wanted, rtol=1e-12)
    back, buff = torch.zeros_like(logits), logits.new_zeros(5)
    ext.softmax_focal_loss_backward(logits.softmax(1), target, weight, buff, back, gamma=gamma, alpha=alpha)
    torch.testing.assert_close(back, differences(lambda x: float(loss(x).sum()), logits), rtol=1e-6, atol=1e-8)


def test_background_has_weight_one(ext: ModuleType) -> None:
    """Compiled operators read past the weights there."""
    logits, weight = numbers(2, 3), torch.tensor([5.0, 7.0, 9.0])
    outputs = []
    for given in (weight, torch.empty(0)):
        output, back = torch.zeros(2, 3), torch.zeros(2, 3)
        ext.sigmoid_focal_loss_forward(logits, torch.tensor([3, 3]), given, output, gamma=2.0, alpha=0.25)
        ext.sigmoid_focal_loss_backward(logits, torch.tensor([3, 3]), given, back, gamma=2.0, alpha=0.25)
        outputs += [output, back]
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3]) and outputs[0].all()


def test_rare_events_keep_their_loss(ext: ModuleType) -> None:
    """The logarithm is cut where single precision ends, not before."""
    output, none = torch.zeros(1, 1), torch.empty(0)
    ext.sigmoid_focal_loss_forward(torch.tensor([[-40.0]]), torch.tensor([0]), none, output, gamma=2.0, alpha=0.25)
    assert float(output) == pytest.approx(0.25 * 40.0, rel=1e-5)
    certain, buff, back = torch.tensor([[1.0, 0.0]]), torch.zeros(1), torch.zeros(1, 2)
    ext.softmax_focal_loss_backward(certain, torch.tensor([0]), none, buff, back, gamma=0.5, alpha=1.0)
    assert back.isfinite().all()


def test_the_buffer_is_left_as_mmcv_leaves_it(ext: ModuleType) -> None:
    softmax, buff, back = torch.tensor([[0.25, 0.75]]), torch.zeros(1), torch.zeros(1, 2)
    ext.softmax_focal_loss_backward(softmax, torch.tensor([1]), torch.empty(0), buff, back, gamma=2.0, alpha=1.0)
    wanted = 2 * 0.25 * 0.75 * np.log(0.75) - 0.25**2
    assert float(buff) == pytest.approx(wanted, rel=1e-5)
    assert back[0].tolist() == pytest.approx([-0.25 * wanted, 0.25 * wanted], rel=1e-5)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_everywhere(ext: ModuleType, kind: torch.dtype) -> None:
    corners, scores = boxes(60)
    found = ext.nms(corners.to(kind), scores.to(kind), iou_threshold=0.5, offset=0)
    assert torch.equal(found, ext.nms(corners.to(kind).float(), scores.to(kind).float(), iou_threshold=0.5, offset=0))
    logits, target, none = numbers(4, 3).to(kind), torch.tensor([0, 1, 2, 3]), torch.empty(0)
    half, single = torch.zeros(4, 3, dtype=kind), torch.zeros(4, 3)
    ext.sigmoid_focal_loss_forward(logits, target, none, half, gamma=2.0, alpha=0.25)
    ext.sigmoid_focal_loss_forward(logits.float(), target, none, single, gamma=2.0, alpha=0.25)
    assert torch.equal(half, single.to(kind))
    rois, maps = torch.tensor(ROIS["boxes"], dtype=torch.float32), numbers(*MAPS).to(kind)
    grad = numbers(len(rois), MAPS[1], *POOLED).to(kind)
    pooled = align(ext, rois, True, 2, maps, grad)
    wanted = align(ext, rois, True, 2, maps.float(), grad.float())
    assert all(torch.equal(a, b.to(kind)) for a, b in zip(pooled, wanted, strict=True))


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_focal_losses_stay_finite(ext: ModuleType, logit: float) -> None:
    logits, target, none = torch.full((2, 1), logit), torch.tensor([0, 1]), torch.empty(0)
    output, back = torch.zeros(2, 1), torch.zeros(2, 1)
    ext.sigmoid_focal_loss_forward(logits, target, none, output, gamma=2.0, alpha=0.25)
    ext.sigmoid_focal_loss_backward(logits, target, none, back, gamma=2.0, alpha=0.25)
    assert output.isfinite().all() and back.isfinite().all()


def test_mmcvs_own_layers_use_them(ext: ModuleType) -> None:
    """The sums and factors that mmcv puts around the operators give what the focal loss of mmdet gives in Python."""
    if not uses_kt():
        pytest.skip("mmcv's own operators are installed")
    from mmcv.ops import sigmoid_focal_loss
    from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss

    logits = (3 * numbers(6, 4)).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4, 4])
    loss = sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "mean") / logits.shape[1]
    loss.backward()
    own, logits.grad = logits.grad.clone(), None
    other = py_sigmoid_focal_loss(logits, torch.nn.functional.one_hot(target, 5)[:, :4])
    other.backward()
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(own, logits.grad)


# ------------------------------------------------------------------------------------------------------ being found


def uses_kt() -> bool:
    """Whether `mmcv._ext` is kt's here."""
    spec = importlib.util.find_spec("mmcv._ext")
    return spec is not None and str(spec.origin).endswith("operators.py")


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("first", ["import mmdet.models", "import mmseg.models", "import kt.mm", "import kt, mmcv.ops"])
def test_found_whatever_is_imported_first(first: str) -> None:
    pytest.importorskip("mmdet", reason=REASON)
    code = (
        f"{first}; import mmcv._ext as e; print(e.__spec__.name, e.__spec__.origin); import mmdet.models, mmseg.models"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mmcv._ext ")


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_found_in_worker_processes(method: str) -> None:
    code = (
        "import multiprocessing as m\nfrom mmcv.transforms import Resize\n"
        "if __name__ == '__main__':\n"
        f"    with m.get_context({method!r}).Pool(1) as pool:\n"
        "        print(pool.apply(exec, ('import mmcv.ops',)) or 'found')\n"
    )
    done = python(code)
    assert done.stdout.strip() == "found", done.stderr


def test_any_other_operator_says_how_to_compile(ext: ModuleType) -> None:
    with pytest.raises(NotImplementedError) as caught:
        ext.deform_conv_forward(1, 2, three=3)
    assert str(caught.value).endswith("bash install.sh full compiled") and "deform_conv_forward" in str(caught.value)
    with pytest.raises(NotImplementedError, match="install.sh full compiled"):
        ext.roi_align_backward(*[torch.zeros(1, 1, 2, 2)] * 5, 1, 1, 1.0, 0, pool_mode=0, aligned=True)
    with pytest.raises(NotImplementedError, match="install.sh full compiled"):
        ext.roi_align_forward(*[torch.zeros(1, 1, 2, 2)] * 5, 1, 1, 1.0, 0, pool_mode=0, aligned=True)
    assert not hasattr(ext, "__path__")


def test_compiled_operators_win(tmp_path: Path) -> None:
    """A module that lies where mmcv's compiled one would is imported, not kt's."""
    folder = tmp_path / "mmcv"
    folder.mkdir()
    (folder / "_ext.py").write_text("compiled = True\n")
    done = python(
        f"import mmcv; mmcv.__path__.insert(0, {str(folder)!r}); import kt, mmcv._ext as e; print(e.compiled)"
    )
    assert done.stdout.strip() == "True", done.stderr


def test_mmcv_tells_what_it_runs_on() -> None:
    if not uses_kt():
        pytest.skip("mmcv's own operators are installed")
    from mmcv.utils import collect_env

    assert collect_env()["MMCV Compiler"] == "not compiled (operators of kt)"


def test_importing_kt_costs_nothing() -> None:
    done = python("import sys, kt; print(sorted({'torch', 'numpy', 'mmcv', 'mmengine'} & set(sys.modules)))", "-S")
    assert done.stdout.strip() == "[]", done.stderr


def main() -> None:
    """Records the compiled operators' results."""
    import mmcv._ext as compiled

    if not str(compiled.__file__).endswith(".so"):
        raise SystemExit("expected mmcv's own operators: bash install.sh full compiled")
    kept = {}
    for name, tensor in results(compiled).items():
        array = tensor.numpy()
        kept[name] = {"dtype": str(array.dtype), "shape": list(array.shape)}
        kept[name]["bytes"] = base64.b64encode(array.tobytes()).decode()
    versions = {"mmcv": importlib.metadata.version("onedl-mmcv"), "torch": torch.__version__}
    RECORD.write_text(json.dumps({"versions": versions, "results": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
