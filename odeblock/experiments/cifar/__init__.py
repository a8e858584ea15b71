"""CIFAR-10: reading it, augmenting it, and training the paper's convolutional network on it."""
