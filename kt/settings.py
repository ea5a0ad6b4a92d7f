"""The settings of every method: each key's type, range, default and meaning, once. Imports no torch.

Hydra's group `method`, the check of a config and `kt.methods.build_method` are all made from these classes.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from kt.errors import UserError, nearest
from kt.needs import PROCESS, SNAPSHOTS, Need, alone, teacher_of

Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Gt(0), Le(1)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Width = Annotated[float, Gt(0), Le(16)]  # of a network; more fills any machine
Count = Annotated[int, Ge(1)]
Length = Annotated[int, Ge(1), Le(10**12)]
Whole = Annotated[int, Ge(0)]
Name = Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]  # of what a folder or a file is called after
Side = Annotated[int, Ge(8)]  # in pixels
Some = MinLen(1)  # of a list that may not be empty
Text = Annotated[str, Some, Field(pattern=r"^[^\r\n]*$")]  # of a path, for one
Stages = Annotated[list[Whole], Some] | Literal["all", "last", "blocks"]

# A rule's attribute -> its words.
_RULES = {
    **{"ge": ">= ", "gt": "> ", "le": "<= ", "lt": "< ", "multiple_of": "a multiple of "},
    **{"min_length": "of length >= ", "max_length": "of length <= ", "pattern": "that matches "},
}
_PATTERNS = {r"^[^\r\n]*$": "in one line, all of it UTF-8"}  # a pattern that says less than words


_REPDISTILLER = "RepDistiller's released code (Tian, Krishnan, Isola 2020)"
_UNSTATED = "ours, unstated"


class Settings(BaseModel):
    """A group of keys; a key without a default has to be given.

    Attributes:
        added: Keys that came when cells had been trained without them, with the value that means what those did. With
            that value a key does not enter a cell's id, whatever its default is or becomes.
        sources: Where defaults come from, by key, the empty key for all others: another's paper or code, or "ours" with
            the reason.
    """

    added: ClassVar[Mapping[str, Any]] = {}
    sources: ClassVar[Mapping[str, str]] = {}

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def idle(cls, options: Mapping[str, Any], task: str | None = None) -> dict[str, str]:
        """Keys that decide nothing under the others, each with what they go with.

        Args:
            options: All of them.
            task: What the student learns, where that is known.
        """
        return {}


class Dataset(Settings):
    """A dataset and what is done to its images."""

    sources: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("name", "task", "num_classes", "domain", "folder", "train_split", "test_split"),
            "the dataset as its authors publish it",
        ),
        "validation": "ours, the whole training set is trained on",
    }
    name: str = Field(description="one of kt.data.DATASETS")
    task: Literal["classification", "segmentation", "detection", "pedestrians", "keypoints", "depth"] = Field(
        description="what is learned on it"
    )
    num_classes: Count | None = Field(None, description="null: as many as the data have")
    image_size: Side | list[Side] = Field(description="pixels a side, or [height, width]")
    crop_size: list[Count] | None = Field(
        None, description="[height, width] of random training crops, for segmentation"
    )
    subset: Count | None = Field(
        None, description="that many training images (balanced over the classes of a classification set)"
    )
    validation: Fraction = Field(
        0.0, description="share of the training set to score on instead of the test set; for tuning"
    )
    augmentation: str = Field(description="of training images; which a task has, `kt.data.names.augmentations` says")
    style: Literal["photo", "synthetic", "painting"] = Field("photo", description="of embedded scenes")
    train_size: Count | None = Field(None, description="embedded scenes to draw")
    test_size: Count | None = Field(None, description="embedded scenes to draw")
    domain: Literal["clipart", "painting", "real"] | None = Field(
        None, description="of DomainNet and its embedded stand-in: which of their sets"
    )
    folder: Text | None = Field(None, description="below data_root")
    train_split: Text | None = Field(None, description="what the folder calls it")
    test_split: Text | None = Field(None, description="what the folder calls it")
    resident: bool | None = Field(None, description="kept in memory (or on the device); null: when small enough")
    stand_in: Text | None = Field(
        None, description="the embedded dataset that replaces this one in tables at a scale that has stand-ins"
    )


class DepthDataset(Dataset):
    """A dataset of depth."""

    depth_samples: Whole = Field(
        0, description="pixels of known depth, on average, that a network is given beside an image's colours"
    )


class Schedule(Settings):
    """Optimizer, learning rate and length, in epochs or in iterations; by default RepDistiller's for CIFAR-100."""

    sources: ClassVar[Mapping[str, str]] = {"": _REPDISTILLER}
    epochs: Whole | None = Field(240, description="length; null with iterations")
    iterations: Length | None = Field(None, description="length in updates; null with epochs")
    interval: Count | None = Field(
        None, description="updates that count as an epoch of a length in iterations, or more that divide it; null: all"
    )
    batch_size: Count = Field(64, description="images of an update, over all processes and accumulated passes")
    device_batch: Count | None = Field(
        None, description="images that one normalisation sees; null: the batch size over the processes"
    )
    optimizer: Literal["sgd", "adam", "adamw"] = Field("sgd", description="what takes the steps")
    lr: Positive = Field(0.05, description="learning rate at its highest")
    momentum: Fraction = Field(0.9, description="of sgd")
    nesterov: bool = Field(False, description="of sgd")
    weight_decay: NotNegative = Field(5e-4, description="of the optimizer")
    policy: Literal["step", "cosine", "poly", "constant"] = Field("step", description="how the learning rate falls")
    milestones: list[Positive] = Field(
        [150 / 240, 180 / 240, 210 / 240], description="where it falls; in epochs, below 1 as shares of the length"
    )
    gamma: Share = Field(0.1, description="by what it falls there")
    warmup_epochs: NotNegative = Field(0, description="of a linear rise")
    clip_grad: Positive | None = Field(None, description="largest norm of a step's gradient")
    evaluate_every: Count = Field(1, description="epochs between two scores")

    @classmethod
    def idle(cls, options: Mapping[str, Any], task: str | None = None) -> dict[str, str]:
        """What another length, policy or optimizer reads."""
        if options["epochs"] == 0:
            return dict.fromkeys(kinds(cls).keys() - {"epochs", "batch_size"}, "a training (0 epochs are none)")
        found = {} if options["iterations"] else {"interval": "a length in iterations"}
        if options["policy"] != "step":
            found |= dict.fromkeys(("milestones", "gamma"), "policy=step")
        if options["optimizer"] != "sgd":
            found |= dict.fromkeys(("momentum", "nesterov"), "optimizer=sgd")
        return found


