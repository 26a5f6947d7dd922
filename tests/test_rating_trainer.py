"""Stage 1: what its phases do, what it finds on planted data, and what it does with data that has little to learn."""

import math
from pathlib import Path

import pytest
import torch
from references import TINY_MODEL
from sklearn.metrics import adjusted_rand_score
from transformers import TrainerCallback

from gavamoe_hf import GaVaMoEConfig, GaVaMoERatingModel
from gavamoe_hf.data import SyntheticConfig, generate_synthetic
from gavamoe_hf.evaluation import baseline_scores, rating_errors
from gavamoe_hf.training.building import ModelArguments, build_model, build_processor, build_rating_model
from gavamoe_hf.training.distillation import calibrate_decoder, distillation_loss
from gavamoe_hf.training.initialization import (
    choose_num_clusters,
    cluster_shares,
    initialize_decoder_bias,
    initialize_mixture,
    initialize_tables,
    leave_one_out_offsets,
    predict_pairs,
    user_profiles,
)
from gavamoe_hf.training.rating_trainer import RatingDataset, RatingTrainer, RatingTrainingArguments

HALF_STARS = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]
TO_TEN = [float(level) for level in range(1, 11)]


def test_rating_dataset_hands_out_whole_batches():
    data = RatingDataset(torch.tensor([4, 5, 6]), torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0, 5.0]))
    batch = data.__getitems__([2, 0])
    assert batch["user_id"].tolist() == [6, 4]
    assert batch["rating"].tolist() == [5.0, 1.0]
    with pytest.raises(ValueError, match="one user, item and rating for each record, but got 3, 3 and 2"):
        RatingDataset(torch.zeros(3), torch.zeros(3), torch.zeros(2))


def test_rating_trainer_refuses_records(planted, tmp_path):
    model = GaVaMoERatingModel(GaVaMoEConfig(vae_embedding_size=16))
    with pytest.raises(TypeError, match=r"Did you mean RatingDataset\.from_records"):
        RatingTrainer(model, RatingTrainingArguments(str(tmp_path)), planted.records["train"], None)


def test_decoder_bias_is_the_marginal_distribution():
    model = GaVaMoERatingModel(GaVaMoEConfig(vae_embedding_size=16))
    initialize_decoder_bias(model, torch.tensor([5.0, 5.0, 5.0, 4.0, 1.0]))
    # Counts 1 0 0 1 3 with one pseudo-count each: 2 1 1 2 4 of 10
    assert torch.allclose(model.decoder_output.bias.exp(), torch.tensor([0.2, 0.1, 0.1, 0.2, 0.4]))


def test_biases_and_what_leaving_one_rating_out_changes():
    model = GaVaMoERatingModel(GaVaMoEConfig(num_users=4, num_items=3, vae_embedding_size=16))
    users, items = torch.tensor([0, 0, 1, 1, 2, 0]), torch.tensor([0, 1, 0, 1, 1, 2])
    ratings = torch.tensor([5.0, 3.0, 4.0, 1.0, 2.0, 5.0])
    initialize_tables(model, users, items, ratings)
    offsets = leave_one_out_offsets(model, users, items, ratings)

    def bias(values):  # shrunken by 10 ratings; a whole scale of 1 to 5 is 12 units
        return sum(values) / (len(values) + 10) * 12 / 4

    deviations = [rating - 20 / 6 for rating in ratings.tolist()]
    of_item = [[deviations[n] for n in range(6) if items[n] == item] for item in range(3)]
    residuals = [deviations[n] - bias(of_item[items[n]]) * 4 / 12 for n in range(6)]
    of_user = [[residuals[n] for n in range(6) if users[n] == user] for user in range(4)]
    assert model.item_embeddings.weight[:, 0].tolist() == pytest.approx([bias(values) for values in of_item], abs=1e-5)
    assert model.user_embeddings.weight[:, 0].tolist() == pytest.approx([bias(values) for values in of_user], abs=1e-5)
    for n in range(6):
        user = bias([residuals[m] for m in range(6) if users[m] == users[n] and m != n])
        item = bias([deviations[m] for m in range(6) if items[m] == items[n] and m != n])
        expected = [user - bias(of_user[users[n]]), item - bias(of_item[items[n]])]
        assert offsets[n].tolist() == pytest.approx(expected, abs=1e-5)


