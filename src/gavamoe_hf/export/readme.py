"""The README of an export."""

from __future__ import annotations

from ..configuration_gavamoe import GaVaMoEConfig

_NAMES = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2-MoE", "llama": "Llama"}

_TEXT = """\
# Checkpoints for inference engines

{checkpoints} of the architecture {architecture}, made from a GaVaMoE of {num_users} users and {num_items} items by
gavamoe-hf. Any engine that serves {architecture} serves them, without code of their own.

| | what |
|---|---|
{folders}
| `router/`, `router.json` | rating model and processor, which tell the cluster of any pair |
{table}
Users and items are tokens: `<user_17>` is row 17 of `users` in `router/processor_config.json`, `<item_5>` row 5 of
`items`; `<user_population>` and `<item_population>` stand for anyone not known. No engine can generate them.

## Serve

One server for all clusters, with the extra `serve` of gavamoe-hf, which is `transformers[serving]`:

```bash
transformers serve
```

in this folder, or one for each cluster, of which these are alternatives:

```bash
vllm serve cluster_0 --served-model-name cluster_0
python -m sglang.launch_server --model-path cluster_0 --served-model-name cluster_0
python llama.cpp/convert_hf_to_gguf.py cluster_0 --outfile cluster_0.gguf && llama-server -m cluster_0.gguf
```
{note}
## Ask

```python
from gavamoe_hf.export import ExportedRouter

router = ExportedRouter(".")
request = router.request(user="a raw user id", item="a raw item id")
print(request.model, request.prompt)
```

`request.model` is the `model` to ask. Send `request.prompt_token_ids` as the `prompt` of `/v1/completions` where the
engine takes token ids (vLLM, SGLang); else `request.prompt`; or `request.messages` to `/v1/chat/completions`, where the
tokenizer puts a beginning-of-sequence token before any text: the prompt has one already. Ask for `"temperature": 0` to
get what `gavamoe explain` says.

The tokens of users and items are special tokens: whoever may send text to a server may write them, as with any chat
mark. Build prompts from what users type with `router.request`, whose `prompt_token_ids` never hold a special token that
came from text.
"""

_NORMALISED_NOTE = """
llama.cpp (tried: that of xllamacpp 2026.10.11549) does not rescale the weights of a Qwen2-MoE's chosen experts, as this
model asks (`norm_topk_prob`): its texts would differ. Export with `--format mixtral` for it.
"""


def readme(names: list[str], architecture: str, config: GaVaMoEConfig, has_table: bool) -> str:
    """The text for an export with these clusters' folders."""
    checkpoints = f"{len(names)} checkpoints" if len(names) > 1 else "A checkpoint"
    table = (
        "| `router.safetensors` | `cluster` and `positive` (the sentiment of the predicted rating) of each pair, "
        "uint8 [users + 1, items + 1]; the last row and column are the population |\n"
    )
    is_normalised = architecture == "qwen2_moe" and config.norm_topk_prob
    return _TEXT.format(
        checkpoints=checkpoints,
        architecture=_NAMES[architecture],
        num_users=config.num_users,
        num_items=config.num_items,
        folders="\n".join(f"| `{name}/` | the checkpoint of that cluster's pairs |" for name in names),
        table=table if has_table else "",
        note=_NORMALISED_NOTE if is_normalised else "",
    )