class Method(Settings):
    """Settings of a method, and what has to be known of it before it is imported; subclasses add their own.

    Attributes:
        needs_teacher: Whether there is no training without a teacher.
        runs_teacher: Whether such a teacher answers in training; not where the student merely starts from its weights.
        dense: Whether it teaches detectors and segmentors too.
        depth: Whether it teaches depth networks as well where it teaches no others of these.
        accumulates: Whether its losses are means over images of what each image gives, so that an update may be
            accumulated from passes; not where images depend on one another, or are weighed by the whole batch.
        only_for: The one task that it is for; None: classification, and others as `dense` says.
        whole_teacher: Whether of a segmentor that teaches the decode head is needed too, not its backbone alone.
        passes: Time of a training over that of the student alone, roughly, to order cells by.
        own_network: Whether its teacher is the student itself, as it was trained before.
        cell_keys: Keys that say which cells are needed; the method itself lacks them.
        told_by_needs: Of these, keys that the ids of the needed cells tell in full, and no other id.
        choices: What keys are at first chosen from other groups, as Hydra's defaults lists have it.
        base_alone: Of a method around others: its base under its own name alone; None is none.
        module: What to import so that the method is registered; None: it is kt's own.
        free_layer: The key that puts a free layer between the maps that are compared, unless it is of `AS_IT_IS`.
    """

    name: str = Field(description="what method= chooses")

    needs_teacher: ClassVar[bool] = True
    runs_teacher: ClassVar[bool] = True
    dense: ClassVar[bool] = False
    depth: ClassVar[bool] = False
    only_for: ClassVar[str | None] = None
    whole_teacher: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False
    passes: ClassVar[float] = 1.5
    own_network: ClassVar[bool] = False
    cell_keys: ClassVar[tuple[str, ...]] = ()
    told_by_needs: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[Mapping[str, str]] = {}
    base_alone: ClassVar[str | None] = None
    module: ClassVar[str | None] = None
    free_layer: ClassVar[str | None] = None

    @classmethod
    def teaches(cls, task: str) -> bool:
        """Whether it may teach networks for a task; what `only_for` rules out is another matter."""
        return cls.dense or task == "classification" or (cls.depth and task == "depth")

    @classmethod
    def accumulates_with(cls, options: Mapping[str, Any]) -> bool:
        """`accumulates` under some options; those left out have their defaults."""
        return cls.accumulates

    @classmethod
    def check(cls, options: Mapping[str, Any], epochs: int | None = None) -> None:
        """Refuses settings that do not go together, so that no teacher is trained for them.

        Args:
            options: All of them.
            epochs: The length of the training, where that is known; 0: there is none.

        Raises:
            UserError: Names a key, its value and what was expected.
        """

    @staticmethod
    def needs(config: Mapping[str, Any]) -> Mapping[str, Need | Path]:
        """What a cell with this method needs beside its teacher, by name: another cell, or a file of the user's.

        Args:
            config: The cell's settled config; its `method` has these settings.
        """
        return {}


class NoMethod(Method):
    """The student alone."""

    needs_teacher: ClassVar[bool] = False
    passes: ClassVar[float] = 1.0
    dense: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True


class Finetune(Method):
    """The teacher's weights with a fresh classifier, trained on."""

    sources: ClassVar[Mapping[str, str]] = {"": "ours, one learning rate for all"}
    runs_teacher: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True
    head_lr_factor: Positive = Field(1.0, description="learning rate of the fresh classifier over that of the rest")


class FixedFeature(Method):
    """Stage by stage, Table 1: the teacher's features stay fixed, the rest of its network is trained."""

    sources: ClassVar[Mapping[str, str]] = {"": _UNSTATED}
    own_network: ClassVar[bool] = True
    runs_teacher: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True
    frozen: Literal["features", "first_block"] = Field("features", description="what stays fixed")


class KD(Method):
    """Hinton, Vinyals, Dean 2015: task_weight * cross-entropy + alpha * soft target (with temperature squared).

    For depth, the soft target is the mean absolute difference from the teacher's depth (DistPro, section 4.3), and both
    weights are 1 in its table.
    """

    sources: ClassVar[Mapping[str, str]] = {"": _REPDISTILLER}
    depth: ClassVar[bool] = True
    whole_teacher: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    temperature: Positive = Field(4.0, description="of both softmaxes")
    alpha: NotNegative = Field(0.9, description="weight of the soft target")
    task_weight: NotNegative = Field(0.1, description="weight of the task's loss")

    @classmethod
    def idle(cls, options: Mapping[str, Any], task: str | None = None) -> dict[str, str]:
        """The temperature, where there is no softmax."""
        return {"temperature": "classes"} if task == "depth" else {}


class KDFixedFeature(KD):
    """Stage by stage, Table 1: KD, then a fresh classifier on the features that it gave."""

    sources: ClassVar[Mapping[str, str]] = {"retrain": "ours, read as the same experiment's", "frozen": _UNSTATED}
    depth: ClassVar[bool] = False
    frozen: Literal["features", "first_block"] = Field("features", description="what stays fixed")
    retrain: Literal["kd", "task"] = Field(
        "kd",
        description="the loss that trains the classifier; open in the paper, read as the same experiment's",
    )


AS_IT_IS = ("none", "first")
_AS_IT_IS = "none (as it is, so the channels have to agree) | first (as it is, with the teacher's first channels)"


