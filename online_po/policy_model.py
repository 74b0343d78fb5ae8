"""The policy as a torch model: loading, LoRA, FSDP2, and its weights as a plain dict of tensors.

Whole weights live on rank 0 only for as long as they are read or written; `gather` and `spread` move
them between rank 0 and the shards. With one rank both are plain copies.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from online_po.adapters import ADAPTER_FILE, adapter_config, require_known_layers
from online_po.errors import ConfigError
from online_po.logps import LogpModel
from online_po.model_config import own_code, read_model_config
from online_po.sections import LoraConfig, ModelConfig
from online_po.seeds import stable_seed
from online_po.tensor_file import write_tensors

# -- loading ---------------------------------------------------------------------------------------

_LOADING = threading.Lock()
"""transformers changes what holds for the whole process while it loads: two at once lose tied weights."""


def load_causal_lm(config: ModelConfig, dtype: torch.dtype, setting: str = "model.path") -> PreTrainedModel:
    """The model of a folder or hub id, on the CPU, dropout off. Raises ConfigError, naming `setting`, if there is
    none."""
    settings = read_model_config(config.path, config.path, config.revision, setting)
    with _LOADING, _quiet(), _explained(config, setting):
        model, info = AutoModelForCausalLM.from_pretrained(
            config.path,
            revision=config.revision,
            config=settings,
            dtype=dtype,
            attn_implementation=config.attention,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ConfigError(
            f"{setting} is {config.path!r}, whose weight files lack {missing}; give a complete causal language model"
        )
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        # Many published models set sampling fields without do_sample; such a file loads, but is refused on saving.
        model.generation_config.do_sample = True
    return model.eval()


def empty_causal_lm(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The same model with memory reserved but never touched, for ranks that are sent their shards."""
    settings = read_model_config(config.path, config.path, config.revision)
    with _explained(config), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            settings, dtype=dtype, attn_implementation=config.attention, trust_remote_code=False
        )
    model.to_empty(device="cpu")
    model.tie_weights()
    return model.eval()


@contextmanager
def _explained(config: ModelConfig, setting: str = "model.path") -> Iterator[None]:
    """Turns what transformers raises on an unusable model into a ConfigError."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        if remedy := own_code(config.path, error, setting):
            raise ConfigError(remedy) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "attn" in reason or "attention" in reason.lower():
            raise ConfigError(
                f"model.attention is {config.attention!r}, which {config.path!r} cannot use here: {reason}; use sdpa "
                "or eager"
            ) from error
        remedy = "it must be a folder or hub id of a causal language model with config.json and weights"
        raise ConfigError(f"{setting} is {config.path!r}, which cannot be loaded: {remedy}. {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for loading weights or writing them."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def add_adapters(model: PreTrainedModel, lora: LoraConfig, path: str, seed: int) -> PeftModel:
    """Freezes the model and puts LoRA adapters on it, initialised from `seed` alone (B is zero: no effect yet).

    Adapters are float32 whatever the model is. Raises ConfigError if no module has the wanted names, or one of them
    is of a kind whose adapter cannot be exchanged.
    """
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = PeftLoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=path,
        r=lora.rank,
        lora_alpha=lora.alpha,  # PEFT divides it by the rank: a float serves
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(seed, "lora"))
        try:
            adapted = get_peft_model(model, settings)
        except ValueError as error:
            raise ConfigError(
                f"learner.lora.target_modules is {targets!r}, which does not fit {type(model).__name__}: {error}"
            ) from error
    assert isinstance(adapted, PeftModel)
    require_known_layers(adapted, targets)
    return adapted.eval()


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's repeated blocks: the units of sharding and of gradient checkpointing.

    Those the model names itself, or else its longest list of modules that is not inside another (experts of a layer
    are). Empty where there is none.
    """
    names = set(model._no_split_modules or ())
    named = [module for module in model.modules() if type(module).__name__ in names]
    return named or max(_outer_lists(model), key=len, default=[])


def _outer_lists(module: nn.Module) -> Iterator[list[nn.Module]]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield list(child)
        else:
            yield from _outer_lists(child)


def checkpoint_activations(layers: list[nn.Module]) -> None:
    """Recomputes each layer in backward instead of keeping its activations.

    transformers' own switch works only in training mode, where dropout would come alive."""
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def keep_activations(layers: list[nn.Module]) -> None:
    """Undoes `checkpoint_activations`."""
    for layer in layers:
        del layer.forward


@contextmanager
def lora_dropout(model: nn.Module, seed: int) -> Iterator[None]:
    """LoRA's dropout is on inside the block, drawn from `seed` alone; the model's own stays off."""
    dropouts = [m for name, m in model.named_modules() if isinstance(m, nn.Dropout) and ".lora_dropout." in name]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for dropout in dropouts:
            dropout.train()
        try:
            yield
        finally:
            for dropout in dropouts:
                dropout.eval()


# -- shards ----------------------------------------------------------------------------------------


def shard(
    scorer: LogpModel,
    layers: list[nn.Module],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    from_rank_0: dict[str, Tensor] | None,
) -> None:
    """FSDP2 over all ranks, layer by layer and then the rest; every rank gets its part of rank 0's weights.

    `from_rank_0`: on rank 0 all tensors of `scorer` by name, else None.
    """
    precision = MixedPrecisionPolicy()
    if compute_dtype != torch.float32:
        precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for module in [*layers, scorer]:
        fully_shard(module, mesh=mesh, mp_policy=precision)
        assert isinstance(module, FSDPModule)
        # Gradients are summed, not averaged: losses are divided by the global number of pairs already.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    scorer.to(torch.device(mesh.device_type))  # buffers; parameters are there
    for name, parameter in scorer.named_parameters():
        spread(from_rank_0[name] if from_rank_0 is not None else None, parameter)
    for name, buffer in scorer.named_buffers():
        spread(from_rank_0[name] if from_rank_0 is not None else None, buffer)


