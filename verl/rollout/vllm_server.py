"""One vLLM engine: tokens in, tokens out.

vLLM is imported here, in `engine_images.py` and in `weight_sync.py` alone.

A plain class, made into a Ray actor by the driver, one per replica. `vllm` is imported in `start`,
after setting the environment that it reads at import.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any

from verl.agent import Completion, Image, context_digest
from verl.rollout.weight_sync import memory_folder, write_engine_model
from verl.single_controller.worker import stacks
from verl.utils.processes import follow
from verl.utils.tokenizer import end_of_turn
from verl.workers.config import ModelConfig, RolloutConfig

MOST_IMAGES = 64
"""Images of a context that the engine is prepared for."""
FORBIDDEN = -100.0
"""What is added to the logit of a token that is never sampled: the least that vLLM takes."""


class VLLMServer:
    """A replica: generates for many trajectories at once, and takes new weights."""

    def __init__(
        self,
        config: RolloutConfig,
        model: ModelConfig,
        *,
        max_model_len: int,
        device: str,
        colocated: bool = True,
        replica_rank: int,
        num_replicas: int,
        visible_devices: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.config = config
        self.model = model
        self.device = device
        self.max_model_len = max_model_len
        self.seed = seed + replica_rank
        self.num_replicas = num_replicas
        self.colocated = colocated
        self.visible_devices = visible_devices
        self.version = -1
        self.updating = False
        self.engine: Any = None
        self.stop_token_ids: list[int] = []
        self.never_sampled: list[int] = []
        """The token that stands for an image, which would have none in a turn of the policy."""
        self.on_death: Callable[[], object] = lambda: None
        """Is called when the engine has ended, before this process ends."""

    async def start(self) -> None:
        """Builds the engine.

        It begins with the initial weights, or with random ones until the first sync
        (`load_format=dummy`, on GPUs).
        """
        os.environ.update({"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"})
        if self.device == "cuda":
            self._build(**self._gpu_arguments())
        else:
            with memory_folder() as folder:
                write_engine_model(self.model, folder)
                self._build(model=folder, **self._cpu_arguments())
        (process, *_) = await self.engine.collective_rpc("follow", args=(os.getpid(),))
        follow(process, self._engine_ended)
        self.stop_token_ids = stop_token_ids(self.model)
        if self.model.reads_images:
            self.never_sampled = [self.engine.model_config.hf_config.image_token_id]

    def _engine_ended(self) -> None:
        """Ends this process with its engine, so that both are replaced.

        vLLM leaves calls to a dead engine hanging.
        """
        if self.engine is not None:
            self._exit()

    def _exit(self) -> None:
        """Ends this process at once, whatever its threads do."""
        self.on_death()
        os._exit(1)

    def _build(self, **kwargs: Any) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        args = {
            "dtype": self.config.dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.config.max_num_seqs,
            "max_num_batched_tokens": self.config.max_num_batched_tokens,
            "enable_prefix_caching": self.config.enable_prefix_caching,
            "enforce_eager": self.config.enforce_eager,
            "trust_remote_code": self.model.trust_remote_code,
            "hf_overrides": self.model.architecture,
            "generation_config": "vllm",  # no sampling defaults of the model
            # those of the distribution that was sampled from: after temperature and truncation
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "worker_extension_cls": "verl.rollout.engine_process.FollowServer",
            "seed": self.seed,
        }
        if self.model.reads_images:
            # the pixels come with each call, of which only the tower's result is kept
            args |= {"mm_processor_cache_gb": 0, "limit_mm_per_prompt": {"image": MOST_IMAGES}}
        self.engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**(args | kwargs | self.config.engine_kwargs))
        )

    def _cpu_arguments(self) -> dict[str, Any]:
        """vLLM's arguments on a CPU, where model and scheduler share one process.

        For small models sending a call to another process costs more than the model itself.
        Threads are limited in number but not pinned, because vLLM's own pinning puts all replicas
        on the same cores.
        """
        share = len(os.sched_getaffinity(0)) // self.num_replicas
        threads = self.config.cpu_threads or max(1, share - 1)
        os.environ.update({"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"})
        # spinning threads starve whoever else needs the core
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        # concerns the model's process only: the engine keeps a process of its own
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        return {
            # compiling takes 20 s and gained nothing at the sizes that a CPU can train
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(self.config.cpu_kvcache_gb * 2**30),
            # A split prompt of a seeded request kills the engine: it rewinds the generator, which
            # is impossible on CPU.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(self.config.max_num_batched_tokens, self.max_model_len),
            # the unit of prefix reuse; 128 unless told, which is longer than most turns
            "block_size": 32,
        }

    def _gpu_arguments(self) -> dict[str, Any]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(self.visible_devices)
        if self.colocated:  # CUDA IPC handles travel pickled, within this run
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        # FlashInfer's sampler, which vLLM takes for top_p < 1 without log-probs (a sampled
        # validation), is compiled at its first use, and fails where nvcc is older than torch's
        # CUDA.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        return {
            "model": self.model.path,
            "tokenizer": self.model.tokenizer_path or self.model.path,
            "tensor_parallel_size": self.config.tensor_model_parallel_size,
            "gpu_memory_utilization": self.config.gpu_memory_utilization,
            "load_format": self.config.load_format,
            "enable_sleep_mode": self.colocated,
            "weight_transfer_config": {"backend": "ipc" if self.colocated else "nccl"},
        }

    async def generate(
        self,
        request_id: str,
        prompt_ids: list[int],
        sampling: dict[str, Any],
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> Completion:
        """Samples one completion of a prompt.

        `on_tokens` is called with all ids sampled so far, each time there are more.

        `sampling`: temperature, top_p, top_k, max_tokens, stop, seed, and log_probs; without
        log_probs they are returned as zeros and the engine does less work. Also images, those that
        stand in the prompt, if it has any. A stop string stays in
        the output, up to the token that completes it, and so does a token that ends a turn. No
        token that was not sampled is added.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        params = SamplingParams(
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            top_k=max(0, sampling["top_k"]),
            max_tokens=sampling["max_tokens"],
            stop=list(sampling["stop"]),
            stop_token_ids=list(self.stop_token_ids),
            seed=sampling["seed"],
            logprobs=0 if sampling["log_probs"] else None,
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            logit_bias=dict.fromkeys(self.never_sampled, FORBIDDEN) or None,
            output_kind=(
                RequestOutputKind.FINAL_ONLY if on_tokens is None else RequestOutputKind.CUMULATIVE
            ),
        )
        final = None
        try:
            async for output in self.engine.generate(
                self._prompt(prompt_ids, sampling.get("images", ())), params, request_id
            ):
                final = output
                if on_tokens is not None:
                    on_tokens(list(output.outputs[0].token_ids))
        except EngineDeadError:
            self._exit()  # raised instead, it would look like an error of this call
        assert final is not None, "the engine ended a request without an output"
        completion = final.outputs[0]
        ids = list(completion.token_ids)
        return Completion(
            token_ids=ids,
            log_probs=[
                at[token].logprob for token, at in zip(ids, completion.logprobs, strict=True)
            ]
            if sampling["log_probs"]
            else [0.0] * len(ids),
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
            policy_version=self.version,
            context_digest=context_digest(final.prompt_token_ids),
        )

    def _prompt(self, prompt_ids: list[int], images: Sequence[Image]) -> Any:
        """A prompt as vLLM takes it."""
        if not images:
            return {"prompt_token_ids": prompt_ids}
        from verl.rollout.engine_images import prompt_with_images

        (image_token,) = self.never_sampled
        return prompt_with_images(prompt_ids, images, image_token)

    async def begin_weight_update(self) -> None:
        """Waits for running requests and holds new ones back."""
        await self.engine.pause_generation(mode="wait", clear_cache=True)

    async def finish_weight_update_and_resume(self, version: int) -> None:
        """Resets the prefix cache, which is of the old weights, and resumes under `version`."""
        await self.engine.reset_prefix_cache()
        self.version = version
        await self.engine.resume_generation()

    async def load_weights(self, path: str) -> None:
        """Reads all weights from the safetensors folder `path` (CPU)."""
        await self.engine.collective_rpc("reload_weights", kwargs={"weights_path": path})

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self.engine.init_weight_transfer_engine(
            WeightTransferInitRequest(init_info=init_info)
        )

    async def start_weight_update(self) -> None:
        """Makes the engine ready for new weights.

        Ends a transfer that was broken off because another engine died, since vLLM refuses to
        start a second one. What it had loaded is loaded again.
        """
        if self.updating:
            await self.engine.finish_weight_update()
        self.updating = True
        await self.engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self.engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def finish_weight_update(self) -> None:
        await self.engine.finish_weight_update()
        self.updating = False

    async def sleep(self, level: int) -> None:
        """Frees GPU memory: level 1 moves the weights to host memory, level 2 drops them."""
        await self.engine.sleep(level)

    async def wake_up(self, tags: list[str]) -> None:
        """Allocates the GPU memory of `tags` again: `weights` first, later `kv_cache`."""
        await self.engine.wake_up(tags)

    async def wait_for_death(self) -> None:
        """Never returns: the call ends when this process dies."""
        await asyncio.Event().wait()

    def stacks(self) -> str:
        """Returns the stacks of the threads of this process."""
        return stacks()

    async def shutdown(self) -> None:
        """Ends the engine's process.

        It is killed: it has nothing to save, and would take more than its 5 s of grace to end by
        itself.
        """
        engine = self.engine
        self.engine = None
        if engine is not None:
            engine.shutdown(timeout=0)


def stop_token_ids(model: ModelConfig) -> list[int]:
    """The tokens that end a turn.

    They are EOS of the tokenizer, every EOS of the generation configuration, and the token with
    which the chat template ends a turn. That may be none of the others (`<|im_end|>` of Qwen's base
    models), and the engine would not stop at it without being told.
    """
    from transformers import AutoTokenizer
    from vllm.transformers_utils.config import try_get_generation_config

    source = model.tokenizer_path or model.path
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    generation = try_get_generation_config(model.path, trust_remote_code=model.trust_remote_code)
    configured = generation.eos_token_id if generation is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted(
        {id_ for id_ in (*ids, tokenizer.eos_token_id, end_of_turn(tokenizer)) if id_ is not None}
    )
