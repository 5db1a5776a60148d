"""Sets on disk, as `Data`: the MNIST family, CelebA, and pictures decoded once."""
