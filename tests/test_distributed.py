"""Two processes give what one gives: tensor and expert parallelism, data-parallel and sharded training."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.dataclasses import get_module_class_from_name
from accelerate.utils.launch import prepare_multi_gpu_env
from distributed_worker import PAIRS, SAVED_STEP, STEPS, answers, run_two, train
from references import TINY_MODEL, random_prompts, spread_clusters, tiny_model
from transformers.distributed import DistributedConfig

from gavamoe_hf import load_checkpoint
from gavamoe_hf.training.building import ModelArguments, build_model, build_processor
from gavamoe_hf.training.sft_trainer import tokenize_records

CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate"
KINDS = {"plain": {}, "shared": {"shared_expert_intermediate_size": 48}, "dense": {"num_local_experts": 0}}


def launch_arguments(name: str):
    """accelerate's own reading of a config file, as `accelerate launch` does it."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / name), "-m", "gavamoe_hf"])
    return _validate_launch_command(arguments)[0]


# Tensor and expert parallelism


@pytest.mark.parametrize("kind", KINDS)
def test_plans_shard_the_decoder_and_nothing_of_the_routing(kind):
    model = tiny_model(**KINDS[kind])
    tp_plan, ep_plan, fsdp_plan = model._resolve_parallel_plans(
        DistributedConfig(tp_size=2, ep_size=2, fsdp_size=2) if kind != "dense" else DistributedConfig(tp_size=2)
    )
    parts = (
        ".embed_tokens.",
        ".self_attn.",
        ".mlp.experts.",
        ".shared_expert.",
        ".mlp.up_",
        ".mlp.down_",
        ".mlp.gate_",
    )
    names = {name for name, _ in model.named_parameters()}
    expected = {name for name in names if name == "lm_head.weight" or any(part in name for part in parts)}
    assert (set(tp_plan) | set(ep_plan)) & names == expected
    assert {name for name in ep_plan if name in names} == {name for name in names if ".experts." in name}
    assert not any("rating_model" in name for name in (*tp_plan, *ep_plan, *fsdp_plan))


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    """The answers of one process, and those of two, by kind of model."""
    folder = tmp_path_factory.mktemp("parallel")
    alone = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", torch.zeros_like)
        for kind, options in KINDS.items():
            model = spread_clusters(tiny_model(**options, vae_dropout=0.0, vae_id_dropout=0.0))
            input_ids, attention_mask = random_prompts([9, 12, 7, 12, 10])
            batch = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "user_id": torch.tensor([0, 3, 5, 2, -1]),
                "item_id": torch.tensor([1, 8, 2, 4, 6]),
                "rating": torch.tensor([1.0, 5.0, 3.0, 2.0, 4.0]),
            }
            model.save_pretrained(folder / kind)
            torch.save(batch, folder / f"{kind}.pt")
            alone[kind] = answers(model, batch)
            assert kind == "dense" or len(set(model.gate_index(batch["user_id"], batch["item_id"]).tolist())) > 1
    return alone, run_two("parallel", folder)


