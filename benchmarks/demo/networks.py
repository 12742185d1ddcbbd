"""The two networks of the demo, each with the channels that can only leave together.

A channel is stored in several tensors: as a row of the layers that write it, as a column of those that read
it. Only zeros in all of these are structure to take, so training penalises their joint norm (see `squeeze`).
"""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

Slot = tuple[nn.Module, int]  # a module and the axis of its weight on which the channels lie
Groups = list[tuple[Slot, ...]]  # for each set of channels every place they are stored in


def weight_of(module: nn.Module) -> Tensor:
    """The module's weight as its last forward pass used it, masked if it is pruned."""
    return cast(Tensor, module.weight)


class Perceptron(nn.Module):
    """784-300-100-10, fully connected."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 1, 28, 28]."""
        hidden = F.relu(self.fc1(images.flatten(1)))
        hidden = F.relu(self.fc2(hidden))
        return self.fc3(hidden)  # type: ignore[no-any-return]

    def groups(self) -> Groups:
        """The input pixels, then the two hidden layers."""
        return [
            ((self.fc1, 1),),
            ((self.fc1, 0), (self.fc2, 1)),
            ((self.fc2, 0), (self.fc3, 1)),
        ]


class Block(nn.Module):
    """Two convolutions with batch norm and a skip; a strided block projects the skip."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.skip: nn.Module = nn.Identity()
        if stride > 1:
            self.skip = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))

    def writers(self) -> tuple[Slot, ...]:
        """Where the block's output channels are written."""
        skip = ((self.skip[0], 0), (self.skip[1], 0)) if isinstance(self.skip, nn.Sequential) else ()
        return (self.conv2, 0), (self.bn2, 0), *skip

    def readers(self) -> tuple[Slot, ...]:
        """Where the block's input channels are read."""
        skip = ((self.skip[0], 1),) if isinstance(self.skip, nn.Sequential) else ()
        return (self.conv1, 1), *skip


class ResidualNet(nn.Module):
    """A small residual network with batch norm: three stages of 16, 32 and 64 channels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stage1 = Block(width, width, stride=1)
        self.stage2 = Block(width, 2 * width, stride=2)
        self.stage3 = Block(2 * width, 4 * width, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 1, 28, 28]."""
        x = F.relu(self.bn(self.stem(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.head(self.pool(x).flatten(1))  # type: ignore[no-any-return]

    def groups(self) -> Groups:
        """The channels inside each block, then the streams that the skips run through."""
        one, two, three = blocks = self.stage1, self.stage2, self.stage3
        inside: Groups = [((block.conv1, 0), (block.bn1, 0), (block.conv2, 1)) for block in blocks]
        return [
            *inside,
            ((self.stem, 0), (self.bn, 0), *one.writers(), *one.readers(), *two.readers()),
            (*two.writers(), *three.readers()),
            (*three.writers(), (self.head, 1)),
        ]
