"""CelebA: faces (3, 64, 64) in [0, 1] as `image`, and 18 attributes, each 0 or 1, as `attrs` (18).

As a command it looks whether the set is complete, and decodes its pictures: python datasets.py [--data-dir DIR]
"""

from mvae import celeba, cli

MODALITIES = ("image", "attrs")
training_data, test_data = celeba.training_data, celeba.test_data


def main() -> None:
    parser = cli.parser(__doc__)
    celeba.add_flags(parser)
    args = parser.parse_args()
    print(celeba.check(args.data_dir, args.allow_missing))
    celeba.training_data(args.data_dir, args.cache_dir, allow_missing=args.allow_missing, workers=args.workers)
    print(f"its pictures are decoded in {args.cache_dir}")


if __name__ == "__main__":
    cli.run(main)
