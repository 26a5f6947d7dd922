"""
What only a GPU shows, in bfloat16, in one call of under eight minutes: `make gpu-check`.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --quick --checks experts agreement     # small shapes, to try it; on a CPU too

Each check runs in a process of its own, within a time limit, so that one failure hides no other. Leaves
`benchmark.json` and `benchmark.md` in `output_dir`, with the rows that `run.py` describes. Weights are random, at the
shapes of SmolLM2-135M and of Llama-3.1-8B. Without a GPU all shapes are small, and what only a GPU has is left out.
"""

import argparse
import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run import as_markdown, run_modules
from timing import as_row, compare
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from gavamoe_hf import GaVaMoEConfig, GaVaMoEForCausalLM, GaVaMoEProcessor, load_checkpoint
from gavamoe_hf.data import SyntheticConfig, generate_synthetic
from gavamoe_hf.presets import llama_3_1_8b, llama_3_1_8b_paper
from gavamoe_hf.upcycling_gavamoe import count_parameters

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = dict(num_users=1000, num_items=1000)
SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    num_local_experts=12,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    user_token_id=5,
    item_token_id=6,
)
# Of either shape where it is to be small
QUICK = dict(
    vocab_size=320,
    user_token_id=5,
    item_token_id=6,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    moe_intermediate_size=32,
    vae_embedding_size=16,
    vae_intermediate_size=32,
    latent_size=8,
    eos_token_id=2,
    bos_token_id=1,
    max_position_embeddings=512,
)
ROWS, PROMPT_TOKENS, NEW_TOKENS = 32, 60, 64
ROUNDS = 3
SECONDS = 150  # of a check, at most
_MIB = 2**20
# Rounding of bfloat16 (8 bits) in sums of a few products
_BFLOAT16_ERROR = 0.02


def smollm2(quick: bool) -> GaVaMoEConfig:
    return GaVaMoEConfig(**{**SMOLLM2, **SIZES, **(QUICK if quick else {})})


def paper_8b(quick: bool) -> GaVaMoEConfig:
    return llama_3_1_8b_paper(**SIZES, **(QUICK if quick else {}))


def make_model(config: GaVaMoEConfig, dtype: torch.dtype = torch.bfloat16) -> GaVaMoEForCausalLM:
    torch.manual_seed(0)
    config.dtype = dtype
    with DEVICE:
        model = GaVaMoEForCausalLM._from_config(config, dtype=dtype)
    model.rating_model.float()
    return model.eval()


def make_inputs(config: GaVaMoEConfig, rows: int = ROWS) -> dict[str, torch.Tensor]:
    input_ids = torch.randint(10, min(config.vocab_size, 10_000), (rows, PROMPT_TOKENS), device=DEVICE)
    input_ids[:, 20], input_ids[:, 21] = config.user_token_id, config.item_token_id
    pairs = {name: torch.randint(1000, (rows,), device=DEVICE) for name in ("user_id", "item_id")}
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **pairs}


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def synchronized(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], None]:
    """The function with its arguments, ending when the GPU has."""

    def call() -> None:
        function(*args, **kwargs)
        synchronize()

    return call


def memory_rows(
    name: str, reference: str, function: Callable[[], Any], expected_mib: Callable[[], float]
) -> list[dict]:
    """The most memory allocated while a function runs beside what was expected; no row where nothing counts it."""
    if DEVICE.type != "cuda":
        function()
        return []
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    return [value_row(name, reference, torch.cuda.max_memory_allocated() / _MIB, expected_mib(), "MiB")]


def value_row(name: str, reference: str, value: float, reference_value: float, unit: str, **row: Any) -> dict[str, Any]:
    amounts = {"value": value, "reference_value": reference_value, "unit": unit}
    return {"name": name, "reference": reference, "ratio": value / reference_value, **amounts, **row}