class FitNet(Method):
    """Romero et al. 2015: one hint, an intermediate stage regressed onto the teacher's."""

    sources: ClassVar[Mapping[str, str]] = {
        "": _REPDISTILLER,
        "hint_layer": "Romero et al. 2015",
        "init_fraction": _UNSTATED,
    }
    added: ClassVar[Mapping[str, Any]] = {"init_fraction": None, "temperature": 4.0, "alpha": 1.0}
    dense: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    free_layer: ClassVar[str | None] = "regressor"
    weight: NotNegative = Field(100.0, description="of the hint")
    hint_layer: Annotated[int, Ge(-1)] | Stages | None = Field(
        None, description="stage, from 0; null: the middle one; -1: the last; blocks: each end of a block, no stem"
    )
    regressor: Literal["conv_bn_relu", "conv", "none", "first"] = Field(
        "conv_bn_relu", description=f"what the student's map goes through: a free 1x1 convolution | {_AS_IT_IS}"
    )
    init_fraction: Share | None = Field(
        None,
        description="length of the paper's first stage, by the hint alone, after which KD trains the student; null: "
        "the hint beside the cross-entropy throughout",
    )
    temperature: Positive = Field(4.0, description="of KD after the first stage")
    alpha: NotNegative = Field(1.0, description="weight of its soft target, beside a cross-entropy of weight 1")

    @classmethod
    def idle(cls, options: Mapping[str, Any], task: str | None = None) -> dict[str, str]:
        """KD's, where none follows."""
        return dict.fromkeys(("temperature", "alpha"), "an init_fraction") if options["init_fraction"] is None else {}


_COMPARED = "stages compared: all | last | blocks (the ends of blocks, without a stem) | numbers, counted from 0"


class AT(Method):
    """Zagoruyko and Komodakis 2017: attention maps of every stage."""

    sources: ClassVar[Mapping[str, str]] = {"": _REPDISTILLER}
    dense: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    weight: NotNegative = Field(1000.0, description="of the attention loss")
    form: Literal["mean", "sum"] = Field("mean", description="over the map: mean | sum (the paper's)")
    stages: Stages = Field("all", description=_COMPARED)


class NST(Method):
    """Huang and Wang 2017: maximum mean discrepancy of channel activations under the kernel (x . y)^2."""

    sources: ClassVar[Mapping[str, str]] = {"": _REPDISTILLER}
    dense: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    weight: NotNegative = Field(50.0, description="RepDistiller's")
    stages: Stages = Field("all", description=_COMPARED)


class FT(Method):
    """Kim, Park, Kwak 2018: a paraphraser first compresses the teacher's last map to factors, which are then learnt."""

    sources: ClassVar[Mapping[str, str]] = {"": _REPDISTILLER, "paraphraser_lr": _UNSTATED}
    passes: ClassVar[float] = 3.5
    accumulates: ClassVar[bool] = True
    weight: NotNegative = Field(200.0, description="of the factors' loss")
    factor: Share = Field(0.5, description="factor channels over teacher channels")
    init_fraction: Share = Field(0.125, description="length of the paraphraser's phase: 30 of 240 epochs")
    paraphraser_lr: Positive = Field(0.01, description="learning rate of the paraphraser")
    form: Literal["repdistiller", "official"] = Field(
        "repdistiller", description="repdistiller (normalised mean-square maps) | official (raw factors)"
    )


class AB(Method):
    """Heo et al. 2019b: activation boundaries initialise the student, which is then trained."""

    sources: ClassVar[Mapping[str, str]] = {"": _REPDISTILLER, "temperature": "Heo et al. 2019b"}
    added: ClassVar[Mapping[str, Any]] = {"connector": "conv_bn"}
    accumulates: ClassVar[bool] = True
    free_layer: ClassVar[str | None] = "connector"
    weight: NotNegative = Field(1.0, description="of the boundaries' loss")
    margin: Positive = Field(1.0, description="distance from the boundary that is asked for")
    init_fraction: Share = Field(0.125, description="length of the initialisation: 30 of 240 epochs")
    after: Literal["task", "kd"] = Field("task", description="what follows: task | kd (at `temperature`, the paper's)")
    temperature: Positive = Field(3.0, description="of KD afterwards")
    stages: Literal["all", "last"] = Field("all", description="stages compared")
    connector: Literal["conv_bn", "none", "first"] = Field(
        "conv_bn", description=f"what the student's map goes through: a free 1x1 convolution | {_AS_IT_IS}"
    )

    @classmethod
    def idle(cls, options: Mapping[str, Any], task: str | None = None) -> dict[str, str]:
        """KD's, where none follows."""
        return {} if options["after"] == "kd" else {"temperature": "after=kd"}


class HybridForward(Method):
    """Song et al. 2021: student and teacher stages alternate in one forward pass; L = balance * (L1 + L2) + L3."""

    sources: ClassVar[Mapping[str, str]] = {"": _UNSTATED}
    passes: ClassVar[float] = 3.0
    dense: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    balance: Literal["dynamic"] | NotNegative = Field(
        1.0, description="a number (Table 1 simply adds) | dynamic: 2 L3 / (L1 + L2) per batch"
    )
    switch_at: Annotated[list[list[Count]], Some] | None = Field(
        None, description="groups of strides between which paths switch; null: [[2],[4,8],[16],[32]] or [[1],[2],[4]]"
    )
    track_hybrid_stats: bool = Field(
        False, description="let hybrid passes update running statistics too; for ablation only"
    )
    interpolation: Literal["bilinear", "nearest"] = Field("bilinear", description="where sizes of maps differ")

    @classmethod
    def accumulates_with(cls, options: Mapping[str, Any]) -> bool:
        """A dynamic balance comes from the losses of the whole batch."""
        return cls.accumulates and options.get("balance") != "dynamic"


class Stagewise(Method):
    """Stage by stage (ICLR 2019 submission): one phase per block on frozen earlier ones, then the head alone."""

    sources: ClassVar[Mapping[str, str]] = {
        "": _UNSTATED,
        "cut_at": "the paper: at the down-sampling layers",
        "phase_length": 'ours, as "besides the number of stages, we keep all other hyper-parameters same" reads',
        "head_length": "ours, as the other phases",
    }
    passes: ClassVar[float] = 2.5
    dense: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    stages: Count | None = Field(
        None,
        description="K: 1 is end-to-end mimicking, 2 the first block and then the rest; null: every block by itself",
    )
    cut_at: Annotated[list[Count], Some] | None = Field(
        None, description="strides at whose ends blocks end; null: the down-sampling layers, a stem in the first block"
    )
    phase_length: Literal["full", "split"] = Field(
        "full",
        description="full | split: the K feature phases share the schedule's length. Unstated; \"besides the number of "
        'stages, we keep all other hyper-parameters same" reads as each phase being a whole training',
    )
    head_length: Share = Field(1.0, description="of the final phase, as a share of the schedule; unstated, see above")


