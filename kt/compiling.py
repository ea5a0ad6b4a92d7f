"""Passes through stages compiled by `torch.compile` (Inductor).

What is compiled are rows of a stage's modules, all of it where no function stands between them, as functions of these
modules: nothing is registered or replaced, and a row that comes again in the same shape is compiled once. Heads, losses
and updates are not compiled, nor is what cannot be: inputs of another shape than a row saw first (an epoch's last
batch, images of any size), rows with hooks, and passes whose gradients are differentiated or that run with other
parameters (`kt.hypergradient`). Evaluation never is.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from kt import ranks
from kt.clock import seconds
from kt.errors import UserError

AUTO = "auto"
# Of torch: 2.4 goes on with what it has compiled where a module has changed since (`track_running_stats`, for one).
OLDEST = "2.6"

# Of a trial: steps that are not timed, and steps that are.
WARM, TIMED = 3, 5
# What compiling can gain at best, as a share of a step, and takes at least, in seconds: a run too short for that does
# not try.
BEST, LEAST = 0.5, 20.0

# By what they run: modules, shape, gradients, device and backend. A function of its own has its own few variants.
_functions: dict[Any, Any] = {}
_current: ContextVar[Compiler | None] = ContextVar("compiler", default=None)


def run_steps(steps: Iterable[Any], x: Tensor) -> Tensor:
    """What steps of a network, modules or functions of a tensor, give one after the other."""
    compiler = _current.get()
    if compiler is None:
        return _through(steps, x)
    for group in _groups(steps):
        x = compiler.run(group, x)
    return x


def _through(steps: Iterable[Any], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _groups(steps: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """Modules in a row together, and functions between them alone."""
    for is_module, row in itertools.groupby(steps, lambda step: isinstance(step, nn.Module)):
        if is_module:
            yield tuple(row)
        else:
            yield from zip(row, strict=True)


def _hooked(modules: Iterable[nn.Module]) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for module in modules for kind in kinds)


@contextlib.contextmanager
def compiling(compiler: Compiler | None) -> Iterator[None]:
    """Within, stages run as a compiler has it, or as they are."""
    token = _current.set(compiler)
    try:
        yield
    finally:
        _current.reset(token)


def repays(eager: float, compiled: float, cost: float, left: int) -> bool:
    """Whether steps that are left gain the time back that compiling takes.

    Args:
        eager, compiled: Seconds of a step.
        cost: Seconds that compiling takes.
        left: How many steps.
    """
    return (eager - compiled) * left > cost


class Compiler:
    """Compiles the passes of a phase's steps, or none, or finds out.

    Finding out takes the phase's first steps, which count as all others: some as they are, and, where what is left
    could repay it (`BEST`, `LEAST`), some compiled. What is faster stays; where a pass forward cannot be compiled, all
    go on as they are.

    Args:
        choice: True, False or `auto`.
        device: Where the steps run.
        graphs: Whether a GPU replays passes as CUDA graphs (torch's `reduce-overhead`). A step that makes one pass and
            one update may, since every tensor of a pass gives way to the next step's.
        backend: Another one than Inductor, as torch takes it.

    Attributes:
        choice: As given, until it has been found out.
        found: Then what `auto` has found: `compiled`, whether steps are from now, the steps taken (`steps`), the
            milliseconds of one (`eager_ms`; where it was tried also `compiled_ms`, `seconds` of compiling and whether
            they are `repaid`), and `why` nothing can be compiled.

    Raises:
        UserError: Nothing can be compiled on this machine, and it was asked for.
    """

    def __init__(self, choice: bool | str, device: torch.device | str, graphs: bool = False, backend: Any = "inductor"):
        self.choice, self.device, self.backend = choice, torch.device(device), backend
        self.graphs = graphs and self.device.type == "cuda"
        self.found: dict[str, Any] | None = None
        self._shapes: dict[tuple[int, ...], torch.Size] = {}
        self._seconds: list[float] = []
        self._broken = ""  # why nothing is compiled any more
        if choice:  # torch says it of its own look at tensors
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
        if choice is True and (fault := self._fault()):
            raise UserError(
                f"compile=true: nothing can be compiled on this machine ({fault}); expected torch {OLDEST} or newer "
                "and a C++ compiler (g++), on a GPU also triton, or compile=false"
            )

    def settle(self, found: dict[str, Any]) -> None:
        """Takes over what has been found out."""
        self.choice, self.found = found["compiled"], found

    @contextlib.contextmanager
    def step(self, left: int) -> Iterator[None]:
        """One step within; `left` counts it and those behind it."""
        trying = self.choice == AUTO
        on = len(self._seconds) >= WARM + TIMED if trying else self.choice
        started = seconds(self.device) if trying else 0.0
        if not on:
            yield
        else:
            if self.graphs:
                torch.compiler.cudagraph_mark_step_begin()
            # Blocks let gradients be exchanged as they come, and graphs may have to stay for another pass backward.
            ddp, buffers = torch._dynamo.config, torch._functorch.config
            with ddp.patch(optimize_ddp=False), buffers.patch(donated_buffer=False), compiling(self):
                yield
        if trying:
            self._seconds.append(seconds(self.device) - started)
            self._judge(left - 1)

    def _fault(self) -> str | None:
        if torch.__version__ < OLDEST:
            return f"torch {torch.__version__}"
        return _fault(self.device.type) if self.backend == "inductor" else None

    def _judge(self, left: int) -> None:
        """Decides where enough steps have been timed; all processes as the first one does."""
        taken, tried = len(self._seconds), WARM + TIMED
        if taken not in (tried, 2 * tried):
            return
        plain = statistics.median(self._seconds[WARM:tried])
        found: dict[str, Any] = {"compiled": False, "steps": taken, "eager_ms": 1e3 * plain}
        if taken == tried:
            short = not repays(plain, (1 - BEST) * plain, LEAST, left)
            if fault := None if short else self._fault():
                found["why"] = fault
            settled = short or fault is not None
        else:
            settled = True
            faster = statistics.median(self._seconds[tried + WARM :])
            cost = sum(self._seconds[tried : tried + WARM]) - WARM * faster
            found |= {"compiled_ms": 1e3 * faster, "seconds": cost, "compiled": repays(plain, faster, 0.0, left)}
            found["repaid"] = repays(plain, faster, cost, left)
            if self._broken:
                found |= {"compiled": False, "repaid": False, "why": self._broken}
        if found := ranks.from_first(found if settled else None):
            self.settle(found)

    def run(self, steps: Sequence[Any], x: Tensor) -> Tensor:
        """Steps one after the other, compiled if they can be."""
        if not all(isinstance(step, nn.Module) for step in steps):
            return _through(steps, x)
        modules = [module for step in steps for module in step.modules()]
        shape = self._shapes.setdefault(tuple(map(id, steps)), x.shape)
        if len(modules) == 1 or shape != x.shape or _hooked(modules) or self._broken:
            return _through(steps, x)
        kind = (*map(type, modules), x.shape, torch.is_grad_enabled(), self.device, self.graphs, self.backend)
        if kind not in _functions:
            _functions[kind] = self._compiled(f"steps_{len(_functions)}")
        try:
            return _functions[kind](steps, x)
        except torch._dynamo.exc.TorchDynamoException as error:
            x = _through(steps, x)  # which tells a mistake of the steps' own in their words
            if self.choice is True and self.found is None:  # it was asked for
                raise
            self._broken = _reason(error)
            return x

    def _compiled(self, name: str) -> Any:
        """A compiled function from steps and their input; torch limits the variants of a code, so each has its own."""
        function = FunctionType(_through.__code__.replace(co_name=name), globals())
        if self.backend != "inductor":
            return torch.compile(function, backend=self.backend, dynamic=False)
        return torch.compile(function, dynamic=False, options=_options(self.graphs))


def _options(graphs: bool) -> dict[str, Any]:
    """Of Inductor: random numbers are those of passes that are not compiled, and no process stays behind."""
    return {"fallback_random": True, "compile_threads": 1, "triton.cudagraphs": graphs}


_faults: dict[str, str | None] = {}


def _fault(device: str) -> str | None:
    """Why nothing can be compiled for a kind of device, by an attempt; None if something can."""
    if device not in _faults:
        try:
            torch.compile(lambda x: x.exp() + 1, dynamic=False, options=_options(False))(torch.zeros(64, device=device))
            _faults[device] = None
        except Exception as error:  # whatever compilers, linkers and headers lack
            _faults[device] = _reason(error)
    return _faults[device]


def _reason(error: Exception) -> str:
    """An error in one line."""
    told = getattr(error, "inner_exception", None) or error.__cause__ or error
    return (str(told).strip().splitlines() or [type(told).__name__])[0]