def at_most(name: str, value: float, limit: float, unit: str) -> dict[str, Any]:
    """A row that is met where a value is no higher than its limit."""
    return {
        "name": name,
        "reference": f"at most {limit:g}",
        "ratio": value / (limit or 1),
        "target": int(limit > 0),
    } | {
        "value": value,
        "unit": unit,
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm()).item()


def parameter_mib(model: torch.nn.Module) -> float:
    return sum(parameter.nbytes for parameter in model.parameters()) / _MIB


def experts(quick: bool) -> list[dict[str, Any]]:
    """Outputs and gradients of a layer's experts against float32, and their time against one expert after another."""
    rows = []
    for name, config in (("SmolLM2", smollm2(quick)), ("8B", paper_8b(quick))):
        config = copy.deepcopy(config)
        config.num_hidden_layers, config.vocab_size, config.eos_token_id = 1, 320, 2
        model = make_model(config)
        block = model.model.layers[0].mlp
        exact = copy.deepcopy(block).float()
        states = torch.randn(ROWS, PROMPT_TOKENS, config.hidden_size, device=DEVICE, dtype=torch.bfloat16)
        gates = torch.randint(config.num_clusters, (ROWS,), device=DEVICE)
        # The same choice of experts in both: near ties fall otherwise in another precision
        with torch.no_grad():
            _, weights, index = block.gate(states, gates)
        tokens = states.flatten(0, 1)

        def step(layer: Any, tokens: torch.Tensor = tokens, index: Any = index, weights: Any = weights) -> torch.Tensor:
            layer.zero_grad()
            output = layer.experts(tokens.to(layer.experts.down_proj.dtype), index, weights.float().to(tokens.dtype))
            output.float().square().mean().backward()
            return output

        model.set_experts_implementation("eager")
        expected = step(exact)
        model.set_experts_implementation("grouped_mm")
        found = step(block)
        rows.append(
            at_most(f"experts, {name}, output in bfloat16", relative_error(found, expected), 0.02, "rel. error")
        )
        for part in ("gate_up_proj", "down_proj"):
            error = relative_error(getattr(block.experts, part).grad, getattr(exact.experts, part).grad)
            rows.append(at_most(f"experts, {name}, gradient of {part}", error, 2 * _BFLOAT16_ERROR, "rel. error"))

        def with_implementation(implementation: str, model: Any = model, block: Any = block, step: Any = step) -> None:
            model.set_experts_implementation(implementation)
            step(block)

        timed = compare(
            synchronized(with_implementation, "grouped_mm"), synchronized(with_implementation, "eager"), ROUNDS
        )
        rows.append(as_row(f"experts, {name}, forward and backward, grouped_mm", "eager", timed))
    return rows


def trained_tiny(quick: bool) -> tuple[GaVaMoEForCausalLM, GaVaMoEProcessor, Any]:
    """The quickstart's checkpoint where it is, else a random model of its shape, with synthetic records."""
    from gavamoe_hf.training.building import ModelArguments, build_model, build_processor

    records = generate_synthetic(
        SyntheticConfig(num_users=24, num_items=12, records_per_user=8) if quick else None
    ).records
    quickstart = Path("outputs/quickstart")
    if not quick and (quickstart / "model.safetensors").is_file():
        return *load_checkpoint(quickstart), records
    sizes = dict(hidden_size=64, num_hidden_layers=2, moe_intermediate_size=32, vocab_size=600)
    arguments = ModelArguments(**(sizes if quick else {}))
    torch.manual_seed(0)
    processor = build_processor(records["train"], arguments)
    return build_model(processor, arguments).eval(), processor, records