class L2(Method):
    """The last stage's maps before their last ReLU, channel by channel: the "Baseline" of KCD's tables."""

    sources: ClassVar[Mapping[str, str]] = {
        "": _UNSTATED,
        "weight": "FitNet's for the mean, the KCD paper's for the sum",
        "preactivation": "the KCD paper, which states it for detection",
    }
    dense: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    weight: NotNegative | None = Field(
        None,
        description="null: 100 for the mean (FitNet's), 1e-4 for the sum (what the KCD paper prints for detection)",
    )
    reduction: Literal["mean", "sum"] = Field("mean", description="mean over all elements | sum per image")
    match: Literal["rectangular", "adapter"] = Field(
        "rectangular",
        description="where the teacher has more channels: its first ones | a 1x1 convolution on the student's",
    )
    preactivation: bool = Field(True, description="the KCD paper states it for detection; here everywhere")


class RCO(L2):
    """Jin et al. 2019: the L2 loss on snapshots of the teacher's training, one after the other."""

    @staticmethod
    def needs(config: Mapping[str, Any]) -> dict[str, Need]:
        """The snapshots; a teacher from a file has none."""
        return {} if config["teacher"]["checkpoint"] else {"anchor": Need(teacher_of(config), SNAPSHOTS)}


class RKD(Method):
    """Park et al. 2019: distances and angles between the samples of a batch, on the penultimate feature."""

    sources: ClassVar[Mapping[str, str]] = {"": _REPDISTILLER}
    weight: NotNegative = Field(25.0, description="of both losses")
    angle: NotNegative = Field(2.0, description="weight of the angles over that of the distances")


class Pathways(Settings):
    """From which of the student's maps to which of the teacher's, through what, DistPro transfers."""

    sources: ClassVar[Mapping[str, str]] = {
        "": "ours, after DistPro's released code: the figure of the paper is lost",
        "factor": "DistPro's released code",
    }
    transforms: Annotated[list[Literal["conv1", "conv2", "conv3", "complex"]], Some] | None = Field(
        None,
        description="what the student's maps go through, the figure being lost: blocks of the released code; null: the "
        "first three on networks for small images (27 pathways of 3 x 3 maps), `complex` on others (15 of 5 maps; 16 "
        "of 4 x 4 for a task other than classification)",
    )
    connections: Literal["all", "rising"] | Annotated[list[list[Count]], Some] | None = Field(
        None,
        description="all pairs of maps | rising: none from a shallower map of the student to a deeper one of the "
        "teacher | pairs [teacher's map, student's map] from 1, such as [[4,1],[4,2]]; null: rising on classifiers for "
        "large images, all on others",
    )
    pooled: bool | None = Field(
        None, description="whether the penultimate feature is one of the maps; null: of classifiers for large images"
    )
    factor: Literal["pathways"] | NotNegative = Field(
        "pathways",
        description="on the sum of weighted distances; pathways: their number (the released code's), 1: eq. 2's",
    )


class Searching(Settings):
    """How DistPro searches a process."""

    sources: ClassVar[Mapping[str, str]] = {
        "": "the DistPro paper, which states it for CIFAR-100",
        "hypergradient": "the DistPro paper, as in DARTS",
    }
    normalisation: Literal["biased_softmax", "softmax", "biased_l1", "l1", "sigmoid"] = Field(
        "biased_softmax", description="of logits to weights (Table 7)"
    )
    alpha_lr: Positive = Field(0.05, description="step size of the logits' Adam (betas 0.5 and 0.999), constant")
    validation: Annotated[float, Gt(0), Lt(1)] = Field(
        0.2, description="share of the training images, drawn at random, that logits learn on"
    )
    hypergradient: Literal["difference", "jvp"] = Field(
        "difference", description="two perturbed passes around the weights | forward mode: exact, and slower"
    )


class DistProSearch(Pathways, Searching, Method):
    """Deng et al., DistPro, first phase: a student's training that finds and leaves a distillation process."""

    dense: ClassVar[bool] = True
    passes: ClassVar[float] = 8.0


class Search(Searching):
    """The cell that searches: what is null is as in the cell that replays the process."""

    teacher: dict[str, Any] | None = Field(None, description="teacher@method.search.teacher=<choice>")
    student: dict[str, Any] | None = Field(None, description="student@method.search.student=<choice>")
    dataset: Dataset | None = Field(None, description="dataset@method.search.dataset=<choice>")
    schedule: Schedule | None = Field(
        None, description="at first the recipe of the dataset, so that schedule.* is the replaying cell's alone"
    )
    seed: Whole = Field(0, description="of the search, whatever that of the cell: all seeds replay one process")


class DistPro(Pathways, Method):
    """Deng et al., DistPro: distillation along many pathways whose weights follow a searched process."""

    sources: ClassVar[Mapping[str, str]] = {"": "the DistPro paper"}
    dense: ClassVar[bool] = True
    passes: ClassVar[float] = 3.0
    cell_keys: ClassVar[tuple[str, ...]] = ("search", "file")
    told_by_needs: ClassVar[tuple[str, ...]] = ("search", "file")
    choices: ClassVar[Mapping[str, str]] = {"/schedule@search.schedule": "${dataset}"}
    process: Literal["search", "final", "equal"] = Field(
        "search",
        description="search: stretched to the length of the training | final: its last weights | equal: 1 / pathways",
    )
    clip: float | None = Field(
        0.5, description="logits up to it drop their pathway for a step (not of `equal`); null: none does"
    )
    search: Search = Field(Search.model_construct(), description="the cell that leaves the process")
    file: Text | None = Field(None, description="a process.pth to replay instead of searching one")

    @classmethod
    def idle(cls, options: Mapping[str, Any], task: str | None = None) -> dict[str, str]:
        """What is of a search, where none is replayed; and the search, where its file is given."""
        if options["process"] == "equal":
            return dict.fromkeys(("clip", "search", "file"), "process=search or process=final")
        return {"search": "file=null"} if options["file"] else {}

    @staticmethod
    def needs(config: Mapping[str, Any]) -> Mapping[str, Need | Path]:
        """The search, or the file that another one has left."""
        method = config["method"]
        if method["process"] == "equal":
            return {}
        if method["file"]:
            return {"search": Path(method["file"])}
        search = method["search"]
        # Whatever the search's own are, its teacher has the data and the recipe of the replaying cell's.
        teacher = {**(search["teacher"] or config["teacher"])}
        teacher |= {key: teacher[key] or config["teacher"][key] for key in ("dataset", "schedule")}
        trained = teacher_of({**config, "teacher": teacher})
        found = {
            "teacher": {**teacher, "dataset": trained["dataset"], "schedule": trained["schedule"]},
            "student": search["student"] or config["student"],
            "dataset": search["dataset"] or config["dataset"],
            "schedule": search["schedule"] or config["schedule"],
            "seed": search["seed"],
        }
        own = {key: method[key] for key in kinds(Pathways)} | {key: search[key] for key in kinds(Searching)}
        return {"search": Need({**config, **found, "method": {"name": "distpro_search", **own}}, PROCESS)}


