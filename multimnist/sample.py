"""Draw canvases and texts from the model, given nothing, a canvas, a text, or both.

Writes sample_image.png, a grid of the canvases' means, and sample_text.txt, a line for each in the same order: the text
decoded greedily, or drawn with --temperature. The empty canvas's line is empty.
"""

from typing import cast

from mvae.files import write_atomically
from mvae.scripts import flags

import datasets


def main() -> None:
    parser = flags.sampling_parser(__doc__)
    datasets.add_canvas_dir(parser)
    text = {"type": datasets.text_argument, "metavar": "TEXT"}
    parser.add_argument("--condition-on-image", **text, help="a held-out canvas with this text, chosen by --seed")
    parser.add_argument("--condition-on-text", **text, help="this text: up to four digits; '' is the empty canvas")
    parser.add_argument("--temperature", type=flags.positive_float, help="draw texts at it; 1 is p(text | z)")
    args = parser.parse_args()

    # These take long to import: after the flags, so that -h and a wrong flag are answered at once.
    import torch

    from mvae import checkpoint, data, pictures

    from model import Text, build_model

    torch.set_grad_enabled(False)
    device = flags.device(args)
    model, trained = checkpoint.load_model(args.model_path, "multimnist", build_model, device)
    torch.manual_seed(args.seed)
    given = {}
    if args.condition_on_image is not None:
        datasets.prepare(args.data_dir, args.canvas_dir, trained["settings"]["canvases"])
        _, held_out = datasets.training_data(args.canvas_dir, n_val=trained["settings"]["n_val"])
        is_wanted = (held_out.tensors["text"] == datasets.encode(args.condition_on_image)).all(dim=1)
        example = data.random_example(held_out, is_wanted, f"the text '{args.condition_on_image}'")
        given["image"] = example["image"].to(device)
    if args.condition_on_text is not None:
        given["text"] = datasets.encode(args.condition_on_text).unsqueeze(0).to(device)
    z = model.draw(given, args.n_samples, device)
    pictures.save_grid(args.out_dir / "sample_image.png", model.likelihood("image").mean(z))
    text_given_z = cast(Text, model.likelihood("text"))
    greedy = args.temperature is None
    symbols = text_given_z.mean(z).argmax(dim=2) if greedy else text_given_z.sample(z, args.temperature)
    lines = "".join(f"{text}\n" for text in datasets.decode(symbols))
    write_atomically(args.out_dir / "sample_text.txt", lines.encode())
    print(f"wrote sample_image.png and sample_text.txt in {args.out_dir}")


if __name__ == "__main__":
    flags.run(main)