@pytest.mark.parametrize(
    ("kind", "plan"), [("plain", "tp"), ("shared", "tp"), ("dense", "tp"), ("plain", "ep"), ("shared", "ep")]
)
def test_parallel_model_gives_the_whole_ones_logits_tokens_and_gradients(parallel, kind, plan):
    alone, ranks = parallel
    for result in (rank[kind, plan] for rank in ranks):
        torch.testing.assert_close(result["logits"], alone[kind]["logits"], rtol=1e-5, atol=2e-5)
        assert torch.equal(result["tokens"], alone[kind]["tokens"])
        torch.testing.assert_close(result["loss"], alone[kind]["loss"], rtol=1e-5, atol=1e-5)
        for name, gradient in alone[kind]["gradients"].items():
            torch.testing.assert_close(result["gradients"][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


# Training


@pytest.fixture(scope="module")
def alone(tmp_path_factory, planted):
    """Folder of a start, and the run of one process that takes each step's records as two batches."""
    folder = tmp_path_factory.mktemp("training")
    torch.manual_seed(0)
    arguments = ModelArguments(**TINY_MODEL, vae_dropout=0.0, vae_id_dropout=0.0, vocab_size=600)
    processor = build_processor(planted.records["train"], arguments)
    model = spread_clusters(build_model(processor, arguments))
    model.set_interactions([0, 3, 3], [2, 1, 4])
    model.save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    for split, count in (("train", 64), ("validation", 10)):
        tokenize_records(planted.records[split].select(range(count)), processor).save_to_disk(str(folder / split))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", torch.zeros_like)
        return folder, train(folder, "alone", gradient_accumulation_steps=2)


def logged(result: dict) -> dict[tuple[int, str], float]:
    names = ("loss", "nll", "elbo", "kl_loss", "aux_loss", "grad_norm", "eval_nll")
    return {(entry["step"], name): entry[name] for entry in result["log"] for name in names if name in entry}


def check_runs(alone, ranks: list[dict], mode: str, atol: float) -> None:
    folder, reference = alone
    expected = logged(reference)
    assert len(expected) == 6 * STEPS + STEPS // SAVED_STEP
    for number, rank in enumerate(ranks):
        # The uninterrupted run, and the one that began with its checkpoint
        for name in ("whole", "resumed"):
            assert logged(rank[name]) == pytest.approx(expected, rel=1e-4), name
        gates = torch.stack(rank["whole"]["gates"])
        assert torch.equal(gates, torch.stack(reference["gates"])[number::2])
        assert torch.equal(torch.stack(rank["resumed"]["gates"]), gates[SAVED_STEP:])
    model, processor = load_checkpoint(str(folder / mode / "final"))
    single, _ = load_checkpoint(str(folder / "alone" / "final"))
    for name, value in single.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=atol, msg=name)
    for rank in ranks:
        assert torch.equal(rank["whole"]["tokens"], model.generate(**PAIRS))
    assert len(processor.users) == model.config.num_users
    saved = [json.loads((folder / run / "final" / "config.json").read_text()) for run in (mode, "alone")]
    assert saved[0] == saved[1]
    assert (folder / mode / "final" / "modeling_gavamoe.py").is_file()


def test_gates_of_training_batches_are_those_that_the_model_names(alone):
    folder, reference = alone
    model, _ = load_checkpoint(str(folder / "start"))
    user_id, item_id, gate = torch.cat(reference["gates"][:2]).T
    assert torch.equal(model.gate_index(user_id, item_id), gate) and len(set(gate.tolist())) > 1


def test_data_parallel_training_equals_one_process(alone):
    ranks = run_two("ddp", alone[0])
    assert all(rank["whole"]["model"] == "DistributedDataParallel" for rank in ranks)
    check_runs(alone, ranks, "ddp", atol=1e-5)


@pytest.mark.slow
def test_sharded_training_equals_one_process(alone):
    folder, _ = alone
    launched = prepare_multi_gpu_env(launch_arguments("fsdp2.yaml"))
    ranks = run_two("fsdp2", folder, **{key: value for key, value in launched.items() if key not in os.environ})
    assert all(rank["whole"]["model"] == "FSDPGaVaMoEForCausalLM" for rank in ranks)
    # Adam divides gradients that are zero but for rounding, as those of key biases, by their size
    check_runs(alone, ranks, "fsdp2", atol=1e-4)
    model, _ = load_checkpoint(str(folder / "start"))
    for rank in ranks:
        # In bfloat16 the rating model's posteriors would be off by 1e-3 and more
        user_id, item_id, gate = rank["bf16"]["gates"][0].T
        expected = model.cluster_posterior(user_id, item_id)
        torch.testing.assert_close(rank["bf16"]["posteriors"][0], expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(model.gate_index(user_id, item_id), gate)


# Configs of accelerate


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configs(path):
    config = load_config_from_file(str(path))
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero3": "DEEPSPEED"}
    assert config.distributed_type.value == expected[path.stem]
    arguments = launch_arguments(path.name)
    unknown = {*config.fsdp_config, *config.deepspeed_config} - set(vars(launch_command_parser().parse_args(["x"])))
    assert arguments.num_processes == 2 and unknown == set()
    assert f"accelerate launch --config_file examples/accelerate/{path.name} -m gavamoe_hf" in path.read_text()
    names = [
        config.fsdp_config.get("fsdp_transformer_layer_cls_to_wrap"),
        config.deepspeed_config.get("deepspeed_moe_layer_cls_names"),
    ]
    for name in filter(None, names):
        assert get_module_class_from_name(tiny_model(), name) is not None
