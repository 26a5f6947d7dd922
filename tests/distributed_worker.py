"""What each of two processes does for test_distributed.py, which starts them with `run_two`."""

import multiprocessing
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
from references import guide_snippets

STEPS, SAVED_STEP = 4, 2
PAIRS = {"user_id": [0, 3, -1], "item_id": [2, 4, 1], "max_new_tokens": 5, "do_sample": False}


def answers(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Logits, generated tokens, loss and gradients."""
    model.eval()
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    pairs = {name: batch[name] for name in ("user_id", "item_id")}
    tokens = model.generate(**pairs, max_new_tokens=8, do_sample=False)
    model.train()
    loss = model(**batch, labels=batch["input_ids"], use_cache=False, output_router_logits=True).loss
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in gradients.items()}
    return {"logits": logits, "tokens": tokens, "loss": loss.detach(), "gradients": whole}


def load_parallel(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The answers of every model in the folder under tensor and under expert parallelism."""
    from transformers.distributed import DistributedConfig

    from gavamoe_hf import GaVaMoEForCausalLM

    _, guide = guide_snippets("pretrained-llama.md")
    results = {}
    for name in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        batch = torch.load(folder / f"{name}.pt")
        namespace: dict[str, Any] = {}
        exec(guide.replace("outputs/from_base", str(folder / name)), namespace)
        results[name, "tp"] = answers(namespace["model"], batch)
        if name != "dense":
            config = DistributedConfig(tp_size=2, ep_size=2)
            model = GaVaMoEForCausalLM.from_pretrained(folder / name, distributed_config=config)
            results[name, "ep"] = answers(model, batch)
    return results


def train(folder: Path, run: str, resume: bool = False, fsdp: bool = False, **options) -> dict[str, Any]:
    """
    A short run of stage 2 from `folder/start`, saved in `folder/run`. Returns its log, `(user_id, item_id, gate)` and
    the cluster posterior of each training batch, tokens that the model then generates, and the class that was trained.
    """
    from datasets import Dataset

    from gavamoe_hf import load_checkpoint
    from gavamoe_hf.training.sft_config import GaVaMoESFTConfig
    from gavamoe_hf.training.sft_trainer import GaVaMoESFTTrainer

    defaults = dict(
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        per_device_train_batch_size=4,
        # With 10 records, two processes repeat some in their last batch
        per_device_eval_batch_size=3,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=SAVED_STEP,
        save_total_limit=None,
        eval_strategy="steps",
        eval_steps=SAVED_STEP,
        logging_steps=1,
        learning_rate=1e-2,
        router_aux_loss_coef=0.1,
        alpha=0.3,
    )
    arguments = GaVaMoESFTConfig(output_dir=str(folder / run), **{**defaults, **options})
    if fsdp:
        pretend_accelerators()
    model, processor = load_checkpoint(str(folder / "start"))
    gates, posteriors = [], []

    def record(module: Any, _: Any, inputs: dict[str, torch.Tensor], output: Any) -> None:
        if module.training:
            gates.append(torch.stack([inputs["user_id"], inputs["item_id"], output.gate_index], dim=1))
            posteriors.append(output.cluster_posterior)

    model.model.register_forward_hook(record, with_kwargs=True)
    trainer = GaVaMoESFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.load_from_disk(str(folder / "train")),
        eval_dataset=Dataset.load_from_disk(str(folder / "validation")),
        processor=processor,
    )
    trainer.train(resume_from_checkpoint=str(folder / run / f"checkpoint-{SAVED_STEP}") if resume else None)
    trainer.save_model(str(folder / run / "final"))
    return {
        "log": trainer.state.log_history,
        "gates": gates,
        "posteriors": posteriors,
        "tokens": trainer.model.eval().generate(**PAIRS),
        "model": type(trainer.model_wrapped).__name__,
    }


def pretend_accelerators() -> None:
    """accelerate shards where there are accelerators alone: it is told that each process has one."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def work(rank: int, mode: str, folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.randn_like = torch.zeros_like
    if mode == "parallel":
        results = load_parallel(folder)
    elif mode == "ddp":
        results = {"whole": train(folder, mode)}
        # No parameter goes without a gradient, as this demands
        results["resumed"] = train(folder, mode, resume=True, ddp_find_unused_parameters=False)
    else:
        results = {"whole": train(folder, mode, fsdp=True)}
        results["resumed"] = train(folder, mode, resume=True, fsdp=True)
        results["bf16"] = train(folder, "bf16", fsdp=True, bf16=True, max_steps=1)
    torch.save(results, folder / f"{mode}-{rank}.pt")
    torch.distributed.destroy_process_group()


def run_two(mode: str, folder: Path, timeout: float = 240, **environment: str) -> list[dict[str, Any]]:
    """What each of two processes saved; raises what one of them raised."""
    # Forked from a process that has imported what they need, which takes longer than what they do
    multiprocessing.set_forkserver_preload(["gavamoe_hf.training.sft_trainer", "torch.distributed.fsdp"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", **environment}
    processes = torch.multiprocessing.start_processes(
        work, (mode, folder, environment), nprocs=2, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + timeout
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            raise TimeoutError(f"The two processes of {mode} took more than {timeout} s.")
    return [torch.load(folder / f"{mode}-{rank}.pt") for rank in range(2)]
