"""Draw pictures and class names from the model, given nothing, a picture of a class, a class, or both.

Writes sample_image.png, a grid of the pictures' means, and sample_text.txt, the name of the most probable class of
each, in the same order.
"""

from mvae.files import write_atomically
from mvae.scripts import flags

import datasets


def main() -> None:
    parser = flags.sampling_parser(__doc__)
    label = {"type": datasets.class_number, "metavar": "CLASS"}
    parser.add_argument("--condition-on-image", **label, help="a held-out picture of this class, chosen by --seed")
    parser.add_argument("--condition-on-text", **label, help="this class: 0 to 9, or its name, such as 'Ankle boot'")
    args = parser.parse_args()

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    import torch

    from mvae import checkpoint, data, pictures

    from model import build_model

    torch.set_grad_enabled(False)
    device = flags.device(args)
    model, trained = checkpoint.load_model(args.model_path, "fashionmnist", build_model, device)
    torch.manual_seed(args.seed)
    given = {}
    if args.condition_on_image is not None:
        how = trained["settings"]
        _, held_out = datasets.training_data(args.data_dir, n_val=how["n_val"], binarize=how["binarize"])
        is_wanted = held_out.tensors["text"] == args.condition_on_image
        example = data.random_example(held_out, is_wanted, f"the class {datasets.CLASSES[args.condition_on_image]}")
        given["image"] = example["image"].to(device)
    if args.condition_on_text is not None:
        given["text"] = torch.tensor([args.condition_on_text], device=device)
    z = model.draw(given, args.n_samples, device)
    pictures.save_grid(args.out_dir / "sample_image.png", model.likelihood("image").mean(z))
    labels = model.likelihood("text").mean(z).argmax(dim=1).tolist()
    text = "".join(f"{datasets.CLASSES[label]}\n" for label in labels)
    write_atomically(args.out_dir / "sample_text.txt", text.encode())
    print(f"wrote sample_image.png and sample_text.txt in {args.out_dir}")


if __name__ == "__main__":
    flags.run(main)
