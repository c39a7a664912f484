"""Records one signature: builds the model of a job as ranks do, and runs a micro-batch through it
twice in the dry run's world.

The first pass makes what a model makes once (caches, masks), the second is recorded. One trace per
process, as with dry runs.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils import checkpoint

from bf16prof.cases import Job
from bf16prof.dry_run.flash import flash_attention
from bf16prof.dry_run.hardware.cuda_operators.scratch import kernel_call
from bf16prof.dry_run.shims import library_shims
from bf16prof.dry_run.tracker import GPU, HOST, Tracker, scratch_label
from bf16prof.dry_run.versions import installed
from bf16prof.dry_run.world import world
from bf16prof.engine.batch import batch_spec
from bf16prof.engine.config import deepspeed_config, engine_facts, zero_settings
from bf16prof.engine.labels import CUBLAS_WORKSPACES
from bf16prof.engine.training import TORCH_DTYPES, Batch, TrainingLoop, named_tensors
from bf16prof.errors import Bf16profError
from bf16prof.kernels import scratch_bytes
from bf16prof.models.adapted import import_peft
from bf16prof.models.autograd.events import LOSS, NO_LAYER, Event, ParameterKey, local_variable
from bf16prof.models.foreign import keeps_arange
from bf16prof.models.liger import import_liger
from bf16prof.models.modules import build_trained
from bf16prof.models.shapes import ParameterSpec
from bf16prof.profiles.gpus import Gpu
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.reductions import processor_of
from bf16prof.signatures.inquiry import about
from bf16prof.signatures.signature import HeldTensor, Signature
from bf16prof.tracing.hooks import Hooks
from bf16prof.tracing.products import operations, part
from bf16prof.tracing.recorder import Recorder
from bf16prof.vocabulary import Phase

CASTABLE = (torch.float32, torch.float16, torch.bfloat16)
"""What DeepSpeed casts (`runtime/engine.py`, CASTABLE_DTYPES)."""


def trace(job: Job, on_progress: Callable[[str], None] = lambda _: None) -> Signature:
    """The signature of the job's model on the job's micro-batch. Raises `InputError` for a model
    that cannot be built."""
    warnings.simplefilter("ignore")
    import_peft(job.profile.peft)
    import_liger(job.profile.workload.liger)
    with flash_attention(job), world(job.case.world_size, job.gpu, counts_blocks=False) as tracker:
        return _Trace(job, tracker, on_progress).run()


class _Trace:
    def __init__(self, job: Job, tracker: Tracker, on_progress: Callable[[str], None]) -> None:
        self._job, self._tracker, self._ledger, self._say = job, tracker, tracker.ledger, on_progress
        self._home = HOST if job.gpu is None else GPU
        self._config = deepspeed_config(job)
        self._facts = engine_facts(self._config)
        self._recorder = Recorder(tracker)

    def run(self) -> Signature:
        self._ledger.mark(Phase.INIT)
        gc.freeze()
        model, building = self._built()
        parameters = tuple(_parameters(model))
        hooks = self._hooked(model)
        engine = Bare(model, self._recorder, tracker=self._tracker, hooks=hooks, gpu=self._job.gpu)
        events: list[Event] = []
        problem = ""
        try:
            events = self._passes(engine)
        except Bf16profError as error:
            problem = error.message
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            problem = f"what the model's code does depends on values, which only a real run has ({error.func})"
        return Signature(
            parameters=parameters,
            held=tuple(self._held(model)),
            modules=hooks.modules() if hooks else (),
            outputs=engine.outputs,
            loss_bytes=engine.loss_bytes,
            events=tuple(events),
            building=building,
            problem=problem,
            versions=installed([self._job]),
            about=about(self._job),
            calls=self._recorder.calls,
            silent=tuple(self._recorder.silent),
        )

    def _built(self) -> tuple[nn.Module, tuple[int, int]]:
        """The model on its device in its dtype, and how high memory went on CPU ranks until it
        was."""
        self._say("building the model")
        torch.manual_seed(self._job.profile.workload.seed)
        self._ledger.take_phase_peak()
        dtype = TORCH_DTYPES.get(self._facts.parameter_dtype, torch.float32)
        with _as_in_zero_init(self._job, dtype):
            model = build_trained(self._job.profile)
        for parameter in model.parameters():
            if parameter.dtype in CASTABLE:
                parameter.data = parameter.data.to(dtype)
        model.to(self._home)
        gc.collect()
        return model, (self._ledger.take_phase_peak(), self._ledger.allocated_bytes())

    def _hooked(self, model: nn.Module) -> Hooks | None:
        """ZeRO-3's hooks, where the job has them."""
        if self._job.case.zero_stage != 3:
            return None
        from deepspeed.runtime.zero.linear import zero3_linear_wrap

        _mark_leaves(model)
        if zero_settings(self._config).memory_efficient_linear:
            nn.functional.linear = zero3_linear_wrap
        # A checkpoint compares what it saved, by shape. Here a parameter that is not trained has
        # already been dropped by then, and comes back when its module is entered; the engine keeps
        # those that are used again soon.
        checkpoint._allowed_determinism_checks_to_fns["default"] = checkpoint._allowed_determinism_checks_to_fns["none"]
        return Hooks(model, self._recorder, self._home)

    def _passes(self, engine: Bare) -> list[Event]:
        loop = TrainingLoop(engine, self._job, self._batches())
        try:
            with library_shims(packed=self._job.profile.workload.packed_sequences > 0):
                self._run(loop)
                self._say("recording")
                engine.begin_recording(keeps_outputs=self._job.profile.workload.keeps_outputs)
                self._run(loop)
        finally:
            loop.outputs = loop.loss = None
            loop.batches.clear()
        return engine.events

    def _run(self, loop: TrainingLoop) -> None:
        self._ledger.mark(Phase.FORWARD)
        loop.step()

    def _batches(self) -> Callable[[], Batch]:
        spec = batch_spec(self._job)

        def batch() -> Batch:
            with self._recorder.aside():  # it is the loop's
                return {name: torch.empty(each.shape, dtype=getattr(torch, each.dtype), device=self._home) for name, each in spec.items()}

        return batch

    def _held(self, model: nn.Module) -> Iterator[HeldTensor]:
        """Storages on the device that are no parameters and stay when a step is over: buffers, and
        what no module has registered."""
        gc.collect()
        known = {self._tracker.index_of(parameter) for parameter in model.parameters()}
        for name, buffer in model.named_buffers():
            index = self._tracker.index_of(buffer)
            if index is not None and index not in known:
                known.add(index)
                yield HeldTensor(name, self._ledger.allocations[index].bytes, is_registered=True)
        self._ledger.now()  # what is gone is entered
        for each in self._ledger.live():
            if each.index not in known and each.bytes and each.label != CUBLAS_WORKSPACES:
                yield HeldTensor(each.label[1], each.bytes, is_registered=False)