class AS(Method):
    """Chen et al., MAKD: an auxiliary network fits the teacher's features to the student's, then teaches them."""

    sources: ClassVar[Mapping[str, str]] = {
        "": _UNSTATED,
        "reduction": "the MAKD paper: mean square error",
        "aux_updates": 'ours, "repeated several times"',
        "auxiliary": "the MAKD paper",
    }
    module: ClassVar[str | None] = "kt.methods.mas"
    weight: NotNegative = Field(1.0, description="of the matching loss; unstated")
    reduction: Literal["mean", "sum"] = Field(
        "mean", description='of an image\'s squared differences, over the elements: "mean square error" | sum'
    )
    first_epochs: Whole = Field(1, description="epochs by the task's loss alone, before the first round; unstated")
    aux_updates: Count = Field(
        2, description='updates of the auxiliary networks in each round, on its batch; "repeated several times"'
    )
    aux_lr: Positive = Field(
        1e-3, description="of their own Adam, constant: they follow a student that moves on; unstated"
    )
    auxiliary: Literal["fc", "se"] = Field(
        "fc", description="a fully connected layer, at each position of a map | with squeeze and excitation before it"
    )

    @classmethod
    def check(cls, options: Mapping[str, Any], epochs: int | None = None) -> None:
        """Refuses a training that ends before the first round."""
        if epochs and epochs <= options["first_epochs"]:
            raise UserError(
                f"method.first_epochs={options['first_epochs']}: the training has {epochs} in all; expected fewer, "
                "or a longer schedule"
            )


class MAS(AS):
    """MAKD's MAS: from one auxiliary network to every layer of the student."""

    sources: ClassVar[Mapping[str, str]] = {
        "": "Jang et al. 2019 (Learning what and where to transfer)",
        "stages": _UNSTATED,
        "pair_weights": "the MAKD paper",
    }
    passes: ClassVar[float] = 3.5
    added: ClassVar[Mapping[str, Any]] = {"meta_interval": 1}
    stages: Stages = Field("blocks", description=_COMPARED)
    pair_weights: Literal["meta", "uniform"] = Field(
        "meta", description="of pairs of layers: by a meta network, which learns what lowers the task's loss | all one"
    )
    meta_lr: Positive = Field(1e-4, description="of the meta network's Adam, constant; as in L2T")
    meta_weight_decay: NotNegative = Field(1e-4, description="of the meta network; as in L2T")
    meta_interval: Count = Field(1, description="updates of the student for each of the meta network, the costly one")

    @classmethod
    def idle(cls, options: Mapping[str, Any], task: str | None = None) -> dict[str, str]:
        """The meta network's, where there is none."""
        own = ("meta_lr", "meta_weight_decay", "meta_interval")
        return {} if options["pair_weights"] == "meta" else dict.fromkeys(own, "pair_weights=meta")


class M2AS(MAS):
    """MAKD's M2AS: MAS, and every layer of the teacher directly to every layer of the student."""

    passes: ClassVar[float] = 4.0


SOURCE = "source"  # a method's key that names a dataset, and the loader of its images that the method draws from


class M2A2S(M2AS):
    """MAKD's M2A2S: M2AS with a second set of auxiliary networks that learns on unlabelled images of the source."""

    sources: ClassVar[Mapping[str, str]] = {"": _UNSTATED}
    passes: ClassVar[float] = 5.5
    cell_keys: ClassVar[tuple[str, ...]] = ("source", "source_share")
    source: Dataset | None = Field(
        None, description="the source images, labels unused: dataset@method.source=<choice>; null: the teacher's"
    )
    source_share: Share = Field(0.01, description="share of its training images, drawn once for all seeds")
    source_weight: Fraction = Field(
        0.5, description="share of the second networks in the matching loss; unstated, read as the mean of the two"
    )


class CRD(Method):
    """Tian, Krishnan, Isola 2020: an image's two embeddings are told apart from those of images of other classes."""

    sources: ClassVar[Mapping[str, str]] = {"": _REPDISTILLER}
    weight: NotNegative = Field(0.8, description="of both contrasts; RepDistiller's")
    embedding: Count = Field(128, description="size of the embeddings")
    negatives: Count = Field(16384, description="images of other classes that each image is contrasted with")
    temperature: Positive = Field(0.07, description="of the embeddings' products")
    momentum: Fraction = Field(0.5, description="share of its old embedding that an image's memory keeps")


class L2T(Method):
    """Jang et al. 2019, "Learning What and Where to Transfer": meta-learned weights of channels and pairs of layers."""

    sources: ClassVar[Mapping[str, str]] = {"": "Jang et al. 2019 (Learning what and where to transfer)"}
    passes: ClassVar[float] = 10.0
    added: ClassVar[Mapping[str, Any]] = {"meta_interval": 1}
    weight: NotNegative = Field(0.5, description="of the matching loss: the paper's beta")
    inner_steps: Count = Field(
        2, description="steps on the matching loss alone that the meta-gradient looks back at: T"
    )
    meta_lr: Positive = Field(
        1e-4, description="learning rate (Adam) of the meta-networks; the paper's Stanford40: 1e-3"
    )
    meta_weight_decay: NotNegative = Field(1e-4, description="of the meta-networks")
    meta_interval: Count = Field(
        1, description="updates of the student for each of the meta-networks, the costly one; the paper: 1"
    )


