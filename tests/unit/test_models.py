import pytest
import torch

from jobs.models import Net


def test_net_is_the_reference_cnn() -> None:
    net = Net()

    assert net.fc1.in_features == 64 * 54 * 54
    assert {name: tuple(parameter.shape) for name, parameter in net.named_parameters()} == {
        "conv1.weight": (32, 3, 3, 3),
        "conv1.bias": (32,),
        "conv2.weight": (64, 32, 3, 3),
        "conv2.bias": (64,),
        "fc1.weight": (256, 64 * 54 * 54),
        "fc1.bias": (256,),
        "fc2.weight": (128, 256),
        "fc2.bias": (128,),
        "fc3.weight": (101, 128),
        "fc3.bias": (101,),
    }
    assert sum(parameter.numel() for parameter in net.parameters()) == 47_841_317
    assert not list(net.buffers())


@pytest.mark.parametrize(("channels", "classes", "size"), [(3, 101, 224), (1, 10, 32), (3, 2, 10), (2, 3, 11)])
def test_images_become_logits(channels: int, classes: int, size: int) -> None:
    net = Net(in_channels=channels, num_classes=classes, image_size=size)

    logits_NK = net(torch.rand(2, channels, size, size))

    assert logits_NK.shape == (2, classes)


def test_forward_computes_what_the_layers_in_sequence_compute() -> None:
    net = Net(in_channels=1, num_classes=10, image_size=32)
    pool, relu = torch.nn.MaxPool2d(2), torch.nn.ReLU()
    sequence = torch.nn.Sequential(
        net.conv1, relu, pool, net.conv2, relu, pool, torch.nn.Flatten(), net.fc1, relu, net.fc2, relu, net.fc3
    )
    images_NCHW = torch.rand(4, 1, 32, 32)

    assert torch.equal(net(images_NCHW), sequence(images_NCHW))


def test_every_parameter_gets_a_gradient() -> None:
    net = Net(in_channels=1, num_classes=10, image_size=32)

    net(torch.rand(4, 1, 32, 32)).logsumexp(dim=1).sum().backward()

    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


@pytest.mark.parametrize("size", [9, 0, -224])
def test_a_too_small_image_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match=rf"^image_size must be at least 10 pixels, got {size}; .*resize") as error:
        Net(image_size=size)
    assert "\n" not in str(error.value)


def test_images_of_another_shape_are_an_error() -> None:
    net = Net(in_channels=1, num_classes=10, image_size=32)

    with pytest.raises(ValueError, match=r"^images must be 1x32x32 \(.*\), got 3x28x32; set in_channels"):
        net(torch.rand(2, 3, 28, 32))