def agreement(quick: bool) -> list[dict[str, Any]]:
    """A model on the GPU against itself on the CPU: ratings, gates, logits, explanations; then its gates in 16 bits."""
    model, processor, _ = trained_tiny(quick)
    other = copy.deepcopy(model).to(DEVICE)
    users = torch.arange(len(processor.users)).repeat_interleave(len(processor.items))
    items = torch.arange(len(processor.items)).repeat(len(processor.users))
    gates, ratings = model.gate_index(users, items), model.predict_rating(users, items)

    def differences(name: str, moved: GaVaMoEForCausalLM) -> list[dict[str, Any]]:
        different = (gates != moved.gate_index(users, items).cpu()).sum().item()
        error = (ratings - moved.predict_rating(users, items).float().cpu()).abs().max().item()
        return [
            at_most(f"{name} beside the CPU in float32, other gates, of {len(users):,}", different, 0, "pairs"),
            at_most(f"{name} beside the CPU in float32, ratings", error, 1e-3, "stars"),
        ]

    rows = differences("float32", other)
    some = torch.randperm(len(users), generator=torch.Generator().manual_seed(0))[:64]
    pairs = {
        "user": [processor.users[index] for index in users[some]],
        "item": [processor.items[index] for index in items[some]],
    }
    batch = processor(**pairs, rating=4.0)
    with torch.no_grad():
        logits, moved = (each(**batch.to(each.device)).logits.cpu() for each in (model, other))
    rows.append(at_most("float32 beside the CPU, logits", (logits - moved).abs().max().item(), 1e-2, "nats"))
    texts, moved = (each.explain(processor, **pairs, do_sample=False) for each in (model, other))
    count = sum(mine.explanation != theirs.explanation for mine, theirs in zip(texts, moved, strict=True))
    rows.append(at_most("float32 beside the CPU, other greedy explanations, of 64", count, 2, "texts"))
    return rows + differences("bfloat16", other.to(torch.bfloat16))


def prefill_and_decoding(name: str, config: GaVaMoEConfig) -> list[dict[str, Any]]:
    """Prefill by grouped and by eager experts; decoding with a static cache and CUDA graphs, and without."""
    model, inputs = make_model(config), make_inputs(config)

    def prefill(implementation: str) -> None:
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            model(**inputs, logits_to_keep=1)

    timed = compare(synchronized(prefill, "grouped_mm"), synchronized(prefill, "eager"), ROUNDS)
    rows = [as_row(f"{name}, prefill of {inputs['input_ids'].numel():,} tokens, grouped_mm", "eager experts", timed)]
    model.set_experts_implementation("grouped_mm")
    options = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    plain = synchronized(model.generate, **inputs, **options)
    rows += memory_rows(f"{name}, peak memory of decoding", "the parameters", plain, lambda: parameter_mib(model))
    if DEVICE.type != "cuda":
        return rows
    # With a static cache on a GPU, generate compiles the decode step and captures it in a CUDA graph
    graph = synchronized(model.generate, **inputs, **options, cache_implementation="static")
    timed = compare(graph, plain, ROUNDS, warmups=1)
    rates = [ROWS * NEW_TOKENS / timed[key] for key in ("seconds", "reference_seconds")]
    rows.append(as_row(f"{name}, {ROWS} rows, generation with a CUDA graph", "without", timed))
    rows.append(value_row(f"{name}, {ROWS} rows, rate with a CUDA graph", "without", *rates, "tokens/s"))
    return rows


def decoding(quick: bool) -> list[dict[str, Any]]:
    return prefill_and_decoding("SmolLM2", smollm2(quick))


def decoding_8b(quick: bool) -> list[dict[str, Any]]:
    return prefill_and_decoding("8B", paper_8b(quick))


