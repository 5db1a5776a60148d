"""Draw faces and attributes from the model, given nothing, a picture, attributes, or both.

Writes sample_image.png, a grid of the pictures' means, and sample_attrs.txt, a line of each one's more probable
attributes in the same order. The attributes are one vector: those that --condition-on-attrs doesn't name are absent.
"""

from mvae.datasets.celeba import ATTRIBUTES
from mvae.files import write_atomically
from mvae.scripts import faces, flags


def main() -> None:
    parser = flags.sampling_parser(__doc__)
    faces.add_flags(parser)
    faces.add_conditions(parser)
    args = parser.parse_args(faces.arguments())

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    import torch

    from mvae import checkpoint, pictures

    from model import build_model

    torch.set_grad_enabled(False)
    device = flags.device(args)
    model, _ = checkpoint.load_model(args.model_path, "celeba", build_model, device)
    torch.manual_seed(args.seed)
    given = {}
    if args.condition_on_image is not None:
        given["image"] = faces.condition(args).to(device)
    if args.condition_on_attrs is not None:
        there = [args.condition_on_attrs.get(name, False) for name in ATTRIBUTES]
        given["attrs"] = torch.tensor([there], dtype=torch.float32, device=device)
    z = model.draw(given, args.n_samples, device)
    pictures.save_grid(args.out_dir / "sample_image.png", model.likelihood("image").mean(z))
    lines = faces.lines(model.likelihood("attrs").mean(z) > 0.5)
    write_atomically(args.out_dir / "sample_attrs.txt", lines.encode())
    print(f"wrote sample_image.png and sample_attrs.txt in {args.out_dir}")


if __name__ == "__main__":
    flags.run(main)
