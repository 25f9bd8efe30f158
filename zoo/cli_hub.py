"""Commands that take a model elsewhere: export. Arguments are checked before torch is imported."""

from zoo import hub
from zoo.errors import ZooError
from zoo.export import check_target, export_onnx, facts_of, preprocessing
from zoo.options import make_parser, parse


def export(argv: list[str]) -> None:
    parser = make_parser("export", "Write a model as an ONNX file that gives the same scores and maps.")
    parser.add_argument("name", help="name or folder of a model")
    parser.add_argument("--to", type=str | None, default=None, help="file to write, which ends in .onnx")
    options = parse(parser, argv)
    folder = hub.find_model(options.name)
    facts = facts_of(folder, options.name)
    if not options.to:
        raise ZooError(f"zoo export needs --to: zoo export {options.name} --to {options.name}.onnx.")
    path = check_target(options.to)
    model = hub.from_pretrained(folder)
    parity = export_onnx(model, path, facts)
    scores, maps = (f"{a:.1e} (of {b:.3g})" for a, b in zip(parity[1:3], parity[3:5], strict=True))
    beside = path.with_name(f"{path.name}.data")
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    if beside.exists():
        size += f", and {beside.stat().st_size / 1e6:.1f} MB in {beside.name}"
    print(
        f"Wrote {path} ({size}): under onnxruntime scores differ by at most {scores}, maps "
        f"by {maps}, on {parity.images} images.\n"
        "It takes images (N, 1 or 3, H, W), float32 in [0, 1], and gives score (N,) and map (N, 1, H, W). Before it:"
    )
    for sentence in preprocessing(model):
        print(f"  {sentence}")
