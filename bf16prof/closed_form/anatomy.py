"""What is known of a job's model: what this package has written down of it, or a signature that was
recorded from its own code."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from bf16prof.cases import Job
from bf16prof.closed_form.program import number_of
from bf16prof.errors import InputError, install_hint
from bf16prof.models.autograd.events import NO_LAYER, ParameterKey
from bf16prof.models.shapes import TIED_HEAD, NoInventory, ParameterSpec, inventory
from bf16prof.profiles.models import HuggingFaceSettings, Model, ModelSettings
from bf16prof.profiles.schema import Profile
from bf16prof.profiles.sizes import clash
from bf16prof.signatures import store
from bf16prof.signatures.inquiry import Inquiry, can_trace
from bf16prof.signatures.signature import Signature
from bf16prof.vocabulary import Device


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A model by its parameters, in its order; one object for equal models, so that what follows
    from it can be remembered.

    `signature`: what was recorded; else the model is one that is written down (`models.tapes`).
    """

    parameters: Sequence[ParameterSpec]
    signature: Signature | None = None

    @functools.cached_property
    def keys(self) -> list[ParameterKey]:
        """What the events call each parameter."""
        return [self.key(each.name) for each in self.parameters]

    @functools.cached_property
    def numels(self) -> dict[ParameterKey, int]:
        """The elements of every parameter."""
        return {key: each.numel for key, each in zip(self.keys, self.parameters, strict=True)}

    @functools.cached_property
    def trained(self) -> dict[ParameterKey, int]:
        """The elements of every parameter that is trained."""
        return {key: each.numel for key, each in zip(self.keys, self.parameters, strict=True) if each.trainable}

    @functools.cached_property
    def number(self) -> int:
        """A number for what ZeRO-3's hooks know of it: the same for equal parameters and modules,
        at any batch and length."""
        modules = None if self.signature is None else self.signature.modules
        return number_of((tuple(self.parameters), modules))

    def key(self, name: str) -> ParameterKey:
        """What the events call a parameter or a module."""
        return ParameterKey(NO_LAYER, name) if self.signature is not None else ParameterKey.of(name)


def anatomy_of(job: Job) -> Anatomy:
    """The subject of a job. A signature is asked for where the passes of its model are not written
    down: on CPU ranks, and of all models but our own families'.

    Raises `NoInventory` where nothing is known, saying why; `InputError` where that is because of
    two sizes of a configuration.
    """
    written, unknown = None, "only the code that builds this model knows its parameters"
    try:
        written = _written(job.profile.model) if not job.profile.model.inputs and is_as_written(job.profile) else None
    except NoInventory as error:
        unknown = error.message
    if written is not None and not _asks(job):
        return written
    if job.profile.is_for_megatron:  # nothing is recorded for it: of it the steady state alone has a closed form
        why = unknown if is_as_written(job.profile) else "what such a pass leaves is not written down"
        raise NoInventory(f"{why}: with megatron-core that is left to the dry run")
    inquiry = Inquiry.of(job)
    if (signature := store.find(inquiry)) is not None:
        _require_no_clash(job.profile.model, signature.problem)
        _COUNTS[_counted(job.profile)] = sum(each.numel for each in signature.parameters)
        return _recorded(signature)
    if written is not None:
        return written
    _require_no_clash(job.profile.model, store.problem(inquiry))
    raise NoInventory(store.problem(inquiry) or f"{unknown}; {why_not_recorded(job)}")


def _require_no_clash(model: Model, problem: str | None) -> None:
    """Raise `InputError` for two sizes that clash, where the model of such a configuration could
    not be built or run."""
    if problem and isinstance(model, HuggingFaceSettings) and (found := clash(model.hf_config)):
        raise InputError(f"{found}: {problem}")


_COUNTS: dict[tuple[Model, str], int] = {}


