"""The VAE-GMM: its KL against Monte Carlo, its loss against a loop, its numbers by hand, its behaviour."""

import math

import pytest
import torch
from references import all_pairs, naive_encode, naive_kl, naive_posterior, naive_rating_loss, tiny_config

from gavamoe_hf import GaVaMoERatingModel


@pytest.fixture
def rating_model() -> GaVaMoERatingModel:
    return make_rating_model()


def make_rating_model(**overrides) -> GaVaMoERatingModel:
    torch.manual_seed(0)
    model = GaVaMoERatingModel(tiny_config(**overrides)).eval()
    mixture = model.mixture
    with torch.no_grad():
        mixture.logits.copy_(torch.linspace(-0.7, 0.5, len(mixture.logits)))
        mixture.log_variances.uniform_(-0.8, 0.6)
        model.population_user.normal_(std=0.5)
        model.population_item.normal_(std=0.5)
    return model


def test_kl_against_monte_carlo(rating_model):
    # E_q[log q(z, c | x) - log p(z, c)], q(z, c | x) = N(z | mu, sigma^2) gamma_c
    mixture = rating_model.mixture
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(5, 4, generator=generator)
    log_variance = torch.randn(5, 4, generator=generator) * 0.7 - 0.5
    gamma = torch.randn(5, 3, generator=generator).softmax(dim=-1)
    closed = mixture.kl_divergence(gamma.log(), mean, log_variance)
    samples = 400_000
    for row in range(5):
        q_z = torch.distributions.Normal(mean[row], (log_variance[row] / 2).exp())
        q_c = torch.distributions.Categorical(gamma[row])
        z = mean[row] + torch.randn(samples, 4, generator=generator) * q_z.scale
        c = torch.multinomial(gamma[row], samples, replacement=True, generator=generator)
        p_c = torch.distributions.Categorical(logits=mixture.logits)
        p_z = torch.distributions.Normal(mixture.means[c], (mixture.log_variances[c] / 2).exp())
        log_ratio = q_z.log_prob(z).sum(-1) + q_c.log_prob(c) - p_c.log_prob(c) - p_z.log_prob(z).sum(-1)
        error = log_ratio.std() / math.sqrt(samples)
        assert error < 0.02, "the estimate is too coarse to tell anything"
        assert abs(log_ratio.mean() - closed[row]) < 4 * error
        assert closed[row] > 0


def test_kl_by_hand():
    # One dimension, two clusters, gamma = (1/2, 1/2), pi = (1/4, 3/4), mu = 1, sigma^2 = 1,
    # N(0, 1) and N(3, 4):
    # 1/2 * 1/2 [0 + 1 + 1] + 1/2 * 1/2 [log 4 + 1/4 + (1 - 3)^2 / 4] = 0.5 + 0.25 (log 4 + 1.25)
    # - 1/2 log(1/4 / 1/2) - 1/2 log(3/4 / 1/2) = 1/2 log 2 - 1/2 log 1.5
    # - 1/2 (1 + log 1) = -0.5
    model = make_rating_model(num_clusters=2, latent_size=1)
    with torch.no_grad():
        model.mixture.logits.copy_(torch.tensor([0.25, 0.75]).log())
        model.mixture.means.copy_(torch.tensor([[0.0], [3.0]]))
        model.mixture.log_variances.copy_(torch.tensor([[0.0], [math.log(4)]]))
    kl = model.mixture.kl_divergence(torch.tensor([[0.5, 0.5]]).log(), torch.ones(1, 1), torch.zeros(1, 1))
    by_hand = 0.5 + 0.25 * (math.log(4) + 1.25) + 0.5 * math.log(2) - 0.5 * math.log(1.5) - 0.5
    assert kl.item() == pytest.approx(by_hand, abs=1e-6)


def test_kl_is_zero_where_posterior_is_prior():
    model = make_rating_model(num_clusters=1)
    means, log_variances = model.mixture.means.detach(), model.mixture.log_variances.detach()
    kl = model.mixture.kl_divergence(torch.zeros(1, 1), means, log_variances)
    assert kl.abs().item() < 1e-6