def is_rank_0() -> bool:
    """True on the rank that reads and writes, and where there is only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(tensor: Tensor, copy: bool = False) -> Tensor:
    """The whole tensor on rank 0's CPU; empty elsewhere. All ranks must call it. `copy`: what is written to `tensor`
    later never shows in it; else it may be `tensor` itself."""
    tensor = tensor.detach()
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.to("cpu", copy=copy) if is_rank_0() else torch.empty(0)


@torch.no_grad()
def spread(whole: Tensor | None, into: Tensor) -> None:
    """Writes rank 0's `whole` into every rank's part of `into`; all ranks must call it. What the others pass is
    not looked at."""
    if not dist.is_initialized():
        assert whole is not None
        into.copy_(whole)
        return
    if whole is None or not is_rank_0():
        whole = torch.empty(into.shape, dtype=into.dtype, device=into.device)
    whole = whole.to(into.device, into.dtype).contiguous()
    if isinstance(into, DTensor):
        local(into).copy_(local(distribute_tensor(whole, into.device_mesh, into.placements)))
    else:
        dist.broadcast(whole, 0)
        into.copy_(whole)


def replicate(whole: dict[str, Tensor] | None, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rank 0's tensors, of shapes that only it knows, on every rank; all ranks must call it. What the others pass is
    not looked at."""
    if not dist.is_initialized():
        assert whole is not None
        return {name: tensor.to(device, dtype) for name, tensor in whole.items()}
    shapes = [{name: tensor.shape for name, tensor in whole.items()} if whole is not None and is_rank_0() else None]
    dist.broadcast_object_list(shapes, 0)
    assert shapes[0] is not None
    found = {}
    for name, shape in shapes[0].items():
        tensor = torch.empty(shape, device=device, dtype=dtype)
        if is_rank_0() and whole is not None:
            tensor.copy_(whole[name])
        dist.broadcast(tensor, 0)
        found[name] = tensor
    return found


# -- weights in folders ----------------------------------------------------------------------------


def policy_tensors(model: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """What makes the policy, by the name it has in the policy's folder: all weights once (tied ones under their
    first name) and saved buffers, or the adapters'. The tensors are the model's own."""
    if isinstance(model, PeftModel):
        return {
            name.replace(".default", ""): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
    parameters = dict(model.named_parameters())
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = dict(model.named_buffers())
    saved = [name for name in model.state_dict() if name not in every]
    return parameters | {name: buffers[name] for name in saved}


def stored_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """The shape of each tensor in a model's safetensors files, by its name there. transformers renames and merges some
    as it reads them, experts' say, and takes that back as it writes."""
    index = Path(config.path) / SAFE_WEIGHTS_INDEX_NAME
    files = {SAFE_WEIGHTS_NAME}
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    shapes: dict[str, list[int]] = {}
    for file in (Path(config.path) / name for name in sorted(files)):
        if not file.is_file():  # a model in another format, whose names are not looked at
            return {}
        with safe_open(file, "pt") as stored:
            shapes |= {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    return shapes


def saved_as_named(model: PreTrainedModel, start: ModelConfig) -> bool:
    """Whether `policy_tensors` have the same names and shapes in a policy's folder, as the starting model's files tell:
    only those names are known to engines."""
    shapes = stored_shapes(start)
    return all(shapes.get(name) == list(tensor.shape) for name, tensor in policy_tensors(model).items())


def read_policy(path: Path, config: ModelConfig, dtype: torch.dtype, is_adapter: bool) -> dict[str, Tensor]:
    """`policy_tensors` of a policy folder, on the CPU."""
    if is_adapter:
        return load_file(path / ADAPTER_FILE)
    source = config
    if str(path) != config.path:  # a revision is the starting model's
        source = config.model_copy(update={"path": str(path), "revision": None})
    return {name: tensor.detach() for name, tensor in policy_tensors(load_causal_lm(source, dtype)).items()}


def write_policy(
    path: Path,
    model: PreTrainedModel | PeftModel,
    tensors: dict[str, Tensor],
    as_named: bool = False,
    tick: Callable[[], None] = lambda: None,
    direct: bool = False,
) -> dict[str, str]:
    """Writes a folder that transformers and vLLM load: the whole model, or a PEFT adapter (of any rank). `tensors` as
    `policy_tensors` names them, whole, on the CPU. Returns the SHA-256 of files that it hashed, by name.

    `as_named`: the model is `saved_as_named`, so that its tensors can be written as they are, without transformers.
    `direct`: past the page cache, where nobody is to read them soon."""
    path.mkdir(parents=True, exist_ok=True)
    if not isinstance(model, PeftModel):
        with _quiet():
            model.save_pretrained(path, state_dict={} if as_named else dict(tensors))
        if not as_named:
            return {}
        return {SAFE_WEIGHTS_NAME: write_tensors(path / SAFE_WEIGHTS_NAME, tensors, tick, {"format": "pt"}, direct)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / ADAPTER_FILE, {"format": "pt"})
    adapter_config(model, tensors).save_pretrained(str(path))
    return {}


@torch.no_grad()
def blend_weights(own: dict[str, Tensor], into: dict[str, Tensor], alpha: float) -> None:
    """into <- alpha * own + (1 - alpha) * into, in float32 and one tensor at a time. Saved buffers that are no floating
    point numbers (counters, say) become the own ones."""
    for name, tensor in into.items():
        mean = own[name]
        if tensor.is_floating_point():
            mean = alpha * own[name].float() + (1 - alpha) * tensor.float()
        tensor.copy_(mean)