class ReviewKD(Method):
    """Chen et al. 2021: every level of the student, fused with all deeper ones, learns a level of the teacher."""

    sources: ClassVar[Mapping[str, str]] = {"": "Chen et al. 2021 (ReviewKD), released code"}
    dense: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    passes: ClassVar[float] = 2.5
    weight: NotNegative = Field(
        1.0,
        description="of the sum over levels. CIFAR-100: 5 for WRN-16-2, WRN-40-1, ResNet-8x4 and ShuffleNet v1, 8 for "
        "v2, 0.6 for ResNet-20, 1 for ResNet-32. ImageNet: 1 for ResNet-18, 8 for MobileNet",
    )
    ramp: Fraction = Field(
        20 / 240, description="share of the length over which the weight rises from 0, 20 of 240 epochs; ImageNet: 0"
    )
    preactivation: bool = Field(
        False, description="of the student's maps; the teacher's always are before their ReLU. ImageNet: true"
    )
    width: Count | None = Field(
        None, description="channels of the fused maps; null: the last level's, at most 512. MobileNet: 256"
    )


class OFD(Method):
    """Heo et al. 2019a: L2 before the ReLU; what the teacher suppresses may be any value below a margin."""

    sources: ClassVar[Mapping[str, str]] = {"": "Heo et al. 2019a, released code"}
    accumulates: ClassVar[bool] = True
    weight: NotNegative | None = Field(
        None,
        description="of the sum over levels, each half as heavy as the next; null: 1e-3 for networks for small images, "
        "else 1e-4 (the released code's 1/1000 and 1/10000)",
    )
    margin: Literal["norm", "measured"] = Field(
        "norm",
        description="mean negative response of a channel: by its last normalisation | measured on the training images",
    )


class IFVD(Method):
    """Wang et al. 2020: intra-class feature variation and soft labels of a segmentor, maybe around another method."""

    sources: ClassVar[Mapping[str, str]] = {"": "Wang et al. 2020 (IFVD), released code"}
    dense: ClassVar[bool] = True
    only_for: ClassVar[str | None] = "segmentation"
    whole_teacher: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    passes: ClassVar[float] = 2.0
    weight: NotNegative = Field(200.0, description="of the intra-class feature variation")
    soft_weight: NotNegative = Field(10.0, description="of the soft labels, a mean over pixels and classes")
    base: Method | None = Field(None, description="the method whose loss these terms are added to; null: none")

    @classmethod
    def accumulates_with(cls, options: Mapping[str, Any]) -> bool:
        """As its base."""
        base = options.get("base")
        return cls.accumulates and (not base or accumulates(base))

    @staticmethod
    def needs(config: Mapping[str, Any]) -> Mapping[str, Need | Path]:
        """What the base needs; a cell that searches for it does so under this method as well."""
        settings = config["method"]
        base = settings["base"]
        found = dict(METHODS[base["name"]].needs({**config, "method": base}) if base else {})
        for name, need in found.items():
            if isinstance(need, Need) and f"ifvd+{need.config['method']['name']}" in METHODS:
                inner = need.config["method"]
                around = {**settings, "name": f"ifvd+{inner['name']}", "base": inner}
                found[name] = Need({**need.config, "method": around}, need.file)
        return found


# Strategies of `KCD` that match channels, look at no network, or learn.
MATCHED, FIXED, LEARNED = ("bipartite", "greedy"), ("random", "identity"), ("subnet_fc", "subnet_res")


class KCD(Method):
    """Han et al., "Fixing the Teacher-Student Knowledge Discrepancy in Distillation", around another method."""

    sources: ClassVar[Mapping[str, str]] = {
        "": "the KCD paper",
        "match": _UNSTATED,
        "learn_fraction": "ours, as other methods' first phases",
    }
    dense: ClassVar[bool] = True
    base_alone: ClassVar[str | None] = "l2"
    cell_keys: ClassVar[tuple[str, ...]] = ("teacher_state", "solo_offset", "teacher_offset")
    accumulates: ClassVar[bool] = True
    strategy: Literal["bipartite", "greedy", "random", "identity", "subnet_fc", "subnet_res"] = Field(
        "bipartite", description="how the teacher's channels are brought in line with the student's"
    )
    metric: Literal["l1", "l2", "cosine", "correlation", "kl"] = Field(
        "correlation", description="consistency of two channels; kl is of softmaxes over the samples (unstated)"
    )
    match: Literal["rectangular", "adapter"] = Field(
        "rectangular",
        description="unstated: where the teacher has more channels, `rectangular` takes as many of its as the student "
        "has, each once; `adapter` orders all, the matched ones first, and widens the student by a 1x1 convolution",
    )
    groups: Count = Field(1, description="of classes, each with its own transform (Table 6)")
    groups_for: Count | None = Field(
        None, description="classes that `groups` is meant for; on data with fewer it shrinks, on a log scale"
    )
    update_every: Count | Annotated[float, Gt(0), Lt(1)] | None = Field(
        None,
        description="epochs (below 1: share of the length) after which the transform is computed anew; null: never",
    )
    student_state: Literal["trained", "initial"] = Field(
        "trained", description="the student that the transform is computed from (Tables 3 and 4)"
    )
    teacher_state: Literal["trained", "initial"] = Field("trained", description="the same of the teacher")
    solo_offset: Whole = Field(0, description="how far that student's seed is from that of the student in training")
    teacher_offset: Whole = Field(0, description="the same of the teacher")
    learn_fraction: Share = Field(
        0.125, description="length of a learned strategy's phase (unstated), as other methods' first phases"
    )
    base: Method | None = Field(None, description="the method that is trained on the transformed teacher; null: l2")
    beside: Method | None = Field(
        None, description="an L2 loss on the transformed maps beside the base, for one that compares no channels"
    )

    @classmethod
    def accumulates_with(cls, options: Mapping[str, Any]) -> bool:
        """As its base; a learned transform's loss correlates channels over the images of a batch."""
        learned = options.get("strategy") in LEARNED
        return cls.accumulates and not learned and accumulates(options.get("base") or {"name": "l2"})

    @classmethod
    def idle(cls, options: Mapping[str, Any], task: str | None = None) -> dict[str, str]:
        """What other strategies read."""
        strategy, found = options["strategy"], {}
        if strategy in FIXED:
            keys = ("metric", "student_state", "teacher_state", "solo_offset", "teacher_offset")
            found = dict.fromkeys(keys, "a strategy that looks at the networks")
        elif options["student_state"] == "initial":
            found = {"solo_offset": "student_state=trained"}
        if strategy not in LEARNED:
            found["learn_fraction"] = f"a strategy of {' or '.join(LEARNED)}"
        return found

    @classmethod
    def check(cls, options: Mapping[str, Any], epochs: int | None = None) -> None:
        """Refuses transforms that the strategy does not have.

        And a base with a free layer before its loss, and an adapter beside one that has none.
        """
        strategy, groups, every = (options[key] for key in ("strategy", "groups", "update_every"))
        if every is not None and strategy not in MATCHED:
            raise UserError(f"method.update_every={every}: expected null with strategy={strategy}")
        if groups > 1 and (strategy in LEARNED or every is not None):
            raise UserError(f"method.groups={groups}: expected 1 with strategy={strategy}, update_every={shown(every)}")
        base = options["base"] or {"name": "l2"}
        schema = METHODS.get(base["name"])
        if schema is None or schema.free_layer is None:
            return
        how = {**defaults(schema), **base}[schema.free_layer]
        if how not in AS_IT_IS:
            raise UserError(
                f"method.base.{schema.free_layer}={how}: a free 1x1 convolution takes channels in any order, so that "
                f"no transform would change the student; expected {' or '.join(AS_IT_IS)}"
            )
        if options["match"] == "adapter":
            raise UserError(
                f"method.match=adapter: {base['name']} has no adapter of its own here; expected rectangular"
            )

    @staticmethod
    def needs(config: Mapping[str, Any]) -> Mapping[str, Need | Path]:
        """The student trained alone, and the teacher that the transform is computed from if it is another one."""
        settings = config["method"]
        base = settings["base"]
        found = dict(METHODS[base["name"]].needs({**config, "method": base}) if base else {})
        if settings["strategy"] in FIXED:
            return found
        if settings["student_state"] == "trained":
            found["solo"] = Need(alone(config, settings["solo_offset"]))
        trained = settings["teacher_state"] == "trained"
        if not trained or settings["teacher_offset"]:
            found["source"] = Need(teacher_of(config, settings["teacher_offset"], trained))
        return found