def test_kl_against_loop(rating_model):
    rating_model.double()
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(6, 4, generator=generator).double().requires_grad_()
    log_variance = torch.randn(6, 4, generator=generator).double().requires_grad_()
    log_gamma = torch.randn(6, 3, generator=generator).double().log_softmax(dim=-1).requires_grad_()
    fast = rating_model.mixture.kl_divergence(log_gamma, mean, log_variance)
    gamma = log_gamma.exp()
    slow = torch.stack([naive_kl(rating_model, gamma[row], mean[row], log_variance[row]) for row in range(6)])
    torch.testing.assert_close(fast, slow)
    inputs = [mean, log_variance, log_gamma, *rating_model.mixture.parameters()]
    fast_grads = torch.autograd.grad(fast.sum(), inputs)
    slow_grads = torch.autograd.grad(slow.sum(), inputs)
    torch.testing.assert_close(fast_grads, slow_grads)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_loss_and_gradients_against_loop(likelihood):
    model = make_rating_model(rating_likelihood=likelihood, beta=0.7).double()
    users, items, ratings = [0, 1, 1, -1, 7, 3], [2, 2, 8, 5, -1, 0], [1.0, 5.0, 4.0, 2.0, 3.0, 3.0]
    torch.manual_seed(11)
    noise = torch.randn(6, 4, dtype=torch.double)
    torch.manual_seed(11)
    fast = model(torch.tensor(users), torch.tensor(items), torch.tensor(ratings), sample_latent=True)
    slow = naive_rating_loss(model, users, items, ratings, noise)
    torch.testing.assert_close(fast.loss, slow)
    torch.testing.assert_close(fast.loss, fast.reconstruction_loss + 0.7 * fast.kl_loss)
    assert fast.kl_loss > 0.1
    parameters = dict(model.named_parameters())
    fast_grads = torch.autograd.grad(fast.loss, list(parameters.values()))
    slow_grads = torch.autograd.grad(slow, list(parameters.values()))
    for name, quick, loop in zip(parameters, fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(quick, loop, msg=lambda text, name=name: f"{name}: {text}")
        assert loop.abs().max() > 1e-9, name


def test_encoder_and_posterior_against_loop(rating_model):
    output = rating_model.predict(torch.tensor([4, -1]), torch.tensor([1, -1]))
    for row, (user, item) in enumerate([(4, 1), (-1, -1)]):
        mean, log_variance = naive_encode(rating_model, user, item)
        torch.testing.assert_close(output.latent_mean[row], mean)
        torch.testing.assert_close(output.latent_log_variance[row], log_variance)
        posterior = torch.stack(naive_posterior(rating_model, mean))
        torch.testing.assert_close(output.cluster_posterior[row], posterior)


def test_forward_beta_and_posterior_latent(rating_model):
    ids = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([1, 5])
    plain = rating_model(*ids)
    without = rating_model(*ids, beta=0)
    torch.testing.assert_close(without.loss, plain.reconstruction_loss)
    torch.testing.assert_close(plain.loss, plain.reconstruction_loss + 0.01 * plain.kl_loss)
    # In evaluation mode z = mu
    torch.testing.assert_close(plain.cluster_posterior, rating_model.predict(*ids[:2]).cluster_posterior)
    target = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]])
    cluster_loss = rating_model(*ids[:2], cluster_target=target).cluster_loss
    log_gamma = plain.cluster_posterior.log()
    by_hand = -(log_gamma[0, 0] + 0.5 * log_gamma[1, 0] + 0.5 * log_gamma[1, 1]) / 2
    torch.testing.assert_close(cluster_loss, by_hand)


def test_categorical_by_hand(rating_model):
    # Weights 1, 2, 1, 4, 2 (sum 10) on levels 1..5: expectation (1 + 4 + 3 + 16 + 10) / 10 = 3.4;
    # a rating of 4 has probability 0.4, one of 1 probability 0.1
    logits = torch.tensor([[1.0, 2, 1, 4, 2]]).log().repeat(2, 1)
    torch.testing.assert_close(rating_model.expected_rating(logits), torch.tensor([3.4, 3.4]))
    loss = rating_model.reconstruction_loss(logits, torch.tensor([4, 1]))
    torch.testing.assert_close(loss, torch.tensor([-math.log(0.4), -math.log(0.1)]))


