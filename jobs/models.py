"""Models that shipped descriptions name. They know nothing of training, workers or files."""

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

_MIN_IMAGE_SIZE = 10
"""The smallest side in pixels that leaves a pixel after two 3x3 convolutions and two poolings."""


class Net(nn.Module):
    """The reference CNN: two convolutions with pooling, then three linear layers.

    The layers are named ``conv1``, ``conv2``, ``fc1``, ``fc2`` and ``fc3``, for patterns of parameter groups.

    Args:
        in_channels: Channels of an image: 1 for gray, 3 for RGB.
        num_classes: Number of logits.
        image_size: Height and width of an image, in pixels.

    Shapes:
        images_NCHW, float -> logits_NK, with C = ``in_channels``, H = W = ``image_size``, K = ``num_classes``.

    Raises:
        ValueError: The image is too small for the two poolings.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 101, image_size: int = 224) -> None:
        super().__init__()
        if image_size < _MIN_IMAGE_SIZE:
            raise ValueError(
                f"image_size must be at least {_MIN_IMAGE_SIZE} pixels, got {image_size}; "
                "two poolings leave nothing of a smaller image: resize the images to a larger size"
            )
        self._image_shape = (in_channels, image_size, image_size)
        pooled_size = _after_conv_and_pool(_after_conv_and_pool(image_size))
        self.conv1 = nn.Conv2d(in_channels, 32, kernel_size=3)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3)
        self.fc1 = nn.Linear(64 * pooled_size * pooled_size, 256)
        self.fc2 = nn.Linear(256, 128)
        self.fc3 = nn.Linear(128, num_classes)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Returns the logits of a batch of images.

        Shapes: images_NCHW -> logits_NK.

        Raises:
            ValueError: The images have another number of channels or another size.
        """
        if images_NCHW.shape[1:] != self._image_shape:
            raise ValueError(
                f"images must be {_shape_text(self._image_shape)} (channels x height x width), "
                f"got {_shape_text(images_NCHW.shape[1:])}; set in_channels and image_size, or resize the images"
            )
        features_NCHW = max_pool2d(relu(self.conv1(images_NCHW)), 2)
        features_NCHW = max_pool2d(relu(self.conv2(features_NCHW)), 2)
        hidden_ND = features_NCHW.flatten(start_dim=1)
        hidden_ND = relu(self.fc1(hidden_ND))
        hidden_ND = relu(self.fc2(hidden_ND))
        logits_NK: Tensor = self.fc3(hidden_ND)
        return logits_NK


def _after_conv_and_pool(size: int) -> int:
    return (size - 2) // 2  # a 3x3 convolution without padding removes 2 pixels, the pooling halves the rest


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
