import torch

from fedamm_pl import WeightNet
from fedamm_pl.plotting import weight_curves


def test_curves_are_the_mean_of_the_nets_and_their_range() -> None:
    nets = [WeightNet(), WeightNet()]
    figure = weight_curves({"first": nets, "second": nets[:1]}, largest_loss=5)
    (axes,) = figure.axes
    first, second = axes.get_lines()
    losses = torch.from_numpy(first.get_xdata())
    assert losses[0] == 0
    assert losses[-1] == 5
    with torch.no_grad():
        curves = torch.stack([net(losses) for net in nets])
    torch.testing.assert_close(torch.from_numpy(first.get_ydata()), curves.mean(0))
    torch.testing.assert_close(torch.from_numpy(second.get_ydata()), curves[0])
    edges = torch.from_numpy(axes.collections[0].get_paths()[0].vertices[:, 1]).float()
    torch.testing.assert_close(edges.min(), curves.min())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["first", "second"]
    assert "nats" in axes.get_xlabel()