def test_bernoulli_by_hand():
    # sigmoid(log 3) = 3 / (1 + 3) = 0.75: expectation 1 + 0.75 * 4 = 4.0.
    # Rating 2 is (2 - 1) / 4 = 0.25: -(0.25 log 0.75 + 0.75 log 0.25); rating 5 is 1: -log 0.75
    model = make_rating_model(rating_likelihood="bernoulli")
    logits = torch.full((2, 1), math.log(3))
    torch.testing.assert_close(model.expected_rating(logits), torch.tensor([4.0, 4.0]))
    loss = model.reconstruction_loss(logits, torch.tensor([2.0, 5.0]))
    by_hand = [-(0.25 * math.log(0.75) + 0.75 * math.log(0.25)), -math.log(0.75)]
    torch.testing.assert_close(loss, torch.tensor(by_hand))


def test_own_rating_levels():
    # Levels 0, 0.5, 2 with equal weights: expectation 2.5 / 3; 0.5 is the middle class, whatever its value
    model = make_rating_model(rating_levels=[0, 0.5, 2])
    logits = torch.zeros(1, 3)
    torch.testing.assert_close(model.expected_rating(logits), torch.tensor([2.5 / 3]))
    sure = torch.tensor([[0.0, 50.0, 0.0]])
    assert model.reconstruction_loss(sure, torch.tensor([0.5])).item() == pytest.approx(0, abs=1e-6)
    assert model.predict(torch.tensor([0]), torch.tensor([0])).rating_logits.shape == (1, 3)


def test_posterior_at_extremes(rating_model):
    mixture = rating_model.mixture
    with torch.no_grad():
        mixture.logits[0] = -1e4  # an emptied cluster: its weight underflows to 0 in float32
        mixture.log_variances[1] = -50.0  # a collapsed one, kept at the lower bound
    latent = torch.cat([torch.zeros(1, 4), torch.full((1, 4), 1e4), torch.full((1, 4), -1e6)])
    log_posterior = mixture.log_posterior(latent)
    assert log_posterior.isfinite().all()
    torch.testing.assert_close(log_posterior.exp().sum(dim=-1), torch.ones(3))
    # Near the means the weight decides; at 1e4 and beyond the density, whose logarithm is far below -1e4, does
    assert log_posterior.exp()[0, 0] == 0
    assert log_posterior.max(dim=-1).values[1:].tolist() == [0.0, 0.0]
    latent.requires_grad_()
    log_posterior = mixture.log_posterior(latent)
    kl = mixture.kl_divergence(log_posterior, latent.clamp(-100, 100), torch.full((3, 4), -12.0))
    kl.sum().backward()
    assert kl.isfinite().all()
    for name, parameter in [("latent", latent), *mixture.named_parameters()]:
        assert parameter.grad.isfinite().all(), name


def test_loss_survives_an_empty_cluster(rating_model):
    with torch.no_grad():
        rating_model.mixture.logits[2] = -1e4
    output = rating_model(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([1, 5]), sample_latent=True)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in rating_model.parameters())


def test_pair_does_not_depend_on_its_batch(rating_model):
    users, items = (ids[:64] for ids in all_pairs(rating_model.config))
    batch = rating_model.predict(users, items)
    for row in range(64):
        alone = rating_model.predict(users[row : row + 1], items[row : row + 1])
        for name in ("latent_mean", "latent_log_variance", "cluster_posterior", "rating_logits", "predicted_rating"):
            torch.testing.assert_close(batch[name][row], alone[name][0], rtol=1e-5, atol=1e-6)
    # Not by one bit of the others' values: replace all pairs but one
    other_users, other_items = users.flip(0), items.flip(0)
    other_users[10], other_items[10] = users[10], items[10]
    other = rating_model.predict(other_users, other_items)
    assert torch.equal(other.latent_mean[10], batch.latent_mean[10])


def test_unknown_ids_use_the_population(rating_model):
    ids = torch.tensor([-1]), torch.tensor([4])
    embedded = rating_model.embed(*ids)
    assert torch.equal(embedded[0, 0], rating_model.population_user)
    assert torch.equal(embedded[0, 1], rating_model.item_embeddings.weight[4])
    embedded = rating_model.embed(torch.tensor([4]), torch.tensor([-1]))
    assert torch.equal(embedded[0, 0], rating_model.user_embeddings.weight[4])
    assert torch.equal(embedded[0, 1], rating_model.population_item)
    rating_model(*ids, torch.tensor([5.0])).loss.backward()
    assert rating_model.user_embeddings.weight.grad.abs().sum() == 0
    assert rating_model.population_user.grad.abs().sum() > 0
    assert rating_model.population_item.grad.abs().sum() == 0