def waits_of_a_decode_step(model: Any, **inputs: torch.Tensor) -> list[str]:
    """The places at which a decode step with a static cache waits for the GPU."""
    token = torch.full((ROWS, 1), 10, device=DEVICE)
    cache = StaticCache(config=model.config, max_cache_len=PROMPT_TOKENS + 2)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        model(input_ids=token, past_key_values=cache, **inputs)
        synchronize()
        warnings.simplefilter("always")
        caught.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(input_ids=token, past_key_values=cache, **inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Not the mode's own notice that it is a prototype
    messages = [(str(warning.message), warning) for warning in caught]
    found = [warning for text, warning in messages if "synchroniz" in text and "prototype" not in text]
    return [f"{Path(warning.filename).name}:{warning.lineno}" for warning in found]


def host_waits(quick: bool) -> list[dict[str, Any]]:
    """How often a decode step with the gate known waits for the GPU: no oftener than a Llama's."""
    if DEVICE.type != "cuda":
        return []
    config = smollm2(quick)
    own = waits_of_a_decode_step(make_model(config), gate_index=torch.zeros(ROWS, dtype=torch.long, device=DEVICE))
    with DEVICE:
        llama = LlamaForCausalLM(LlamaConfig.from_dict(config.to_dict())).eval()
    others = waits_of_a_decode_step(llama)
    name = f"SmolLM2, host waits in a decode step ({', '.join(own) or 'nowhere'})"
    return [at_most(name, len(own), len(others), "waits") | {"reference": f"a Llama's ({', '.join(others) or 'none'})"}]


def training(quick: bool) -> list[dict[str, Any]]:
    """The model's own step: its time beside that of its matrix products at a large one's rate, and its memory."""
    config = smollm2(quick)
    model, inputs = make_model(config).train(), make_inputs(config)
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    batch = inputs | {"labels": inputs["input_ids"], "rating": torch.full((ROWS,), 4.0, device=DEVICE)}

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    tokens = inputs["input_ids"].numel()
    size = 256 if quick else 8192
    left, right = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    timed = compare(synchronized(step), synchronized(torch.mm, left, right), ROUNDS, warmups=2)
    # Forward and backward, two operations for each parameter that a token uses; attention adds a percent here
    scale = 6 * count_parameters(model)["active"] * tokens / (2 * size**3)
    products = {**timed, "reference_seconds": scale * timed["reference_seconds"], "ratio": timed["ratio"] / scale}
    del products["processor_ratio"], left, right
    row = as_row(f"SmolLM2, step of {tokens:,} tokens", f"its products at the rate of one of {size:,}", products)
    # Parameter, gradient and the two moments
    name, reference = "SmolLM2, peak memory of a step", "weights, gradients, moments"
    return [row, *memory_rows(name, reference, step, lambda: 4 * parameter_mib(model))]


def explanation_trainer(config: GaVaMoEConfig, steps: int, quantized: bool = False, **options: Any) -> list[dict]:
    """`GaVaMoESFTTrainer` on tokens drawn at random, of which few differ, so that the loss has to fall."""
    from datasets import Dataset

    from gavamoe_hf.training.dry_run import memory_estimate
    from gavamoe_hf.training.lora import LoraArguments, lora_config, quantization_config
    from gavamoe_hf.training.sft_config import GaVaMoESFTConfig
    from gavamoe_hf.training.sft_trainer import GaVaMoESFTTrainer

    name = options.pop("name")
    lora = LoraArguments(use_peft=options.pop("lora"), load_in_4bit=quantized)
    processor = trained_tiny(quick=True)[1]
    length, scored, rows = PROMPT_TOKENS + 20, 20, 8
    input_ids = torch.randint(10, 40, (rows, length), generator=torch.Generator().manual_seed(0))
    input_ids[:, 20], input_ids[:, 21] = config.user_token_id, config.item_token_id
    labels = input_ids.clone()
    labels[:, :-scored] = -100
    columns = {"input_ids": input_ids.tolist(), "labels": labels.tolist(), "rating": [4.0] * rows}
    pairs = {"user_id": list(range(rows)), "item_id": list(range(rows))}
    examples = Dataset.from_dict({**columns, **pairs})
    with tempfile.TemporaryDirectory() as folder:
        args = GaVaMoESFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=rows,
            logging_steps=1,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=DEVICE.type == "cpu",
            **options,
        )
        model = make_model(config, torch.bfloat16 if lora.use_peft else torch.float32)
        peft_config = lora_config(lora, args, config)
        if quantized:
            model.save_pretrained(f"{folder}/base")
            quantization = quantization_config(lora, peft_config.modules_to_save, torch.bfloat16)
            del model
            model = GaVaMoEForCausalLM.from_pretrained(
                f"{folder}/base", quantization_config=quantization, device_map={"": DEVICE}
            )
        trainer = GaVaMoESFTTrainer(model, args, examples, processor=processor, peft_config=peft_config)
        memory = memory_rows(
            f"{name}, peak memory of training",
            "as a dry run estimates it",
            trainer.train,
            lambda: sum(memory_estimate(trainer.model, config, args, length, scored, quantized).values()) / _MIB,
        )
        history = [entry for entry in trainer.state.log_history if "nll" in entry]
        seconds = trainer.state.log_history[-1]["train_runtime"]
    found = [entry["nll"] for entry in history]
    return [
        {"name": f"{name}, nll after {steps} steps", "reference": "of the first step", "target": 0.99}
        | {"ratio": found[-1] / found[0], "value": found[-1], "reference_value": found[0], "unit": "nats"},
        *memory,
        {"name": f"{name}, a step of {rows * length:,} tokens", "reference": "none", "ratio": seconds / steps}
        | {"value": rows * length * steps / seconds, "unit": "tokens/s, first steps included"},
    ]


