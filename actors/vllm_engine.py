"""vLLM as a sampling engine, in the process that calls it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actors.engines import LORA_RANKS
from online_po.errors import EngineError
from online_po.sections import GeneratorConfig, SamplingConfig
from online_po.types import FinishReason, Group, Policy, Request, Response

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import RequestOutput, SamplingParams

GIB = 1 << 30
ADAPTER_ID = 1
FINISH_REASONS: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}


class VllmEngine:
    """One vLLM engine. Every chunk runs alone, so its content is a function of its requests and the weights.

    The text of a response is always the decoding of its token ids. A stop string ends a response behind the
    token that completes it, and is part of both.

    `max_model_len`: prompt plus response tokens to allocate for. `lora_rank`: rank of the adapters that will be loaded,
    held as `GeneratorConfig.lora` says; None where policies are full weights. Raises EngineError if vLLM cannot start.
    """

    def __init__(self, path: str, config: GeneratorConfig, *, max_model_len: int, lora_rank: int | None) -> None:
        import vllm
        from vllm.platforms import current_platform

        self._on_cpu: bool = current_platform.is_cpu()
        settings = engine_settings(path, config, max_model_len)
        self._merges: bool = config.merges(self._on_cpu)
        if lora_rank is not None and not self._merges:
            allowed = [rank for rank in LORA_RANKS if rank >= lora_rank]
            if not allowed:
                raise EngineError(
                    f"learner.lora.rank is {lora_rank}, but vLLM takes {LORA_RANKS[-1]} at most; lower it, or set "
                    "generator.lora: merged"
                )
            settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": allowed[0]}
        try:
            self._llm = vllm.LLM(path, **settings)
        except Exception as error:  # vLLM raises many types here; each means the same to the user
            raise EngineError(_explain(error, config, self._on_cpu)) from error
        self._start_path = path
        self._weights_path = path
        self._adapter: Any = None
        self._tokenizer = self._llm.get_tokenizer()
        self.dtype = str(self._llm.llm_engine.model_config.dtype).removeprefix("torch.")
        self.version = 0

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig) -> Iterator[dict[int, Group]]:
        """All responses to one chunk: {place among `requests`: group} as groups finish; {} after other steps."""
        from vllm.inputs import tokens_input

        self._reset_cache()
        engine = self._llm.llm_engine
        samples = [(place, i) for place, request in enumerate(requests) for i in range(len(request.seeds))]
        made: list[dict[int, Response]] = [{} for _ in requests]
        unfinished: set[str] = set()
        try:
            for number, (place, i) in enumerate(samples):
                prompt = tokens_input(list(requests[place].prompt.token_ids))
                params = sampling_params(sampling, requests[place].seeds[i])
                engine.add_request(str(number), prompt, params, lora_request=self._adapter)
                unfinished.add(str(number))
            while unfinished:
                finished: dict[int, Group] = {}
                for output in engine.step():
                    place, i = samples[int(output.request_id)]
                    unfinished.remove(output.request_id)
                    made[place][i] = self._response(i, requests[place].seeds[i], output)
                    if len(made[place]) == len(requests[place].seeds):
                        responses = tuple(response for _, response in sorted(made[place].items()))
                        finished[place] = Group(prompt=requests[place].prompt, responses=responses)
                yield finished
        finally:  # a caller that leaves early, or an error: the next chunk runs alone
            engine.abort_request(list(unfinished))

    def _response(self, index: int, seed: int, output: RequestOutput) -> Response:
        sample = output.outputs[0]
        if sample.finish_reason not in FINISH_REASONS or sample.logprobs is None:
            raise EngineError(f"vLLM ended a request with finish reason {sample.finish_reason!r}")
        token_ids = tuple(sample.token_ids)
        return Response(
            index=index,
            text=self._tokenizer.decode(list(token_ids), skip_special_tokens=True),
            token_ids=token_ids,
            token_logps=tuple(step[token].logprob for step, token in zip(sample.logprobs, token_ids, strict=True)),
            finish_reason=FINISH_REASONS[sample.finish_reason],
            policy_version=self.version,
            seed=seed,
        )

    def load(self, policy: Policy, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Takes a policy's weights and forgets what was computed under the old ones."""
        if tensors is not None:
            self._llm.collective_rpc("load_tensors", args=(tensors,))
            self._weights_path = str(policy.path)
        elif policy.is_adapter and not self._merges:
            self._load_adapter(policy)
        elif policy.is_adapter:
            self._llm.collective_rpc("load_merged", args=(str(policy.path),))
            self._weights_path = str(policy.path)
        else:
            self._adapter = None
            # Beside adapters version 0 is the base model, which never changed.
            if str(policy.path) != self._start_path or self._weights_path != self._start_path:
                self._llm.collective_rpc("load_policy", args=(str(policy.path),))
                self._weights_path = str(policy.path)
        self.version = policy.version
        self._reset_cache()

    def _load_adapter(self, policy: Policy) -> None:
        from vllm.lora.request import LoRARequest

        name, path = f"policy-{policy.version}", str(policy.path)
        # In place once, here; a request that said so too would read the file again at every step.
        self._llm.llm_engine.add_lora(LoRARequest(name, ADAPTER_ID, path, load_inplace=True))
        self._adapter = LoRARequest(name, ADAPTER_ID, path)

    def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        """(T,) token ids -> (T - 1,) logps in nats of token_ids[1:], each given all tokens before it."""
        from vllm import SamplingParams

        self._reset_cache()
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompt: Any = {"prompt_token_ids": list(token_ids)}
        (output,) = self._llm.generate(prompt, params, use_tqdm=False, lora_request=self._adapter)
        assert output.prompt_logprobs is not None
        steps = zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)
        return [step[token].logprob for step, token in steps if step is not None]

    def _reset_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM did not drop its prefix cache: a request is still running")

    def close(self) -> None:
        """Ends the engine and its worker processes."""
        self._llm.llm_engine.engine_core.shutdown()