def test_ratings_without_preferences_leave_the_tables_as_biases(tmp_path):
    """Where the autoencoder phase only learns noise by heart, the bias phase's result goes on."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        users = torch.randint(60, (count,), generator=generator)
        items = torch.randint(20, (count,), generator=generator)
        return RatingDataset(users, items, torch.randint(1, 6, (count,), generator=generator).float())

    torch.manual_seed(0)
    model = GaVaMoERatingModel(GaVaMoEConfig(num_users=60, num_items=20, vae_embedding_size=16, latent_size=8))
    users, items = (table.weight.detach().clone() for table in (model.user_embeddings, model.item_embeddings))
    args = RatingTrainingArguments(
        str(tmp_path), autoencoder_epochs=5, num_train_epochs=1, disable_tqdm=True, use_cpu=True
    )
    train = draw(300)
    trainer = RatingTrainer(model, args, train, draw(300))
    trainer.train()
    assert torch.equal(model.item_embeddings.weight[:, 1:], items[:, 1:])
    assert torch.equal(model.user_embeddings.weight[:, 4:], users[:, 4:])
    # The clusters' code: one-hot less its mean, on top of what was there
    code = model.user_embeddings.weight[:, 1:4] - users[:, 1:4]
    assert torch.allclose(code.sum(dim=0), torch.zeros(3), atol=1e-4)
    one_hot = (code - code.min(dim=0).values)[train.columns["user_id"].unique()]
    assert torch.allclose(one_hot.sort(dim=1).values, torch.tensor([0.0, 0.0, 1.0]).expand_as(one_hot), atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_mixture_takes_the_statistics_of_its_users_pairs():
    torch.manual_seed(0)
    config = GaVaMoEConfig(num_users=20, num_items=6, vae_embedding_size=16, latent_size=4, num_clusters=2)
    model = GaVaMoERatingModel(config)
    group = torch.arange(20) % 2
    model.user_embeddings.weight.data = torch.randn(20, 16) * 0.01 + torch.where(group == 0, 1.0, -1.0)[:, None]
    users, items = torch.arange(20).repeat_interleave(6), torch.arange(6).repeat(20)
    probabilities = initialize_mixture(model, users, items)
    clusters = probabilities.argmax(dim=-1)
    assert adjusted_rand_score(group, clusters) == 1.0
    latent = predict_pairs(model, users, items).latent_mean
    for cluster in range(2):
        members = latent[clusters[users] == cluster]
        assert torch.allclose(model.mixture.means[cluster], members.mean(dim=0), atol=1e-5)
        variance = members.var(dim=0, correction=0).clamp(min=1e-4)
        assert torch.allclose(model.mixture.log_variances[cluster].exp(), variance, rtol=1e-4)
    assert torch.allclose(model.mixture.log_weights().exp(), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match=r"at least 2 ways, one for each cluster, but got 1 of 1 users"):
        initialize_mixture(model, users[:6], items[:6])


@pytest.mark.slow
def test_stage_one_chooses_the_planted_groups_beats_the_biases_and_resumes(tmp_path):
    data = generate_synthetic(SyntheticConfig(seed=1))
    processor = build_processor(data.records["train"], ModelArguments(vocab_size=400))
    torch.manual_seed(1)
    arguments = ModelArguments(**TINY_MODEL, vocab_size=400, num_clusters="auto")
    whole = build_model(processor, arguments)
    model = whole.rating_model
    assert whole.config.num_clusters == 8
    ratings = {split: RatingDataset.from_records(data.records[split], processor) for split in data.records}
    args = RatingTrainingArguments(str(tmp_path), choose_num_clusters=True, disable_tqdm=True, use_cpu=True, seed=1)
    trainer = RatingTrainer(model, args, ratings["train"], ratings["validation"])
    trainer.train()

    whole.drop_gates()
    assert whole.config.num_clusters == 3
    assert all(layer.mlp.gate.weight.shape[0] == 3 for layer in whole.model.layers)
    columns = ratings["train"].columns
    posterior = predict_pairs(model, columns["user_id"], columns["item_id"]).cluster_posterior
    groups = [data.truth.user_group[user] for user in data.records["train"]["user"]]
    assert adjusted_rand_score(groups, posterior.argmax(dim=-1).numpy()) >= 0.9
    assert cluster_shares(model, columns["user_id"], columns["item_id"]).min() >= 0.05
    test = ratings["test"].columns
    errors = rating_errors(predict_pairs(model, test["user_id"], test["item_id"]).predicted_rating, test["rating"])
    baselines = baseline_scores(data.records["train"], data.records["validation"], data.records["test"])
    assert errors["rating_rmse"] < 0.7 * baselines["baseline_bias_rmse"]
    assert errors["rating_rmse"] < 0.7 * baselines["baseline_mean_rmse"]
    logged = {name for entry in trainer.state.log_history for name in entry}
    expected = {"reconstruction_loss", "kl_loss", "cluster_loss", "eval_rmse", "eval_mae", "eval_cluster_share_2"}
    assert expected <= logged

    again = build_model(processor, arguments).rating_model
    trainer = RatingTrainer(again, args, ratings["train"], ratings["validation"])
    trainer.train(resume_from_checkpoint=True)
    phases = {entry["phase"] for entry in trainer.state.log_history}
    assert "refinement" in phases and not phases & {"bias", "autoencoder"}
    assert again.config.num_clusters == 3


def test_kept_epoch_is_the_best_by_validation_loss(planted, tmp_path):
    processor = build_processor(planted.records["train"], ModelArguments(vocab_size=400))
    model = build_model(processor, ModelArguments(**TINY_MODEL, vocab_size=400)).rating_model
    ratings = {split: RatingDataset.from_records(planted.records[split], processor) for split in planted.records}
    args = RatingTrainingArguments(
        str(tmp_path),
        autoencoder_learning_rates=[1e-2],
        autoencoder_epochs=2,
        num_train_epochs=4,
        elbo_learning_rate=1e-2,
        refinement_epochs=0,
        min_cluster_share=0.0,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = RatingTrainer(model, args, ratings["train"], ratings["validation"])
    trainer.train()
    assert {entry["phase"] for entry in trainer.state.log_history} == {"bias", "autoencoder", "elbo"}
    elbo = [entry for entry in trainer.state.log_history if entry["phase"] == "elbo"]
    losses = [entry["eval_loss"] for entry in elbo if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


# Learning from a teacher


def test_distillation_loss_by_hand():
    # Teacher 1/4, 3/4; student 1/2, 1/2: log 2 whatever the teacher; student 4/5, 1/5: -1/4 log 4/5 - 3/4 log 1/5
    teacher = torch.tensor([[0.25, 0.75]]).log()
    assert distillation_loss(torch.zeros(1, 2), teacher).item() == pytest.approx(math.log(2), abs=1e-6)
    expected = -0.25 * math.log(0.8) - 0.75 * math.log(0.2)
    assert distillation_loss(torch.tensor([[0.8, 0.2]]).log(), teacher).item() == pytest.approx(expected, abs=1e-6)
    # Bernoulli: teacher 3/4, student 1/5
    student, teacher = torch.tensor([[0.2 / 0.8]]).log(), torch.tensor([[3.0]]).log()
    expected = -0.75 * math.log(0.2) - 0.25 * math.log(0.8)
    assert distillation_loss(student, teacher).item() == pytest.approx(expected, abs=1e-6)


def _calibration_case(likelihood="categorical"):
    torch.manual_seed(0)
    config = GaVaMoEConfig(
        num_users=40, num_items=20, vae_embedding_size=16, latent_size=8, rating_likelihood=likelihood
    )
    model = GaVaMoERatingModel(config)
    model.user_embeddings.weight.data *= 100
    users, items = torch.arange(40).repeat_interleave(20), torch.arange(20).repeat(40)
    logits = predict_pairs(model, users, items).rating_logits
    return model, users, items, logits


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_calibration_finds_the_scale_and_keeps_only_what_helps_on_held_out_ratings(likelihood):
    model, users, items, logits = _calibration_case(likelihood)
    generator = torch.Generator().manual_seed(1)
    if likelihood == "categorical":
        truth = (2 * logits).softmax(dim=-1)
        rating = torch.multinomial(truth, 1, generator=generator)[:, 0].float() + 1
    else:
        rating = 1 + 4 * torch.bernoulli((2 * logits[:, 0]).sigmoid(), generator=generator)
    half = torch.randperm(len(rating), generator=generator) < len(rating) // 2
    fitted = logits[half], rating[half]
    before = model.reconstruction_loss(logits[~half], rating[~half]).mean()
    returned = calibrate_decoder(model, *fitted, logits[~half], rating[~half])
    now = predict_pairs(model, users, items).rating_logits
    after = model.reconstruction_loss(now[~half], rating[~half]).mean()
    assert after < before - 0.01
    assert torch.allclose(returned, now[half], atol=1e-5)
    # Slope of the new logits over the old ones
    centred = logits - logits.mean(dim=0)
    scale = ((now - now.mean(dim=0)) * centred).sum() / centred.square().sum()
    assert scale.item() == pytest.approx(2, rel=0.3)

    # Fitted to ratings that the held-out ones contradict: nothing changes
    weight = model.decoder_output.weight.clone()
    assert torch.equal(calibrate_decoder(model, now[half], 6 - rating[half], now[~half], rating[~half]), now[half])
    assert torch.equal(model.decoder_output.weight, weight)


# Choosing the number of clusters


def _model_of_groups(sizes, spread=0.01):
    torch.manual_seed(0)
    config = GaVaMoEConfig(num_users=sum(sizes), num_items=12, vae_embedding_size=16, latent_size=8)
    model = GaVaMoERatingModel(config)
    centres = torch.randn(len(sizes), 16)
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    model.user_embeddings.weight.data = centres[group] + spread * torch.randn(len(group), 16)
    return model, torch.arange(len(group)), group


@pytest.mark.parametrize("count", [2, 3, 5])
def test_number_of_clusters_is_that_of_well_separated_groups(count):
    model, users, _ = _model_of_groups([10] * count)
    chosen, silhouettes = choose_num_clusters(user_profiles(model, users))
    assert chosen == count
    assert set(silhouettes) == set(range(2, 9))
    assert max(silhouettes.values()) == silhouettes[count] > 0.8


def test_number_of_clusters_is_below_the_number_of_users():
    model, users, _ = _model_of_groups([2, 2])
    chosen, silhouettes = choose_num_clusters(user_profiles(model, users))
    assert chosen == 2 and set(silhouettes) == {2, 3}
    with pytest.raises(ValueError, match=r"at least three users that differ.*got 2 of 2. Set `num_clusters`"):
        choose_num_clusters(user_profiles(model, users[:2]))


def test_number_is_chosen_where_there_are_fewer_users_than_the_most_clusters(tmp_path):
    ratings = [(user, item, 5.0 if (user % 2) == (item % 2) else 1.0) for user in range(6) for item in range(12)]
    model, _, _ = _train(tmp_path, ratings, 6, 12, num_clusters=8, choose_num_clusters=True, autoencoder_epochs=20)
    assert 2 <= model.config.num_clusters <= 5


def test_no_multi_gating_has_one_gate_whatever_the_number_of_clusters(planted):
    arguments = ModelArguments(**TINY_MODEL, vocab_size=400, num_clusters="auto", ablation="no_multi_gating")
    processor = build_processor(planted.records["train"], arguments)
    assert build_model(processor, arguments).config.num_clusters == 1
    assert build_rating_model(processor, arguments).config.num_clusters == 1


def test_number_of_clusters_as_an_option():
    assert ModelArguments(num_clusters=4).num_clusters == "4"
    assert ModelArguments(num_clusters="auto").chooses_num_clusters
    assert not ModelArguments(num_clusters="auto", ablation="no_multi_gating").chooses_num_clusters
    for wrong in ("0", "-1", "many", "2.5"):
        with pytest.raises(ValueError, match='`num_clusters` as a number from 1, or "auto", but got'):
            ModelArguments(num_clusters=wrong)


# Scales, likelihoods, and data with little to learn


def _train(folder, ratings, num_users, num_items, num_clusters=2, config=None, **options):
    """A short stage 1 on (user, item, rating) rows, a fourth of which are validation."""
    torch.manual_seed(0)
    model = GaVaMoERatingModel(
        GaVaMoEConfig(
            num_users=num_users,
            num_items=num_items,
            num_clusters=num_clusters,
            vae_embedding_size=16,
            vae_num_heads=2,
            vae_intermediate_size=16,
            latent_size=8,
            **(config or {}),
        )
    )
    columns = [torch.tensor(column) for column in zip(*ratings, strict=True)]
    held_out = torch.randperm(len(columns[0])) % 4 == 3
    train, validation = (RatingDataset(*(column[rows] for column in columns)) for rows in (~held_out, held_out))
    epochs = dict(bias_epochs=2, autoencoder_epochs=3, num_train_epochs=8, refinement_epochs=4)
    args = RatingTrainingArguments(
        str(folder), disable_tqdm=True, use_cpu=True, per_device_train_batch_size=8, **{**epochs, **options}
    )
    trainer = RatingTrainer(model, args, train, validation)
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    outputs = predict_pairs(model, *(column for column in columns[:2]))
    for name in ("predicted_rating", "cluster_posterior", "latent_mean"):
        assert outputs[name].isfinite().all(), name
    return model, outputs, columns


def _liking(levels, num_users=24, num_items=12):
    """Two groups of users, each of which likes one half of the items."""
    low, high = levels[len(levels) // 4], levels[-1]
    return [
        (user, item, high if (user % 2) == (item % 2) else low)
        for user in range(num_users)
        for item in range(num_items)
    ]


@pytest.mark.parametrize(
    ("likelihood", "levels"),
    [("categorical", HALF_STARS), ("bernoulli", HALF_STARS), ("categorical", TO_TEN), ("bernoulli", [0.0, 1.0])],
    ids=["categorical, half stars", "bernoulli, half stars", "categorical, 1 to 10", "bernoulli, 0 and 1"],
)
def test_likelihoods_and_scales(tmp_path, likelihood, levels):
    ratings = _liking(levels)
    config = dict(rating_likelihood=likelihood, rating_levels=levels)
    _, outputs, columns = _train(tmp_path, ratings, 24, 12, config=config, autoencoder_epochs=30)
    predicted, rating = outputs.predicted_rating, columns[2]
    assert predicted.min() >= levels[0] and predicted.max() <= levels[-1]
    spread = rating.max() - rating.min()
    assert (predicted - rating).abs().mean() < 0.2 * spread  # 0.5 for the mean
    clusters = outputs.cluster_posterior.argmax(dim=-1)
    assert adjusted_rand_score(columns[0] % 2, clusters) > 0.9


def test_one_user_and_one_cluster(tmp_path):
    ratings = [(0, item, 1.0 + item % 5) for item in range(12)]
    _, outputs, _ = _train(tmp_path, ratings, 1, 12, num_clusters=1)
    assert outputs.cluster_posterior.eq(1).all()


def test_one_item(tmp_path):
    ratings = [(user, 0, 5.0 if user % 2 else 1.0) for user in range(16)]
    _, outputs, _ = _train(tmp_path, ratings, 16, 1, min_cluster_share=0.0)
    assert outputs.cluster_posterior.argmax(dim=-1).unique().tolist() == [0, 1]


def test_users_with_a_single_rating(tmp_path):
    ratings = [(user, user % 5, float(1 + (user * 7) % 5)) for user in range(40)]
    _train(tmp_path, ratings, 40, 5, min_cluster_share=0.0)


def test_a_cluster_of_users_who_all_give_the_same_rating(tmp_path):
    ratings = [
        (user, item, 5.0 if user < 10 else float(1 + (user + item) % 4)) for user in range(20) for item in range(8)
    ]
    _, outputs, columns = _train(tmp_path, ratings, 20, 8, autoencoder_epochs=30, min_cluster_share=0.0)
    same = outputs.predicted_rating[columns[0] < 10]
    assert same.mean() > outputs.predicted_rating[columns[0] >= 10].mean() + 1


def test_ratings_that_are_all_equal_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"training ratings that differ, but all 12 are 4: there is no preference"):
        _train(tmp_path, [(n % 4, n % 3, 4.0) for n in range(16)], 4, 3)
    assert not any(tmp_path.iterdir())


def test_more_clusters_than_users_are_refused_before_training(tmp_path):
    ratings = [(n % 2, n % 3, 1.0 + n % 5) for n in range(12)]
    with pytest.raises(ValueError, match=r"as many users as clusters, but got 2 users .* for 3 clusters. Lower"):
        _train(tmp_path, ratings, 2, 3, num_clusters=3)
    with pytest.raises(ValueError, match=r"more columns in the tables than clusters, but got .* 16 for 16"):
        _train(tmp_path, [(n, 0, 1.0 + n % 5) for n in range(40)], 40, 1, num_clusters=16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_ratings_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match=r"finite ratings, but got (nan|inf)"):
        RatingDataset(torch.zeros(3), torch.zeros(3), torch.tensor([1.0, value, 2.0]))


def test_ids_outside_the_tables_and_empty_splits_are_refused_before_training(tmp_path):
    with pytest.raises(IndexError, match=r"`user_id` 4 is out of range"):
        _train(tmp_path, [(n % 5, n % 3, 1.0 + n % 5) for n in range(20)], 4, 3)
    with pytest.raises(ValueError, match="ratings in `eval_dataset`, but it is empty"):
        _train(tmp_path, [(n, n, 1.0 + n) for n in range(3)], 4, 3)


def test_a_failure_leaves_the_model_trainable_and_the_data_as_it_was(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("planned")

    monkeypatch.setattr("gavamoe_hf.training.rating_trainer.initialize_mixture", fail)
    torch.manual_seed(0)
    model = GaVaMoERatingModel(GaVaMoEConfig(num_users=24, num_items=12, vae_embedding_size=16, latent_size=8))
    train = RatingDataset(*(torch.tensor(column) for column in zip(*_liking([1.0, 2, 3, 4, 5]), strict=True)))
    args = RatingTrainingArguments(str(tmp_path), bias_epochs=1, autoencoder_epochs=1, disable_tqdm=True, use_cpu=True)
    trainer = RatingTrainer(model, args, train, train)
    with pytest.raises(RuntimeError, match="planned"):
        trainer.train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert set(trainer.train_dataset.columns) == {"user_id", "item_id", "rating"}


class StopAt(TrainerCallback):
    """Ends the process's run, as far as the trainer can tell, after so many epochs of a phase."""

    def __init__(self, phase, epoch):
        self.phase, self.epoch = phase, epoch

    def on_epoch_end(self, args, state, control, **_):
        if Path(args.output_dir).name == self.phase and round(state.epoch) == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("phase", "epoch"),
    [("bias", 1), ("autoencoder", 2), ("elbo", 1), ("elbo", 3), ("refinement", 1), ("refinement", 2)],
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(planted, tmp_path, phase, epoch):
    processor = build_processor(planted.records["train"], ModelArguments(vocab_size=400))
    ratings = {split: RatingDataset.from_records(planted.records[split], processor) for split in planted.records}

    def train(folder, callbacks=(), resume=False):
        torch.manual_seed(0)
        model = build_model(processor, ModelArguments(**TINY_MODEL, vocab_size=400)).rating_model
        epochs = {"bias_epochs": 2, "autoencoder_epochs": 2, "num_train_epochs": 6, "refinement_epochs": 3}
        rates = {"autoencoder_learning_rates": [1e-2], "elbo_learning_rate": 5e-2}
        args = RatingTrainingArguments(
            str(tmp_path / folder), disable_tqdm=True, use_cpu=True, early_stopping_patience=2, **epochs, **rates
        )
        trainer = RatingTrainer(model, args, ratings["train"], ratings["validation"], callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    expected = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("stopped", [StopAt(phase, epoch)])
    torch.rand(7)
    found = train("stopped", resume=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
