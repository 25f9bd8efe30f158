"""The commands between this machine and others. Arguments are checked before torch is imported."""

import sys
from functools import partial

from zoo import checkpoint, hub
from zoo.data.terms import terms_of
from zoo.errors import ZooError
from zoo.export import check_target as check_file
from zoo.export import export_onnx, facts_of, preprocessing
from zoo.options import add_plan_options, make_parser, parse
from zoo.paths import user_path


def publish(argv: list[str]) -> None:
    parser = make_parser("publish", "Put a model, its card and its record into a repository on the hub.")
    parser.add_argument("name", help="name or folder of a model")
    parser.add_argument("--to", type=str | None, default=None, help="repository, as ORG/REPO; made where there is none")
    parser.add_argument("--private", action="store_true", help="a new repository is seen by its owners only")
    parser.add_argument("--tag", type=str | None, default=None, help="name of this version, such as v1")
    parser.add_argument("--message", type=str | None, default=None, help="of the commit")
    parser.add_argument("--data-names", action="store_true", help="name folders of images, which are private else")
    parser.add_argument("--overwrite-card", action="store_true", help="replace a card that was edited on the hub")
    parser.add_argument("--replace", action="store_true", help="take the place of a model of another method")
    options = parse(parser, argv)
    from zoo.publish import check_target
    from zoo.publish import publish as run

    if not options.to:
        raise ZooError(f"zoo publish needs --to: zoo publish {options.name} --to ORG/REPO.")
    check_target(options.to, options.tag)
    folder = hub.find_model(options.name)
    checkpoint.read_config(folder)
    done = run(
        folder,
        options.to,
        private=options.private or None,
        tag=options.tag,
        commit_message=options.message,
        data_names=options.data_names,
        overwrite_card=options.overwrite_card,
        replace=options.replace,
        say=print,
    )
    about = checkpoint.read_record(folder).get("train_data", {})
    if terms := about.get("terms") or terms_of(about.get("name", "")):
        print(f"Terms of the data that it was learned from: {terms}")
    who = "private" if done.private else "public"
    about = f"commit {done.commit[:7]}{f', tag {options.tag}' * bool(options.tag)}, {who}"
    said = (
        f"Uploaded to {done.url}: {', '.join(done.uploaded)}" if done.uploaded else f"{done.url} has all of it already"
    )
    name = f"{options.to}@{options.tag}" if options.tag else options.to
    print(f"{said} ({about}).\nNext: python -c \"import zoo; zoo.from_pretrained('{name}')\"")


def release(argv: list[str]) -> None:
    parser = make_parser("release", "Train, evaluate and calibrate methods, and publish a model of each.")
    parser.add_argument("--to", type=str | None, default=None, help="user or organisation on the hub")
    parser.add_argument("--out", type=str, default="zoo-release", help="folder: models to carry away, and private work")
    parser.add_argument(
        "--prefix", type=str | None, default=None, help="of names, as in PREFIX-cfa; null: the data's name"
    )
    parser.add_argument(
        "--false-alarm-rate", type=float, default=0.01, help="that models are calibrated for, if they can"
    )
    parser.add_argument("--private", action="store_true", help="new repositories are seen by their owners only")
    parser.add_argument("--tag", type=str | None, default=None, help="name of this version, such as v1")
    parser.add_argument("--yes", action="store_true", help="push; else it is only said what would be")
    add_plan_options(parser)
    options = parse(parser, argv)
    for needed, form in (("data", "miic:DIR"), ("to", "ORG")):
        if not options[needed]:
            raise ZooError(f"zoo release needs --{needed} {form}: zoo release --data DATA --to ORG.")
    from zoo.plan import plan_of
    from zoo.release import DRAWS, WORK, Release, closing_lines, run_release

    out = user_path(options.out)
    plan = plan_of(options, out / WORK, bootstrap=DRAWS)
    how = (options.false_alarm_rate, options.yes, options.private, options.tag)
    planned = Release(plan, options.to, options.prefix, *how)
    failed = run_release(planned, partial(print, flush=True))
    for line in closing_lines(planned, argv):
        print(line)
    if failed:
        for name, why in failed.items():
            print(f"{name}: {why}", file=sys.stderr)
        raise ZooError(f"{len(failed)} failed: {', '.join(failed)}; the same command tries them again.")


def import_(argv: list[str]) -> None:
    parser = make_parser("import", "Take models into the local registry, each checked whole.", config=False)
    parser.add_argument("what", help="folder of a model or of several, or a repository on the hub, as ORG/NAME")
    parser.add_argument("--replace", action="store_true", help="take the place of other models of the same names")
    options = parse(parser, argv)
    from zoo.importing import import_models

    names = import_models(options.what, options.replace, print)
    if names:
        abouts = [checkpoint.read_record(hub.model_place(name)) for name in names]
        for terms in dict.fromkeys(about.get("train_data", {}).get("terms") for about in abouts):
            if terms:
                print(f"Terms of the data that they were learned from: {terms}")
        print(f"Imported {', '.join(names)} into {hub.registry()}.\nNext: zoo predict {names[0]} PATH --out DIR")


def export(argv: list[str]) -> None:
    parser = make_parser("export", "Write a model as an ONNX file that gives the same scores and maps.")
    parser.add_argument("name", help="name or folder of a model")
    parser.add_argument("--to", type=str | None, default=None, help="file to write, which ends in .onnx")
    options = parse(parser, argv)
    if not options.to:
        raise ZooError(f"zoo export needs --to: zoo export {options.name} --to {options.name}.onnx.")
    folder = hub.find_model(options.name)
    facts, path = facts_of(folder), check_file(options.to)
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
