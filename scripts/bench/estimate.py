"""The memory that `verl.trainer.estimate` predicts, against what the real code takes.

    python scripts/bench/estimate.py           # random models on this machine, one rank
    python scripts/bench/estimate.py --ranks   # models of full size on many ranks, as fake tensors
    python scripts/bench/estimate.py --layer   # what one decoder layer saves for its backward pass

Every case runs in a process of its own: an actor is built, and log-probs and an update of two
micro-batches are made of long rows. On a CPU the peak is that of the resident memory above its
level before the model was built (what ru_maxrss has, set back before each measurement), on a GPU
what torch allocated. Fake tensors go through the same calls of FSDP2, with collectives that do
nothing; counted is what is alive on a rank, without workspaces and fragmentation.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MIB = 2**20
PUBLISHED = Path(__file__).with_name("model_shapes.json")


def qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool
) -> Any:
    """What `config.json` of a Qwen2 model of these sizes holds."""
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32_768,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": qwen2(64, 128, 2, 2, 1, 1_000, True),
    "62M, deep": qwen2(512, 2_048, 12, 8, 2, 32_000, True),
    "89M, 152k words": qwen2(512, 1_536, 4, 8, 2, 152_000, True),
    "131M, untied": qwen2(768, 3_072, 4, 12, 4, 64_000, False),
    **{path.partition("/")[2]: shape for path, shape in json.loads(PUBLISHED.read_text()).items()},
}
# shape, dtype of the computation, prompt, response, share of the response that is trained on
REAL = [
    ("62M, deep", "bfloat16", 1_536, 512, 1.0),
    ("62M, deep", "float32", 1_024, 1_024, 0.25),
    ("89M, 152k words", "bfloat16", 512, 512, 1.0),
    ("131M, untied", "bfloat16", 512, 512, 0.5),
]
RANKS = [  # shape, ranks, tokens, trained tokens, and what differs from the defaults
    ("Qwen2.5-3B", 1, 8_192, 4_000, {}),
    ("Qwen2.5-3B", 8, 16_384, 8_000, {}),
    ("Qwen2.5-7B", 8, 16_384, 8_000, {}),
    ("Qwen2.5-7B", 8, 2_048, 400, {}),
    ("Qwen2.5-7B", 8, 5_096, 2_500, {"checkpointing": False}),
    ("Qwen2.5-7B", 8, 16_384, 8_000, {"lora_rank": 64}),
    ("Qwen2.5-7B", 8, 16_384, 8_000, {"reshard_after_forward": False}),
    ("Qwen2.5-7B", 8, 16_384, 8_000, {"model_dtype": "bfloat16"}),
    ("Qwen2.5-7B", 64, 32_768, 16_000, {}),
    ("Qwen3-4B", 8, 16_384, 8_000, {}),
    ("Llama-3.1-8B", 8, 16_384, 8_000, {}),
    ("Llama-3.2-3B", 8, 16_384, 8_000, {}),
]


def hf_config(shape: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**SHAPES[shape])


def predicted(
    path: str, fsdp: Any, world: int, work: tuple[float, float], case: dict[str, Any]
) -> dict[str, float]:
    """Bytes of an actor alone: its resident state and the peaks of log-probs and update."""
    from verl.estimate.memory import Pass, Role, infer_moments, resident, update_moments
    from verl.estimate.sizing import read_model
    from verl.workers.config import ModelConfig

    sizes, trained = read_model(
        ModelConfig(path=path, lora_rank=case.get("lora_rank", 0)), "lm", {}
    )
    one = Pass(*work, "")
    role = Role("actor", sizes, trained, fsdp, world, one, one, case.get("checkpointing", True))
    base = sum(resident(role, True).values())
    peaks = [
        max(sum(m.values()) for m in moments.values())
        for moments in (infer_moments(role), update_moments(role))
    ]
    return {"weights + optimizer": base, "log-probs": base + peaks[0], "update": base + peaks[1]}


class Meter:
    """Bytes of this process above the level at which the meter was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.base = self.now()

    def now(self) -> int:
        """Present memory; sets the peak back to it."""
        import torch

        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")
        return self._status("VmRSS")

    def rise(self) -> int:
        return self.now() - self.base

    def peak(self) -> int:
        import torch

        highest = (
            torch.cuda.max_memory_allocated() if self.device == "cuda" else self._status("VmHWM")
        )
        return highest - self.base

    def _status(self, field: str) -> int:
        lines = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        return int(lines[field].split()[0]) * 1024