def parameter_count(profile: Profile) -> int:
    """Elements of a profile's parameters, of which a job has been looked at. Raises
    `NoInventory`."""
    known = _COUNTS.get(_counted(profile))
    return known if known is not None else sum(each.numel for each in inventory(profile.model))


def _counted(profile: Profile) -> tuple[Model, str]:
    return profile.model, repr(profile.peft)


def why_not_recorded(job: Job) -> str:
    """Why nobody has run a model's own code, which would tell all of it."""
    if can_trace(job.profile.model):
        return "its code was not run to find out (--no-trace)"
    extra = "train,hf" if isinstance(job.profile.model, HuggingFaceSettings) else "train"
    return f"to record it: {install_hint(extra)}"


def without_rule(job: Job) -> str | None:
    """Why nothing of a job is predicted, whatever is known of its model; `None` of most."""
    case, profile = job.case, job.profile
    workload = profile.workload
    left = (
        (case.tensor_parallel > 1, "how AutoTP (--tp) cuts each layer, by the model's own plan,"),
        (case.pipeline_parallel > 1, "what each stage of a pipeline (--pp) holds"),
        (case.expert_parallel > 1, "what ranks with experts of their own (--ep) hold"),
        (workload.dpo != "none", "preference optimization (--dpo)"),
        (workload.reward, "a reward model (--reward)"),
        (workload.fused_loss != "none", f"a loss that is computed with its head (--fused-loss {workload.fused_loss})"),
        (profile.quantization is not None, "a 4-bit base (--load-in-4bit)"),
        (profile.deepspeed.zero_optimization.offload_optimizer.device == "nvme", "an optimizer on NVMe (offload_optimizer.device)"),
        (workload.tiled_mlp, "DeepSpeed's TiledMLP (workload.tiled_mlp)"),
    )
    return next((f"{what} is left to the dry run" for is_asked, what in left if is_asked), None)


def inquiries_of(jobs: Sequence[Job]) -> list[Inquiry]:
    """What has to be recorded for these jobs, each once."""
    asking = [job for job in jobs if without_rule(job) is None and _asks(job)]
    return list({inquiry.digest: inquiry for inquiry in map(Inquiry.of, asking)}.values())


def is_as_written(profile: Profile) -> bool:
    """Whether a profile trains its model as this package knows it: all of its parameters, by its
    own operators, and checkpointed in the usual way or not at all."""
    workload = profile.workload
    is_usual = not workload.use_reentrant and workload.checkpoint_every_n_layers == 1
    is_plain = profile.peft is None and workload.liger == "none" and not workload.packed_sequences
    return is_plain and (is_usual or not workload.activation_checkpointing)


def is_written(profile: Profile) -> bool:
    """Whether the passes of what a profile trains are written down (`models.tapes`): those of our
    own families are."""
    return isinstance(profile.model, ModelSettings) and not profile.model.inputs and is_as_written(profile)


def is_of_a_header(model: Model) -> bool:
    """Whether all that is known of a model are the parameters that a checkpoint lists."""
    return isinstance(model, HuggingFaceSettings) and model.safetensors is not None


def _asks(job: Job) -> bool:
    """Whether the passes of the job's model are those of a signature."""
    model = job.profile.model
    if job.profile.is_for_megatron:  # of which only the steady state has a closed form
        return False
    if is_of_a_header(model) and job.device is not Device.CPU and not model.inputs and is_as_written(job.profile):
        return False
    return job.device is Device.CPU or not is_written(job.profile)


@functools.lru_cache(maxsize=64)
def _written(model: Model) -> Anatomy:
    return Anatomy(inventory(model))


@functools.lru_cache(maxsize=64)
def _recorded(signature: Signature) -> Anatomy:
    return Anatomy(signature.parameters, signature)


def other_names(spec: ParameterSpec) -> Sequence[str]:
    """The names that a shared parameter has besides its own."""
    return spec.also or ((f"{TIED_HEAD}.weight",) if spec.tied else ())