# With those of other packages, once `kt.outside` has looked for them.
METHODS: dict[str, type[Method]] = {
    "none": NoMethod,
    "finetune": Finetune,
    "fixed_feature": FixedFeature,
    "kd": KD,
    "kd_fixed_feature": KDFixedFeature,
    "fitnet": FitNet,
    "at": AT,
    "nst": NST,
    "ft": FT,
    "ab": AB,
    "hybrid_forward": HybridForward,
    "stagewise": Stagewise,
    "l2": L2,
    "rkd": RKD,
    "rco": RCO,
    "distpro": DistPro,
    "distpro_search": DistProSearch,
    "as": AS,
    "mas": MAS,
    "m2as": M2AS,
    "m2a2s": M2A2S,
    "crd": CRD,
    "l2t": L2T,
    "reviewkd": ReviewKD,
    "ofd": OFD,
    **dict.fromkeys(("ifvd", "ifvd+reviewkd", "ifvd+distpro_search", "ifvd+distpro"), IFVD),
    **dict.fromkeys(("kcd", "kcd+fitnet", "kcd+ab", "kcd+rkd", "kcd+rco"), KCD),
}


# ------------------------------------------------------------------------------------------------------------- batches

# Losses of the other tasks are divided by the number of positives, or by the truth's sum.
ACCUMULATING_TASKS = ("classification", "segmentation")


def count_passes(batch_size: int, device_batch: int | None, processes: int) -> int:
    """How many passes of `device_batch` images each process accumulates for one update.

    Args:
        batch_size: Images of the update.
        device_batch: Images of a pass; None is the batch size over the processes.
        processes: Their number.

    Raises:
        UserError: The processes cannot share an update in passes of that size.
    """
    if device_batch is None:
        if batch_size % processes:
            raise UserError(f"schedule.batch_size={batch_size}: expected a multiple of {processes}, the processes")
        return 1
    passes, rest = divmod(batch_size, device_batch * processes)
    if rest or not passes:
        shared = f" over {processes} processes" if processes > 1 else ""
        raise UserError(
            f"schedule.device_batch={device_batch}: expected null or a divisor of "
            f"schedule.batch_size={batch_size}{shared}"
        )
    return passes


def check_schedule(schedule: Mapping[str, Any], prefix: str = "schedule.") -> None:
    """Refuses a schedule whose keys do not go together.

    Args:
        schedule: All of its keys.
        prefix: What stands before them in an error, with a dot at its end.

    Raises:
        UserError: Names the keys.
    """
    if (schedule["epochs"] is None) == (schedule["iterations"] is None):
        given = ", ".join(f"{prefix}{key}={shown(schedule[key])}" for key in ("epochs", "iterations"))
        raise UserError(f"{given}: expected one of the two, and null for the other")
    if schedule["optimizer"] == "sgd" and schedule["nesterov"] and not schedule["momentum"]:
        raise UserError(f"{prefix}nesterov=true: expected a {prefix}momentum above 0, or false")
    epochs_of(schedule)


