import numpy as np
import torch
from captum.attr import LayerGradCam
from torch import nn

from common.report.heat_maps import VIEWS, heat_map, turned_back
from common.train.dataset import dihedral
from common.train.networks import AdaptiveConcatPool2d, Classifier


def test_every_view_is_turned_back():
    image = torch.arange(12.0).reshape(3, 4)
    for view in VIEWS:
        assert torch.equal(turned_back(dihedral(image, view), view), image)


def test_the_heat_lies_on_what_the_class_is_made_of():
    """A network whose class 0 is green light and whose class 1 is blue light locates each of them."""
    encoder = nn.Sequential(nn.Conv2d(4, 2, 4, stride=4, bias=False))
    pool, head = AdaptiveConcatPool2d(), nn.Sequential(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        encoder[0].weight.zero_()
        encoder[0].weight[0, 1] = encoder[0].weight[1, 2] = 1.0
        head[0].weight.copy_(torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]]))
    image = torch.zeros(4, 32, 32)
    image[1, 4:8, 20:24], image[2, 24:28, 8:12] = 1.0, 1.0
    camera = LayerGradCam(Classifier(encoder, pool, head), encoder)
    images = torch.stack([dihedral(image, view) for view in VIEWS])
    for c, (row, column) in enumerate([(5.5, 21.5), (25.5, 9.5)]):
        heat = heat_map([(camera, images)], c, 32)
        assert heat.shape == (32, 32) and heat.min() >= 0 and heat.max() <= 1
        place = np.argwhere(heat == heat.max()).mean(axis=0)
        np.testing.assert_allclose(place, (row, column), atol=1)


def test_a_map_is_the_mean_over_networks_by_how_much_each_finds_and_empty_where_none_finds_anything():
    def camera(channel, weight):
        """A network's camera: the light of a channel is evidence for its class, with that weight."""
        encoder = nn.Sequential(nn.Conv2d(4, 1, 4, stride=4, bias=False))
        model = Classifier(encoder, AdaptiveConcatPool2d(), nn.Linear(2, 1, bias=False))
        with torch.no_grad():
            encoder[0].weight.zero_()
            encoder[0].weight[0, channel] = 1.0
            model.head.weight.fill_(weight)
        return LayerGradCam(model, encoder)

    image = torch.zeros(4, 32, 32)
    image[1, :, :8], image[2, :, 24:] = 1.0, 1.0
    images = torch.stack([dihedral(image, view) for view in VIEWS])
    seen = [(camera(*one), images) for one in ((1, 3.0), (2, 1.0), (2, -1.0))]
    heat = heat_map(seen[:2], 0, 8)
    np.testing.assert_allclose(heat[:, [0, 3, 7]], [[1, 0, 1 / 3]] * 8, atol=1e-6)
    assert not heat_map(seen[2:], 0, 8).any()  # evidence against a class is no heat