def test_id_dropout_only_in_training(rating_model):
    rating_model.config.vae_id_dropout = 0.25
    users, items = torch.zeros(8000, dtype=torch.long), torch.ones(8000, dtype=torch.long)
    assert [ids.tolist() for ids in rating_model.drop_ids(users, items)] == [users.tolist(), items.tolist()]
    rating_model.train()
    dropped_users, dropped_items = rating_model.drop_ids(users, items)
    assert set(dropped_users.tolist()) == {-1, 0} and set(dropped_items.tolist()) == {-1, 1}
    # Four standard errors: 4 * sqrt(0.25 * 0.75 / 8000) = 0.0194; independent: 0.25^2 = 0.0625, 4 errors 0.0108
    assert (dropped_users == -1).float().mean().item() == pytest.approx(0.25, abs=0.0194)
    assert (dropped_items == -1).float().mean().item() == pytest.approx(0.25, abs=0.0194)
    both = ((dropped_users == -1) & (dropped_items == -1)).float().mean().item()
    assert both == pytest.approx(0.0625, abs=0.0108)
    rating_model.config.vae_id_dropout = 0.0
    assert torch.equal(rating_model.drop_ids(users, items)[0], users)


@pytest.mark.parametrize(
    ("user", "item", "message"),
    [
        (8, 0, r"`user_id` 8 is out of range: this model knows 0 to 7 \(8 in all\).*processor, or pass -1"),
        (0, 9, r"`item_id` 9 is out of range: this model knows 0 to 8 \(9 in all\)"),
        (-2, 0, r"`user_id` -2 is out of range"),
    ],
)
def test_id_out_of_range(rating_model, user, item, message):
    with pytest.raises(IndexError, match=message):
        rating_model(torch.tensor([1, user]), torch.tensor([1, item]))


def test_predict_is_deterministic_in_training(rating_model):
    users, items = all_pairs(rating_model.config)
    expected = rating_model.predict(users, items)
    rating_model.train()
    noisy = rating_model(users, items)
    assert not torch.allclose(noisy.rating_logits, rating_model(users, items).rating_logits)
    for _ in range(2):
        again = rating_model.predict(users, items)
        for name, value in expected.items():
            assert torch.equal(again[name], value), name
    gates, posterior = rating_model.route(rating_model.embed(users, items))
    assert torch.equal(posterior, expected.cluster_posterior)
    assert torch.equal(gates, expected.cluster_posterior.argmax(dim=-1))


def test_autocast_does_not_change_it(rating_model):
    users, items = all_pairs(rating_model.config)
    ratings = torch.full((72,), 4.0)
    plain, predicted = rating_model(users, items, ratings), rating_model.predict(users, items)
    routed = rating_model.route(rating_model.embed(users, items))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, cast_predicted = rating_model(users, items, ratings), rating_model.predict(users, items)
        cast_routed = rating_model.route(rating_model.embed(users, items))
        # Autocast is on: the same product outside the rating model is rounded
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    for name, value in plain.items():
        assert torch.equal(cast[name], value), name
    for name, value in predicted.items():
        assert torch.equal(cast_predicted[name], value), name
    assert torch.equal(cast_routed[1], routed[1])


def test_training_samples_the_latent():
    model = make_rating_model(vae_dropout=0.0, vae_id_dropout=0.0).train()
    ids = torch.tensor([0]), torch.tensor([0])
    draws = torch.stack([model(*ids).cluster_posterior for _ in range(3)])
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(model(*ids).latent_mean, model(*ids).latent_mean)
    fixed = model(*ids, sample_latent=False)
    assert torch.equal(fixed.cluster_posterior, model.predict(*ids).cluster_posterior)


def test_round_trip_is_bitwise(rating_model, tmp_path):
    rating_model.save_pretrained(tmp_path)
    loaded = GaVaMoERatingModel.from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert state.keys() == rating_model.state_dict().keys()
    for name, value in rating_model.state_dict().items():
        assert torch.equal(state[name], value), name