def batch_of(rows: int, prompt: int, response: int, share: float, vocab: int) -> Any:
    import torch

    from verl.protocol import DataProto

    trained = (torch.arange(response) < round(share * response)).long().repeat(rows, 1)
    numbers = {
        key: torch.randn(rows, response) for key in ("advantages", "old_log_probs", "ref_log_prob")
    }
    return DataProto.from_dict(
        {
            "prompts": torch.randint(0, vocab, (rows, prompt)),
            "responses": torch.randint(0, vocab, (rows, response)),
            "attention_mask": torch.ones(rows, prompt + response, dtype=torch.long),
            "response_mask": trained,
            "mini_batch": torch.zeros(rows, dtype=torch.long),
            **numbers,
        },
        meta_info={"num_mini_batches": {"mini_batch": 1}},
    )


def real_case(paths: dict[str, str], case: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Predicted and measured bytes of an actor on one rank, two micro-batches an update."""
    import torch

    from verl.trainer.sft import start_process_group
    from verl.workers.actor import ActorWorker
    from verl.workers.config import ActorConfig, FSDPConfig, ModelConfig, RolloutConfig

    start_process_group(threads=1)
    fsdp = FSDPConfig(dtype=case["dtype"])
    length = case["prompt"] + case["response"]
    config = ActorConfig(
        ppo_max_token_len_per_gpu=length, fsdp_config=fsdp, entropy_coeff=0.001, use_kl_loss=True
    )

    def actor(path: str) -> ActorWorker:
        model = ModelConfig(path=path, enable_gradient_checkpointing=case["checkpointing"])
        made = ActorWorker(model, config, RolloutConfig(log_prob_max_token_len_per_gpu=length), 10)
        made.update_actor(batch_of(1, 4, 4, 1.0, 1_000))  # makes the optimizer's state
        return made

    actor(paths["tiny"])  # brings libraries and workspaces into memory
    data = batch_of(
        2, case["prompt"], case["response"], case["share"], SHAPES[case["shape"]]["vocab_size"]
    )
    meter = Meter("cuda" if torch.cuda.is_available() else "cpu")
    made = actor(paths[case["shape"]])
    measured: dict[str, float] = {"weights + optimizer": meter.rise()}
    made.compute_log_prob(data)
    measured["log-probs"] = meter.peak()
    meter.now()
    made.update_actor(data)
    measured["update"] = meter.peak()
    work = (length, round(case["share"] * case["response"]))
    return {"predicted": predicted(paths[case["shape"]], fsdp, 1, work, case), "measured": measured}


@contextmanager
def live_bytes() -> Iterator[Callable[[], tuple[int, int]]]:
    """A function: bytes of the tensors that are alive, and the highest number since its last
    call."""
    import torch
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    sizes: dict[int, int] = {}
    peak = 0

    def note(storage: torch.UntypedStorage) -> None:
        nonlocal peak
        key = storage._cdata
        if key not in sizes:
            weakref.finalize(storage, sizes.pop, key)
        sizes[key] = storage.nbytes()
        peak = max(peak, sum(sizes.values()))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            local = tree_map_only(DTensor, lambda t: t._local_tensor, out)
            tree_map_only(torch.Tensor, lambda t: note(t.untyped_storage()), local)
            return out

    def read() -> tuple[int, int]:
        nonlocal peak
        now = sum(sizes.values())
        highest = peak
        peak = now
        return now, highest

    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)  # how FSDP2 frees gathered parameters and takes room for them again
        note(storage)

    torch.UntypedStorage.resize_ = resized  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with Watch():
            yield read
    finally:
        torch.UntypedStorage.resize_ = resize


def fake_policy(case: dict[str, Any], path: str) -> Any:
    """A policy of fake tensors; to be called under their mode."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from transformers.masking_utils import flash_attention_mask

    from verl.workers.config import ModelConfig
    from verl.workers.lora import add_adapters

    def attend(
        _: Any, q: Any, k: Any, v: Any, __: Any, scaling: float | None = None, **___: Any
    ) -> tuple[Any, None]:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("whole", attend)
    AttentionMaskInterface.register("whole", flash_attention_mask)
    with torch.device("meta"):
        dtype = getattr(torch, case.get("model_dtype", "float32"))
        model: Any = AutoModelForCausalLM.from_config(
            hf_config(case["shape"]), dtype=dtype, attn_implementation="whole"
        )
        if rank := case.get("lora_rank"):
            model = add_adapters(model, ModelConfig(path=path, lora_rank=rank))
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and old not in made:
                    new = torch.zeros(old.shape, dtype=old.dtype)
                    made[old] = (
                        torch.nn.Parameter(new, old.requires_grad)
                        if tensors is module._parameters
                        else new
                    )
                tensors[name] = None if old is None else made[old]
    return model.eval()


def fake_case(paths: dict[str, str], case: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Predicted and counted bytes of a policy on the first of many ranks."""
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from verl.utils.torch_functional import logprobs_and_entropy, logprobs_from_logits
    from verl.workers.config import FSDPConfig, OptimConfig
    from verl.workers.fsdp_model import build_train_state, decoder_layers, shard

    dist.init_process_group("fake", rank=0, world_size=case["world"], store=FakeStore())
    mesh = init_device_mesh("cpu", (case["world"],))
    fsdp = FSDPConfig.model_validate(
        {k: v for k, v in case.items() if k in FSDPConfig.model_fields}
    )
    path = paths[case["shape"]]
    tokens = case["tokens"]
    trained = case["trained"]
    with FakeTensorMode(allow_non_fake_inputs=True), live_bytes() as live:
        model = fake_policy(case, path)
        layers = decoder_layers(model)
        if case.get("checkpointing", True):
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in layers:
                layer.training = True
        shard(model, layers, fsdp, mesh)
        state = build_train_state(model, OptimConfig(), 10)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        inputs = {
            "input_ids": ids,
            "position_ids": torch.arange(tokens)[None],
            "logits_to_keep": torch.arange(trained),
        }

        def log_probs() -> None:
            with torch.no_grad():
                logprobs_from_logits(model(**inputs, use_cache=False).logits[0], ids[0, :trained])

        def backward() -> None:
            found = logprobs_and_entropy(
                model(**inputs, use_cache=False).logits[0], ids[0, :trained]
            )
            (found[0].mean() + found[1].mean()).backward()

        def update() -> None:
            backward()
            state.optimizer.step()
            state.optimizer.zero_grad()

        update()
        counted: dict[str, float] = {"weights + optimizer": live()[0]}
        log_probs()
        counted["log-probs"] = live()[1]
        backward()
        live()
        update()
        counted["update"] = live()[1]
    return {
        "predicted": predicted(path, fsdp, case["world"], (tokens, trained), case),
        "measured": counted,
    }


def layer_case() -> None:
    """Bytes per token that a decoder layer saves, from hooks on what autograd packs, against the
    formula."""
    import torch
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

    from verl.estimate.memory import layer_saved
    from verl.estimate.sizing import read_model
    from verl.workers.attention import PACKED, packed_arguments
    from verl.workers.config import ModelConfig

    tokens = 256
    sys.stdout.write(
        f"{'saved by a decoder layer':34}{'attention':>12}{'formula':>12}{'counted':>12}  ratio\n"
    )
    for shape in ("62M, deep", "131M, untied", "Qwen2.5-3B"):
        for dtype in (torch.float32, torch.bfloat16):
            for attention in ("sdpa", PACKED):
                config = hf_config(shape)
                config._attn_implementation = attention
                layer = Qwen2DecoderLayer(config, 0).to(dtype)
                x = torch.randn(1, tokens, config.hidden_size, dtype=dtype, requires_grad=True)
                rotary = Qwen2RotaryEmbedding(config)(x, torch.arange(tokens)[None])
                shared = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *rotary)}
                sizes: dict[int, int] = {}

                def pack(t: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
                    sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                    return t

                with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                    packed = packed_arguments(torch.tensor([tokens]))
                    out = layer(x, position_embeddings=rotary, attention_mask=None, **packed)
                counted = sum(size for at, size in sizes.items() if at not in shared) / tokens
                del out
                with tempfile.TemporaryDirectory() as folder:
                    config.save_pretrained(folder)
                    formula = layer_saved(
                        read_model(ModelConfig(path=folder), "lm", {})[0], dtype.itemsize
                    )
                name = f"{shape}, {str(dtype).removeprefix('torch.')}"
                sys.stdout.write(
                    f"{name:34}{attention:>12}{formula:12,.0f}{counted:12,.0f}  "
                    f"{formula / counted:.2f}\n"
                )


def save_models(folder: Path, ranks: bool) -> dict[str, str]:
    """Configs of all shapes, weights too where they are to be read."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    needed = {case[0] for case in (RANKS if ranks else REAL)} | {"tiny"}
    paths = {shape: str(folder / str(i)) for i, shape in enumerate(SHAPES) if shape in needed}
    for shape, path in paths.items():
        saved = hf_config(shape) if ranks else AutoModelForCausalLM.from_config(hf_config(shape))
        saved.save_pretrained(path)
    return paths


def cases(ranks: bool) -> list[dict[str, Any]]:
    if ranks:
        keys = ("shape", "world", "tokens", "trained")
        return [
            {**dict(zip(keys, case[:4], strict=True)), **case[4], "fake": True} for case in RANKS
        ]
    keys = ("shape", "dtype", "prompt", "response", "share", "checkpointing")
    return [dict(zip(keys, (*case, on), strict=True)) for case in REAL for on in (False, True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", action="store_true", help="full size, many ranks, fake tensors")
    parser.add_argument("--layer", action="store_true", help="one decoder layer")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.layer:
        return layer_case()
    if args.case:
        paths, case = json.loads(args.case)
        found = (fake_case if case.get("fake") else real_case)(paths, case)
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        return None
    # so that what is freed is given back, and the resident memory is what is alive
    env = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = save_models(Path(folder), args.ranks)
        ratios: list[float] = []
        for case in cases(args.ranks):
            command = [sys.executable, __file__, "--case", json.dumps([paths, case])]
            output = subprocess.run(
                command, env=env, stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            found = json.loads(output.splitlines()[-1])
            name = ", ".join(
                str(v) if k == "shape" else f"{k} {v}" for k, v in case.items() if k != "fake"
            )
            sys.stdout.write(f"{name}\n{'MiB':>26}{'predicted':>12}{'measured':>12}\n")
            for what, expected in found["predicted"].items():
                real = found["measured"][what]
                ratios.append(round(expected / real, 3))
                sys.stdout.write(
                    f"{what:>26}{expected / MIB:12,.0f}{real / MIB:12,.0f}{expected / real:12.2f}\n"
                )
            sys.stdout.flush()
        sys.stdout.write(
            f"RESULT {json.dumps({'smallest ratio': min(ratios), 'largest ratio': max(ratios)})}\n"
        )
    return None


if __name__ == "__main__":
    main()
