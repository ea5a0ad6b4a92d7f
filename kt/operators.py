"""mmcv's operators without a compiler: what mmdet and mmseg call of `mmcv._ext`, from torchvision and torch.

Importing `mmcv._ext` runs this file where mmcv was installed without its own operators (see `kt/__init__.py`). Every
function has mmcv's name and arguments, results included: tensors to be filled. `roi_align` and `nms` give the bits that
mmcv's own give on a CPU, and unlike those read tensors in channels_last as what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms as torchvision_nms

AVERAGE = 1  # mmcv's number of the pooling mode; 0 is the maximum
COMPILE = "install mmcv's own operators with: bash install.sh full compiled"


def __getattr__(name: str) -> Callable[..., Any]:
    """Any other operator of mmcv: it can be imported, as mmcv does with all of them, and not be called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"mmcv's operator {name} has to be compiled; {COMPILE}")

    return absent


def get_compiler_version() -> str:
    """What mmcv shows of itself among the versions at the start of a training."""
    return "not compiled (operators of kt)"


def get_compiling_cuda_version() -> str:
    """See `get_compiler_version`."""
    return "not compiled (operators of kt)"


def _exact(x: Tensor) -> Tensor:
    """In the precision to compute in: half precision is for storing."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _check_pooling(pool_mode: int) -> None:
    if pool_mode != AVERAGE:
        raise NotImplementedError(f"mmcv's operator roi_align with pool_mode='max' has to be compiled; {COMPILE}")


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoI align (He et al. 2017) of maps (n, c, h, w) and boxes (k, 5: image, x1, y1, x2, y2) into `output`.

    Raises:
        NotImplementedError: Pooling by maximum is asked for.
    """
    _check_pooling(pool_mode)
    maps = _exact(input)
    size = (spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned)
    output.copy_(torch.ops.torchvision.roi_align(maps, rois.to(maps.dtype), *size))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """The gradient of `roi_align_forward` with respect to the maps, into `grad_input` (n, c, h, w)."""
    _check_pooling(pool_mode)
    grad = _exact(grad_output)
    size = (spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned)
    grad_input.copy_(torch.ops.torchvision._roi_align_backward(grad, rois.to(grad.dtype), *size))


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes (n, 4) that non-maximum suppression keeps, best score first.

    Args:
        boxes: x1, y1, x2, y2.
        scores: (n,).
        iou_threshold: Boxes that overlap a better one by more are dropped.
        offset: 1 where a box from 0 to 9 is 10 wide, else 0.
    """
    boxes = _exact(boxes)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    # Of boxes with equal scores mmcv takes this sort's first one, torchvision the first one that it is given.
    scores, order = _exact(scores).sort(0, descending=True)
    return order[torchvision_nms(boxes[order], scores, iou_threshold)]


def _log(p: Tensor) -> Tensor:
    """A logarithm that is finite at 0."""
    return p.clamp_min(torch.finfo(torch.float32).tiny).log()


def _sigmoid_terms(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (n, c), and the weights of their positive and negative terms; targets beyond c are background."""
    p = _exact(input).sigmoid()
    positive = (target[:, None] == torch.arange(p.shape[1], device=p.device)).to(p.dtype)
    weights = alpha * positive, (1 - alpha) * (1 - positive)
    if weight.numel():
        # Background has no weight of its own: mmcv reads one past the end there, kt takes 1.
        padded = torch.cat((_exact(weight), p.new_ones(1)))[target.clamp(max=weight.numel())][:, None]
        weights = weights[0] * padded, weights[1] * padded
    return p, *weights


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """The focal loss (Lin et al. 2017) of logits (n, c) and classes (n,), one value for each logit, into `output`.

    Args:
        input: Logits.
        target: Classes; c is background, of which every logit is a negative.
        weight: (c,) by class, or empty.
        output: (n, c).
        gamma, alpha: As in the paper, alpha being the weight of positives.
    """
    p, positive, negative = _sigmoid_terms(input, target, weight, alpha)
    loss = positive * (1 - p) ** gamma * _log(p) + negative * p**gamma * _log(1 - p)
    output.copy_(-loss)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """The derivative of each value of `sigmoid_focal_loss_forward` by its logit, into `grad_input` (n, c)."""
    p, positive, negative = _sigmoid_terms(input, target, weight, alpha)
    above = (1 - p) ** gamma * (1 - p - gamma * p * _log(p))
    below = p**gamma * (gamma * (1 - p) * _log(1 - p) - p)
    grad_input.copy_(-(positive * above + negative * below))


def _picked(softmax: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The probability of each target (n,) and its factor; targets below 0 are ignored."""
    softmax = _exact(softmax)
    known = target.clamp(min=0)
    factor = alpha * (target >= 0).to(softmax.dtype)
    if weight.numel():
        factor = factor * _exact(weight)[known]
    return softmax.gather(1, known[:, None])[:, 0], factor


def softmax_focal_loss_forward(
    softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """The focal loss of probabilities (n, c) that sum to 1 and classes (n,), into `output` (n,)."""
    p, factor = _picked(softmax, target, weight, alpha)
    output.copy_(-factor * (1 - p) ** gamma * _log(p))


def softmax_focal_loss_backward(
    softmax: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """The derivative of `softmax_focal_loss_forward` by the logits behind the softmax, into `grad_input` (n, c).

    Args:
        buff: (n,) is left as mmcv leaves it: the derivative by the logarithm of the target's probability.
    """
    p, factor = _picked(softmax, target, weight, alpha)
    # At gamma below 1 the power would be infinite where nothing is left to lose.
    rest = (1 - p).clamp_min(torch.finfo(torch.float32).tiny)
    buff.copy_(factor * (gamma * rest ** (gamma - 1) * p * _log(p) - rest**gamma))
    chosen = torch.zeros_like(grad_input).scatter_(1, target.clamp(min=0)[:, None], 1.0)
    grad_input.copy_(buff[:, None] * (chosen - softmax))
