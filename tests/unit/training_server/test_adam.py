"""The flat Adam against the paper's algorithm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from relayrl_training_server.adam import FlatAdam, gradients_of
from relayrl_training_server.testing.reference import SlowAdam


def network(seed: int = 0) -> nn.Sequential:
    """A small network with fixed weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def loss_of(net: nn.Module, seed: int) -> torch.Tensor:
    """A loss that differs from step to step."""
    generator = torch.Generator().manual_seed(seed)
    given: torch.Tensor = net(torch.randn(7, 3, generator=generator))
    return given.square().mean() + given.sum() * 0.1


def gradient(adam: FlatAdam, loss: torch.Tensor) -> torch.Tensor:
    """The gradient of one loss."""
    return gradients_of([(adam, loss)])[0]


def test_it_steps_like_the_papers_algorithm() -> None:
    """Twenty steps with changing gradients and a rate of 0.01 end in the weights of algorithm 1."""
    ours, theirs = network(), network()
    flat = FlatAdam(list(ours.parameters()), eps=1e-5)
    reference = SlowAdam([(list(theirs.parameters()), 1e-2)], eps=1e-5)
    for step in range(20):
        flat.step(gradient(flat, loss_of(ours, step)), 1e-2)
        reference.step(torch.autograd.grad(loss_of(theirs, step), list(theirs.parameters())))

    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_the_parameters_are_views_of_one_vector() -> None:
    """A change of the vector is a change of the network, and loading weights reaches the vector."""
    net = network()
    flat = FlatAdam(list(net.parameters()), eps=1e-8)
    flat.vector.zero_()

    assert all(not parameter.any() for parameter in net.parameters())
    net.load_state_dict(network(seed=1).state_dict())
    assert flat.vector.numel() == sum(p.numel() for p in net.parameters())
    assert torch.equal(flat.vector[:15], next(network(seed=1).parameters()).detach().reshape(-1))


def test_a_restored_state_continues_to_the_bit() -> None:
    """Moments and count come back, so that the next step is the same."""
    first, second = network(), network()
    one, other = (FlatAdam(list(net.parameters()), eps=1e-8) for net in (first, second))
    for step in range(3):
        one.step(gradient(one, loss_of(first, step)), 1e-2)
    second.load_state_dict(first.state_dict())
    other.restore(one.state())
    for adam, net in ((one, first), (other, second)):
        adam.step(gradient(adam, loss_of(net, 9)), 1e-2)

    assert torch.equal(one.vector, other.vector)


def test_a_state_is_a_copy() -> None:
    """Later steps do not reach into a state that was taken before."""
    net = network()
    adam = FlatAdam(list(net.parameters()), eps=1e-8)
    adam.step(gradient(adam, loss_of(net, 0)), 1e-2)
    state = adam.state()
    before = state["mean"].clone()
    adam.step(gradient(adam, loss_of(net, 1)), 1e-2)

    assert torch.equal(state["mean"], before)
    assert int(state["steps"]) == 1


def test_nothing_to_learn_is_fine() -> None:
    """An algorithm without a value network has an empty vector."""
    adam = FlatAdam([], eps=1e-8)

    assert adam.vector.numel() == 0
    assert adam.state()["mean"].numel() == 0


@pytest.mark.parametrize("rate", [1e-3, 1.0])
def test_the_first_step_is_the_rate(rate: float) -> None:
    """With its bias corrected, Adam's first step is the learning rate against the gradient's sign."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    adam = FlatAdam([parameter], eps=1e-12)
    adam.step(torch.tensor([0.3, -7.0]), rate)

    torch.testing.assert_close(parameter.detach(), torch.tensor([1.0 - rate, -2.0 + rate]))


def test_one_backward_pass_gives_the_gradients_of_two_losses() -> None:
    """Each network's gradient is that of its own loss, as if the other were not there."""
    nets = [network(0), network(1)]
    adams = [FlatAdam(list(net.parameters()), eps=1e-8) for net in nets]
    together = gradients_of([(adams[i], loss_of(nets[i], i) * (i + 1.0)) for i in (0, 1)])
    apart = [gradient(adams[i], loss_of(nets[i], i) * (i + 1.0)) for i in (0, 1)]

    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