def epochs_of(schedule: Mapping[str, Any]) -> int:
    """The length of a schedule in epochs: of one in iterations, `interval` updates are one, by default all of them.

    Where these do not divide the length, an epoch has as many more as it takes for equal ones: 100 updates with an
    interval of 40 are two epochs, 50 are one.
    """
    iterations, interval = schedule["iterations"], schedule["interval"]
    if iterations is None:
        return int(schedule["epochs"])
    most = max(1, iterations // (interval or iterations))
    if iterations % most == 0:
        return most
    divisors = (each for each in range(1, math.isqrt(iterations) + 1) if iterations % each == 0)
    return max(each for pair in ((small, iterations // small) for small in divisors) for each in pair if each <= most)


def device_batch(schedule: Mapping[str, Any], processes: int) -> int:
    """How many images one normalisation sees where the schedule runs on that many processes."""
    batch = schedule["batch_size"]
    return batch // (processes * count_passes(batch, schedule["device_batch"], processes))


def accumulates(method: Mapping[str, Any]) -> bool:
    """Whether a method's losses are means over images, see `Method`; of one without a class of settings nobody knows.

    Args:
        method: Its `name` and options; `a+b` is method a around method b.
    """
    name, _, inner = method["name"].partition("+")
    base = {"base": {"name": inner, **(method.get("base") or {})}} if inner else {}
    return name in METHODS and METHODS[name].accumulates_with({**method, **base})


def check_compile(compile: bool | str, activation_checkpointing: bool) -> None:
    """Refuses to compile passes that run again in a pass backward, where they would have to be the same to the bit.

    Raises:
        UserError: Both are asked for.
    """
    if compile and activation_checkpointing:
        raise UserError(f"compile={shown(compile)}: expected false with activation_checkpointing=true")


def check_accumulation(passes: int, method: bool, task: str) -> None:
    """Refuses accumulated passes where their mean is not the loss of the update.

    Args:
        passes: How many there are, see `count_passes`.
        method: Whether the method's losses are means over images, see `accumulates`.
        task: What the student learns.

    Raises:
        UserError: Says whose loss it is.
    """
    if passes == 1 or (method and task in ACCUMULATING_TASKS):
        return
    whose = f"the losses of {task} are no means over images" if method else "the method's update is not their mean"
    raise UserError(
        f"schedule.device_batch: an update would take {passes} passes, and {whose}; "
        f"expected null, or {passes} times as many processes"
    )


# ------------------------------------------------------------------------------------------------------------ checking


@functools.cache
def kinds(schema: type[Settings]) -> dict[str, Any]:
    """Key -> annotated type of a class of settings."""
    fields = schema.model_fields.items()
    return {key: getitem(Annotated, (f.annotation, *f.metadata)) if f.metadata else f.annotation for key, f in fields}


LARGEST = 2**63 - 1  # integer
STRICT = ConfigDict(strict=True, allow_inf_nan=False)


@functools.cache
def _adapter(schema: type[Settings], key: str) -> TypeAdapter:
    kind = kinds(schema)[key]
    # A group of keys has its own.
    config = None if isinstance(kind, type) and issubclass(kind, Settings) else STRICT
    return TypeAdapter(kind, config=config)


def fits(value: Any, schema: type[Settings], key: str) -> bool:
    """Whether a plain value is one that a key may have."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return False
    try:
        _adapter(schema, key).validate_python(value)
    except ValidationError:
        return False
    return True


def defaults(schema: type[Settings]) -> dict[str, Any]:
    """Key -> default of those that have one, plain."""
    found = {key: field.default for key, field in schema.model_fields.items() if not field.is_required()}
    return {key: defaults(type(value)) if isinstance(value, Settings) else value for key, value in found.items()}


def describe(kind: Any) -> str:
    """An annotated type in the words of an error message."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is Annotated:
        return f"{describe(arguments[0])} {' and '.join(_rules(arguments[1:]))}".strip()
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(literals(kind))
    if origin is list:
        return f"a list of {describe(arguments[0]).removeprefix('a ').removeprefix('an ')}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a text", list: "a list"}
    return {**names, type(None): "null"}.get(kind, "a group of keys")


def _rules(rules: Iterable[Any]) -> Iterator[str]:
    """What an annotated type's rules ask for, in words; a validator has none."""
    for rule in rules:
        if isinstance(rule, GroupedMetadata):
            yield from _rules(rule)
        elif isinstance(rule, FieldInfo):
            yield from _rules(rule.metadata)
        else:
            for name, words in _RULES.items():
                if (bound := getattr(rule, name, None)) is not None:
                    yield _PATTERNS.get(bound) or words + (f"{bound:g}" if isinstance(bound, float) else str(bound))


def literals(kind: Any) -> Iterator[str]:
    """All values that a type names, as the command line has them."""
    if get_origin(kind) is Literal:
        yield from map(shown, get_args(kind))
    else:
        for argument in get_args(kind):
            yield from literals(argument)


def shown(value: Any) -> str:
    """A value as the command line has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def missing(name: str, kind: Any) -> UserError:
    """The error for a key of an annotated type that is not there."""
    return UserError(f"{name}: missing; expected {describe(kind)}")


def check_value(value: Any, schema: type[Settings], key: str, name: str) -> None:
    """Refuses a value that a key cannot have.

    Args:
        value: The value.
        schema: The class that has the key.
        key: The key.
        name: What the error calls it.

    Raises:
        UserError: Names the key, the value, what was expected and the nearest choice.
    """
    if not fits(value, schema, key):
        kind = kinds(schema)[key]
        raise UserError(f"{name}={shown(value)}: expected {describe(kind)}{nearest(value, literals(kind))}")


def check_settings(given: Mapping[str, Any], schema: type[Settings], prefix: str, whole: bool = True) -> None:
    """Refuses plain settings with a key that a class does not have, without one, or with a value that it cannot have.

    Args:
        given: The settings; none of them is a group of keys.
        schema: The class.
        prefix: What stands before the keys in an error, with a dot at its end.
        whole: Whether all keys have to be there.

    Raises:
        UserError: Names the key with the prefix, its value, what was expected and the nearest choice.
    """
    for key, value in given.items():
        if key not in kinds(schema):
            hint = nearest(key, kinds(schema))
            raise UserError(f"{prefix}{key}: unknown key{hint}; {prefix[:-1]} has {', '.join(kinds(schema))}")
        check_value(value, schema, key, prefix + key)
    for key, kind in kinds(schema).items() if whole else ():
        if key not in given:
            raise missing(prefix + key, kind)


def settings_of(name: str) -> type[Method] | None:
    """A method's class of settings; None where it has none, such as a user's in a notebook."""
    return METHODS.get(name) or METHODS.get(name.partition("+")[0])


def complete(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options with the defaults of those that are not given.

    Args:
        name: The method's name; one that has no class of settings takes any options.
        options: As its constructor has them; a tuple is as good as a list.

    Raises:
        UserError: An option is unknown, its value is none that it may have, or some do not go together.
    """
    schema = settings_of(name)
    if schema is None:
        return dict(options)
    own = {key for key in kinds(schema) if key != "name" and key not in schema.cell_keys}
    found = {key: value for key, value in defaults(schema).items() if key in own}
    for key, value in options.items():
        if key not in own:
            listed = ", ".join(sorted(own)) or "none"
            raise UserError(f"method.{key}: unknown key for method {name}{nearest(key, own)}; it has {listed}")
        found[key] = as_lists(value)
        # Another method's settings are checked where that one is built.
        if not isinstance(value, Mapping):
            check_value(found[key], schema, key, f"method.{key}")
    schema.check(found)
    return found


def as_lists(value: Any) -> Any:
    """A value with lists in the place of tuples, as settings have them."""
    return [as_lists(item) for item in value] if isinstance(value, list | tuple) else value
