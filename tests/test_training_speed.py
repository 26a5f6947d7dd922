"""What makes training fast changes no number: the fast paths against slow ones, and which tensors are made at all."""

import pytest
import torch
import torch.nn.functional as F
from references import make_trainer, random_prompts, spread_clusters, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl import SFTTrainer

from gavamoe_hf.training import token_loss
from gavamoe_hf.training.token_loss import score_tokens


class NewTensors(TorchDispatchMode):
    """Keeps operation and shape of every tensor with memory of its own; a view or an in-place result has none."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        known = {
            leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in known:
                self.made.append((str(operation), leaf.shape))
        return result


def slow_scores(logits, targets):
    log_probabilities = logits.float().log_softmax(dim=-1)
    nll = F.nll_loss(log_probabilities, targets, reduction="none")
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    return nll, entropy, (logits.argmax(dim=-1) == targets).float()


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_scores_of_tokens_and_their_gradient(monkeypatch, chunk_size, dtype, tolerance):
    monkeypatch.setitem(token_loss._CHUNK_ELEMENTS, "cpu", chunk_size * 50)
    values = (torch.randn(7, 50) * 4).to(dtype)
    targets = torch.randint(50, (7,))
    targets[:3] = values[:3].argmax(dim=-1)
    weights = torch.rand(7)
    results = []
    for score in (score_tokens, slow_scores):
        leaf = values.clone().requires_grad_()
        scores = score(leaf * 1, targets)  # a copy, as the logits of a head are no leaf
        (scores[0] * weights).sum().backward()
        results.append((*(each.detach() for each in scores), leaf.grad))
    assert results[0][-1].dtype == dtype
    for fast, slow in zip(*results, strict=True):
        assert torch.allclose(fast, slow, atol=tolerance, rtol=1e-5)
    assert results[0][2][:3].tolist() == [1, 1, 1] and results[0][2].sum() < 7


def test_scores_of_extreme_logits_and_of_no_token():
    logits = torch.tensor([[3e4, 0.0, -3e4], [0.0, 0.0, 0.0]], requires_grad=True)
    nll, entropy, correct = score_tokens(logits * 1, torch.tensor([2, 1]))
    assert nll.tolist() == pytest.approx([6e4, 1.0986123], rel=1e-6)
    assert entropy.tolist() == pytest.approx([0.0, 1.0986123], rel=1e-6)
    assert not entropy.requires_grad and not correct.requires_grad
    nll.sum().backward()
    assert logits.grad.flatten().tolist() == pytest.approx([1, 0, -1, 1 / 3, -2 / 3, 1 / 3], rel=1e-6)
    leaf = torch.zeros(0, 5, requires_grad=True)
    scores = score_tokens(leaf * 1, torch.zeros(0, dtype=torch.long))
    scores[0].sum().backward()
    assert [len(each) for each in scores] == [0, 0, 0] and leaf.grad.shape == (0, 5)


def test_a_second_backward_pass_raises_instead_of_reading_overwritten_logits():
    logits = torch.randn(4, 6, requires_grad=True)
    loss = score_tokens(logits * 1, torch.arange(4))[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_all_parameters_equal_those_of_full_logits(tiny, planted, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    trainer = make_trainer(tiny, planted, tmp_path, alpha=0.3)
    model = trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    # Rows of several lengths, or padding would not be in question
    assert len(set(batch["attention_mask"].sum(dim=-1).tolist())) > 1
    parameters = {name: value for name, value in model.named_parameters() if "population" not in name}
    losses, gradients = [], []
    for loss in (
        trainer.compute_loss(model, dict(batch)),
        model(**batch, output_router_logits=True).loss,
    ):
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(parameters.values())))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, fast, slow in zip(parameters, *gradients, strict=True):
        assert torch.allclose(fast, slow, atol=1e-6, rtol=1e-4), name


def test_without_the_elbo_the_loss_is_that_of_sft_trainer(tiny, planted, tmp_path):
    trainer = make_trainer(tiny, planted, tmp_path, alpha=0.0)
    model = trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1  # which `train` sets
    weight = model.model.layers[0].self_attn.q_proj.weight
    results = []
    for compute_loss in (trainer.compute_loss, lambda *args: SFTTrainer.compute_loss(trainer, *args)):
        loss = compute_loss(model, dict(batch), False, (batch["labels"] != -100).sum())
        results.append((loss.item(), torch.autograd.grad(loss, weight)[0]))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)
    # The same metrics as well, each of one step
    logged = trainer._metrics["train"]
    for name in ("entropy", "mean_token_accuracy", "aux_loss"):
        assert logged[name][0] == pytest.approx(logged[name][1], abs=1e-5), name


def test_a_step_makes_logits_of_explanation_tokens_alone_and_once(tiny, planted, tmp_path, monkeypatch):
    trainer = make_trainer(tiny, planted, tmp_path)
    model = trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    vocabulary, num_scored = model.config.vocab_size, (batch["labels"] != -100).sum().item()
    monkeypatch.setitem(token_loss._CHUNK_ELEMENTS, "cpu", 5 * vocabulary)
    with NewTensors() as tensors:
        trainer.compute_loss(model, dict(batch)).backward()
    rows = [shape.numel() // vocabulary for _, shape in tensors.made if shape[-1:] == (vocabulary,)]
    assert 5 < num_scored < 0.8 * batch["input_ids"].numel()
    # One tensor of logits, which becomes their gradient; all others are of a chunk
    assert [count for count in rows if count > 5] == [num_scored]


def test_no_step_copies_a_table(tiny, planted, tmp_path):
    trainer = make_trainer(tiny, planted, tmp_path)
    model = trainer.model.train()
    tables = [model.rating_model.user_embeddings.weight, model.rating_model.item_embeddings.weight]
    batch = next(iter(trainer.get_train_dataloader()))
    with NewTensors() as tensors:
        trainer.compute_loss(model, dict(batch)).backward()
    made = [shape for name, shape in tensors.made if shape in {table.shape for table in tables}]
    # The gradients, which are dense: what AdamW needs
    assert sorted(made) == sorted(table.shape for table in tables)
    assert all(table.grad.shape == table.shape for table in tables)


def test_neither_routing_nor_generation_copies_a_table():
    # Sizes that no other tensor has
    model = spread_clusters(tiny_model(num_users=211, num_items=307, vae_embedding_size=16)).eval()
    pointers = [
        table.weight.data_ptr() for table in (model.rating_model.user_embeddings, model.rating_model.item_embeddings)
    ]
    input_ids, mask = random_prompts([9, 6])
    pairs = dict(user_id=torch.tensor([210, 2]), item_id=torch.tensor([4, 306]))
    with NewTensors() as tensors:
        model.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=3, **pairs)
    assert len(tensors.made) > 100
    assert not [made for made in tensors.made if made[1].numel() >= 211 * 16]
    assert pointers == [
        table.weight.data_ptr() for table in (model.rating_model.user_embeddings, model.rating_model.item_embeddings)
    ]
