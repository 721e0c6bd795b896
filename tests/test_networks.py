import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from ppo import Policy, RunningNorm, Value

torch.set_num_threads(1)

OBS_SPACE = Box(-1, 1, (3,))
ACTION_SPACES = {"discrete": Discrete(4), "box": Box(-1, 1, (2,)), "matrix": Box(-1, 1, (2, 3))}
LEADING_SHAPES = [(), (5,), (7, 5)]


@pytest.fixture(params=ACTION_SPACES.values(), ids=ACTION_SPACES.keys())
def policy(request):
    torch.manual_seed(0)
    return Policy(OBS_SPACE, request.param)


batches = st.lists(
    st.integers(1, 9).flatmap(lambda n: hnp.arrays(np.float64, (n, 2), elements=st.floats(-100, 100))),
    min_size=1,
    max_size=6,
)


@settings(deadline=None)
@given(batches)
def test_merged_statistics_are_those_of_all_rows(batches):
    norm = RunningNorm(2).double()
    for batch in batches:
        norm.update(torch.as_tensor(batch))
    rows = np.concatenate(batches)
    np.testing.assert_allclose(norm.mean, rows.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(norm.var, rows.var(0), rtol=1e-9, atol=1e-9)
    assert norm.count == len(rows)


def test_norm_standardizes_with_the_statistics_of_what_it_has_seen():
    rows = 5 + 3 * torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    norm = RunningNorm(2)
    norm.update(rows)
    np.testing.assert_allclose(norm(rows).mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(norm(rows).std(0, correction=0), 1, atol=1e-5)


def test_norm_is_the_identity_before_the_first_update():
    x = torch.linspace(-9, 9, 12).reshape(2, 3, 2)
    torch.testing.assert_close(RunningNorm(2)(x), x)


def test_norm_clips_at_10():
    assert RunningNorm(3)(torch.tensor([-50.0, 10.5, 9.0])).tolist() == pytest.approx([-10, 10, 9])


def test_statistics_are_saved_with_the_weights_and_move_only_in_update(policy):
    policy.train()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    assert {"net.0.mean", "net.0.var", "net.0.scale", "net.0.count"} <= set(before)
    assert not any("net.0" in name for name, _ in policy.named_parameters())
    policy(torch.randn(20, 3))
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
    policy.net[0].update(torch.randn(20, 3))
    moved = {name for name, tensor in policy.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved == {"net.0.mean", "net.0.var", "net.0.scale", "net.0.count"}


@pytest.mark.parametrize("shape", LEADING_SHAPES)
def test_policy_is_a_distribution_for_every_leading_shape(policy, shape):
    dist = policy(torch.randn(*shape, 3))
    assert dist.batch_shape == shape
    if policy.discrete:
        assert isinstance(dist, Categorical) and dist.logits.shape == (*shape, 4)
    else:
        assert isinstance(dist, Independent) and isinstance(dist.base_dist, Normal)
        assert dist.event_shape == policy.log_std.shape


@pytest.mark.parametrize("shape", LEADING_SHAPES)
def test_value_is_a_number_for_every_leading_shape(shape):
    obs, value = torch.randn(*shape, 3), Value(OBS_SPACE)
    assert value(obs).shape == shape
    torch.testing.assert_close(value(obs).flatten(), value(obs.reshape(-1, 3)))


def test_log_prob_entropy_and_kl_are_one_number_per_row(policy):
    dist, other = policy(torch.randn(8, 3)), policy(torch.randn(8, 3))
    for x in (dist.log_prob(dist.sample()), dist.entropy(), kl_divergence(dist, other)):
        assert x.shape == (8,) and x.isfinite().all()


@pytest.mark.parametrize("space", [ACTION_SPACES["box"], ACTION_SPACES["matrix"]], ids=["box", "matrix"])
def test_log_std_starts_at_0_and_does_not_depend_on_the_state(space):
    policy = Policy(OBS_SPACE, space)
    assert isinstance(policy.log_std, torch.nn.Parameter)
    assert policy.log_std.tolist() == [0.0] * int(np.prod(space.shape))
    assert (policy(torch.randn(8, 3)).stddev == 1).all()
    with torch.no_grad():
        policy.log_std.fill_(0.5)
    torch.testing.assert_close(
        policy(torch.randn(8, 3)).stddev, torch.full((8, len(policy.log_std)), 0.5).exp()
    )


def test_initial_policy_is_nearly_uniform_but_sees_the_state(policy):
    dist = policy(torch.randn(1000, 3))
    if policy.discrete:
        assert (dist.probs - 1 / 4).abs().max() < 0.02
        assert dist.probs.std(0).min() > 0
    else:
        assert dist.mean.abs().max() < 0.1
        assert dist.mean.std(0).min() > 0