def engine_settings(path: str, config: GeneratorConfig, max_model_len: int) -> dict[str, Any]:
    """What vLLM is started with, beside adapters."""
    from vllm.platforms import current_platform

    on_cpu: bool = current_platform.is_cpu()
    dtype: str = config.dtype
    if dtype == "auto":
        # GPUs before Ampere have no bfloat16.
        on_gpu = "bfloat16" if current_platform.has_device_capability(80) else "float16"
        dtype = "float32" if on_cpu else on_gpu
    settings: dict[str, Any] = {
        "dtype": dtype,
        "tensor_parallel_size": config.tensor_parallel,
        "distributed_executor_backend": "uni" if config.tensor_parallel == 1 else "mp",
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "enforce_eager": on_cpu if config.enforce_eager is None else config.enforce_eager,
        "logprobs_mode": "raw_logprobs",
        # Samples of one prompt share its prefill; the cache is emptied between chunks.
        "enable_prefix_caching": True,
        "worker_extension_cls": "actors.weight_sync.WeightSync",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if on_cpu:
        settings |= {
            "kv_cache_memory_bytes": int(config.cpu_kv_cache_gib * GIB),
            # vLLM's default on the CPU is 128; only whole blocks are shared, and prompts are often shorter.
            "block_size": 32,
            # Per-request seeds and prompts split over steps do not go together on the CPU ("CPU Generator
            # does not use offset"): a prompt is always prefilled in one step.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(2048, max_model_len, config.max_num_seqs),
        }
    else:
        settings["gpu_memory_utilization"] = config.gpu_memory_utilization
    return settings


def sampling_params(sampling: SamplingConfig, seed: int) -> SamplingParams:
    """Every setting is given, so that none comes from the model's generation_config."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=1,
        output_kind=RequestOutputKind.FINAL_ONLY,
        seed=seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        stop=list(sampling.stop),
        max_tokens=sampling.max_tokens,
        logprobs=0,  # the sampled token's alone
        # vLLM needs text only to look for stop strings; the record's text is decoded once, at the end.
        detokenize=bool(sampling.stop),
        include_stop_str_in_output=True,
    )


def _explain(error: BaseException, config: GeneratorConfig, on_cpu: bool) -> str:
    """Why vLLM did not start, in one line, and what to change."""
    reason = " ".join(str(error).split()) or type(error).__name__
    lowered = reason.lower()
    if any(word in lowered for word in ("kv cache", "kv_cache", "memory")):
        knob, value = (
            ("cpu_kv_cache_gib", config.cpu_kv_cache_gib)
            if on_cpu
            else ("gpu_memory_utilization", config.gpu_memory_utilization)
        )
        return (
            f"vLLM could not start: {reason[:300]} (generator.{knob} is {value:g}; change it, or lower "
            "generator.max_num_seqs, or the context: generator.max_model_len where it is set, else "
            "generator.max_tokens or prompts.max_tokens)"
        )
    return f"vLLM could not start: {reason[:300]}"