class Bare:
    """What the training loop takes for an engine: the model and autograd, and nothing of DeepSpeed
    but its hooks."""

    def __init__(self, model: nn.Module, recorder: Recorder, *, tracker: Tracker, hooks: Hooks | None, gpu: Gpu | None) -> None:
        self.module, self.device = model, HOST if gpu is None else GPU
        self._processor = None if gpu is None else processor_of(gpu)
        self._recorder, self._tracker, self._hooks = recorder, tracker, hooks
        self.outputs: tuple[tuple[str, int], ...] = ()
        self.loss_bytes = 0
        self.events: list[Event] = []
        self._keeps_outputs = False
        self._late: dict[int, list[tuple[Tensor, int]]] = {}
        self._order = {id(parameter): ParameterKey(NO_LAYER, name) for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._has_gradient)  # type: ignore[no-untyped-call]
        for leaf in hooks.leaves() if hooks else ():
            leaf.register_full_backward_hook(lambda module, *_: self._release_gradients(module))

    def begin_recording(self, *, keeps_outputs: bool) -> None:
        """The next pass is the one."""
        self._keeps_outputs = keeps_outputs
        if self._hooks:
            self._hooks.start()
        self._recorder.start()
        self._tracker.watch = self._see

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass; what the loop keeps of what comes out is its own from now on."""
        outputs = self.module(*args, **kwargs)
        if self._keeps_outputs:
            kept = {name: tensor for name, tensor in named_tensors(outputs).items() if name != "loss"}
            labelled = [(name.replace("_", " "), tensor) for name, tensor in kept.items()]
            sizes = [(name, self._recorder.keep(tensor, local_variable(name))) for name, tensor in labelled]
            self.outputs = tuple((name, size) for name, size in sizes if size)
        self._recorder.mark("logits")
        return outputs

    def backward(self, loss: Tensor) -> None:
        """The backward pass, from a loss that the loop holds."""
        self.loss_bytes = self._recorder.keep(loss, LOSS)
        self._recorder.mark("loss")
        self._recorder.mark("backward")
        self._tracker.ledger.mark(Phase.BACKWARD)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._hooks and self._tracker.watch:
            self._hooks.empty()
        self._tracker.watch = None
        self.events = self._recorder.events()

    def step(self) -> None:
        """Nothing is updated."""

    def _see(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if self._processor is not None and (call := kernel_call(func, args, kwargs)) is not None:
            self._recorder.explain(call, scratch_label(func), has_scratch=scratch_bytes(call, self._processor) > 0)
        if count := operations(func, args, kwargs, out):
            self._recorder.mark("compute", part(), count)

    def _has_gradient(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None, "autograd calls this when it is there"
        size = self._recorder.give_away(gradient)
        parameter.grad = None
        leaf = self._hooks.leaf_of(parameter) if self._hooks else None
        if leaf is not None:
            self._late.setdefault(id(leaf), []).append((parameter, size))
        else:
            self._recorder.mark("gradient", self._order[id(parameter)], size)

    def _release_gradients(self, leaf: nn.Module) -> None:
        """`reduce_leaf_module_grads` (zero/stage3.py): in the model's order, with zeros for
        parameters that had no part in it."""
        known = {id(parameter): size for parameter, size in self._late.pop(id(leaf), ())}
        for parameter in leaf.parameters():
            if parameter.requires_grad:
                size = known.get(id(parameter)) or self._recorder.give_away(torch.zeros_like(parameter))
                self._recorder.mark("gradient", self._order[id(parameter)], size)


CONSTRUCTORS = ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "randn")
"""What `zero.Init` has wrapped (zero/partition_parameters.py, _add_tensor_creation_wrappers)."""


@contextmanager
def _as_in_zero_init(job: Job, dtype: torch.dtype) -> Iterator[None]:
    """Inside, floating-point tensors are made in that dtype where the job has `zero.Init`: buffers
    of ones are the parameters' then.

    What DeepSpeed's own wrapper does, which transformers changes for its rotary positions.
    """
    if not job.is_inside_zero_init:
        yield
        return
    from deepspeed.runtime.zero import partition_parameters as partitioning

    with contextlib.ExitStack() as stack:
        if isinstance(job.profile.model, HuggingFaceSettings):
            stack.enter_context(keeps_arange())
        for name in CONSTRUCTORS:
            plain = getattr(partitioning, f"_orig_torch_{name}")
            wrapped = partitioning.zero_wrapper_for_fp_tensor_constructor(plain, target_fp_dtype=dtype, target_device=None)
            stack.enter_context(mock.patch.object(torch, name, wrapped))
        yield


def _mark_leaves(model: nn.Module) -> None:
    """The modules that this DeepSpeed takes as leaves by default (`runtime/engine.py`,
    _configure_distributed_model)."""
    try:
        from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
        from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config
    except ImportError:  # before 0.18.4 there were none
        return
    apply_zero_leaf_module_config(model, DeepSpeedZeroLeafModuleConfig())


def _parameters(model: nn.Module) -> Iterator[ParameterSpec]:
    """Every parameter once, in the model's order, with all of its names."""
    names: dict[int, list[tuple[str, str]]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{module_name}.{name}" if module_name else name
                names.setdefault(id(parameter), []).append((full, type(module).__name__))
    for parameter in model.parameters():
        (name, layer), *others = names[id(parameter)]
        tied = others[0][1] if others else ""
        yield ParameterSpec(name, tuple(parameter.shape), layer, tied, tuple(other for other, _ in others), parameter.requires_grad)
