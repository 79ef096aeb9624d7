import torch

from edgesft.methods.estimate.backprop import Backprop

torch.set_num_threads(1)


def test_is_the_analytic_gradient():
    theta = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
    found = Backprop().gradient(lambda _: (theta["a"] ** 2).sum() * theta["b"].sum(), theta, 0)
    values = dict(found.items())
    assert found.loss == 15.0
    assert torch.equal(values["a"], torch.tensor([6.0, 12.0]))
    assert torch.equal(values["b"], torch.tensor([[5.0]]))


def test_dropout_follows_the_seed_and_leaves_the_global_stream_alone():
    theta = {"a": torch.ones(1000)}

    def loss(_):
        return torch.nn.functional.dropout(theta["a"], 0.5).sum()

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, again, other = (dict(Backprop().gradient(loss, theta, s).items())["a"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.rand(3), expected)