def trainer(quick: bool) -> list[dict[str, Any]]:
    """Stage 2 in full, as `gavamoe train` does it: float32 weights, bfloat16 products."""
    return explanation_trainer(smollm2(quick), 20, name="SmolLM2, trainer", lora=False, learning_rate=1e-3)


def lora_8b(quick: bool) -> list[dict[str, Any]]:
    """A LoRA step of Llama-3.1-8B with shared experts, the recipe's kind."""
    config = llama_3_1_8b(**SIZES, **(QUICK | {"shared_expert_intermediate_size": 128} if quick else {}))
    return explanation_trainer(config, 10, name="8B, LoRA", lora=True, learning_rate=1e-3)


def qlora(quick: bool) -> list[dict[str, Any]]:
    """A QLoRA step, by bitsandbytes' own kernels."""
    return explanation_trainer(smollm2(quick), 10, quantized=True, name="SmolLM2, QLoRA", lora=True, learning_rate=1e-3)


def export(quick: bool) -> list[dict[str, Any]]:
    """Logits and greedy tokens of an export in 16 bits beside the model's, for each cluster."""
    from gavamoe_hf.export import ExportedRouter, export_standard

    model, processor, records = trained_tiny(quick)
    model = model.to(DEVICE, torch.bfloat16)
    errors, tokens, equal = [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        folders = {path.name: path for path in export_standard(model, processor, f"{folder}/export")}
        router = ExportedRouter(f"{folder}/export")
        standard = {
            name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(DEVICE).eval()
            for name, path in folders.items()
        }
        for record in records["test"].select(range(min(24, len(records["test"])))):
            request = router.request(record["user"], record["item"], rating=record["rating"])
            inputs = processor(user=record["user"], item=record["item"], rating=record["rating"]).to(DEVICE)
            theirs = standard[request.model]
            prompt = torch.tensor([request.prompt_token_ids], device=DEVICE)
            with torch.no_grad():
                kept = [token for token in range(len(processor.tokenizer)) if token not in model._placeholders()]
                expected, found = model(**inputs).logits[0][:, kept], theirs(prompt).logits[0][:, kept]
            errors.append(relative_error(found, expected))
            options = dict(max_new_tokens=16, do_sample=False)
            mine = model.generate(**inputs, **options)[0, prompt.shape[1] :].tolist()
            other = theirs.generate(prompt, **options)[0, prompt.shape[1] :].tolist()
            tokens += len(mine)
            equal += sum(left == right for left, right in zip(mine, other, strict=False))
    return [
        at_most("export in bfloat16, logits, largest of all pairs", max(errors), 3 * _BFLOAT16_ERROR, "rel. error"),
        value_row("export in bfloat16, equal greedy tokens", "all", equal, tokens, "tokens"),
    ]


def both_stages(quick: bool) -> list[dict[str, Any]]:
    """Both trainers on synthetic data, as `gavamoe train` calls them: error of the ratings, and what is said then."""
    from gavamoe_hf.training.building import ModelArguments, build_model, build_processor
    from gavamoe_hf.training.rating_trainer import RatingDataset, RatingTrainer, RatingTrainingArguments
    from gavamoe_hf.training.sft_config import GaVaMoESFTConfig
    from gavamoe_hf.training.sft_trainer import GaVaMoESFTTrainer

    records = trained_tiny(quick)[2]
    arguments = ModelArguments(hidden_size=64, num_hidden_layers=2, vocab_size=600)
    processor = build_processor(records["train"], arguments)
    model = build_model(processor, arguments)
    ratings = {split: RatingDataset.from_records(records[split], processor) for split in records}
    with tempfile.TemporaryDirectory() as folder:
        common = dict(use_cpu=DEVICE.type == "cpu", report_to="none", disable_tqdm=True, logging_steps=100)
        short = dict(num_train_epochs=1, autoencoder_epochs=1, bias_epochs=1, refinement_epochs=1) if quick else {}
        args = RatingTrainingArguments(f"{folder}/rating", **common, **short)
        rating_trainer = RatingTrainer(model.rating_model, args, ratings["train"], ratings["validation"])
        seconds = rating_trainer.train().metrics["train_runtime"]
        args = GaVaMoESFTConfig(f"{folder}/explanations", learning_rate=1e-3, max_steps=100, **common)
        trainer = GaVaMoESFTTrainer(model, args, records["train"], records["validation"], processor=processor)
        nll = [trainer.evaluate()["eval_nll"]]
        trainer.train()
        nll.append(trainer.evaluate()["eval_nll"])
    test = records["test"]
    predicted = model.predict_rating(
        [processor.user_index(user) for user in test["user"]], [processor.item_index(item) for item in test["item"]]
    )
    truth = torch.tensor(test["rating"])
    errors = [(truth - guess).square().mean().sqrt().item() for guess in (predicted.float().cpu(), truth.mean())]
    (explained,) = model.explain(processor, user=test["user"][0], item=test["item"][0], max_new_tokens=8)
    rows = [
        value_row("stage 1, RMSE of test ratings", "of the mean rating", *errors, "stars"),
        value_row("stage 2, validation nll after 100 steps", "before", nll[1], nll[0], "nats"),
    ]
    # Trained too little to be better where shapes are small
    rows = rows if quick else [row | {"target": target} for row, target in zip(rows, (0.6, 0.8), strict=True)]
    rate = len(ratings["train"]) / seconds
    name = f"stage 1, {seconds:.0f} s for {len(ratings['train']):,} ratings, then said: {explained.explanation!r}"
    return [*rows, {"name": name, "reference": "none", "ratio": rate, "value": rate, "unit": "ratings/s"}]


CHECKS = (
    "agreement",
    "experts",
    "host_waits",
    "training",
    "trainer",
    "export",
    "qlora",
    "both_stages",
    "decoding",
    "lora_8b",
    "decoding_8b",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu_check"))
    parser.add_argument("--quick", action="store_true", help="Small shapes; always without a GPU.")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=CHECKS, help="All if not given.")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("benchmark").setLevel(logging.INFO)
    names = [f"gpu:{check}" for check in args.checks]
    quick = args.quick or DEVICE.type == "cpu"
    report = run_modules(names, quick, torch.get_num_threads(), args.output_dir, SECONDS)
    print(as_markdown(report), end="")
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
