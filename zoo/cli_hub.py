"""The commands between this machine and others: publish. Arguments are checked before torch is imported."""

from zoo import checkpoint, hub
from zoo.data.terms import terms_of
from zoo.errors import ZooError
from zoo.options import make_parser, parse


def publish(argv: list[str]) -> None:
    parser = make_parser("publish", "Put a model, its card and its record into a repository on the hub.")
    parser.add_argument("name", help="name or folder of a model")
    parser.add_argument("--to", type=str | None, default=None, help="repository, as ORG/REPO; made where there is none")
    parser.add_argument("--private", action="store_true", help="a new repository is seen by its owners only")
    parser.add_argument("--tag", type=str | None, default=None, help="name of this version, such as v1")
    parser.add_argument("--message", type=str | None, default=None, help="of the commit")
    parser.add_argument("--data-names", action="store_true", help="name folders of images, which are private else")
    parser.add_argument("--overwrite-card", action="store_true", help="replace a card that was edited on the hub")
    options = parse(parser, argv)
    from zoo.publish import check_target
    from zoo.publish import publish as run

    folder = hub.find_model(options.name)
    checkpoint.read_config(folder)
    if not options.to:
        raise ZooError(f"zoo publish needs --to: zoo publish {options.name} --to ORG/REPO.")
    check_target(options.to, options.tag)
    done = run(
        folder,
        options.to,
        private=options.private or None,
        tag=options.tag,
        commit_message=options.message,
        data_names=options.data_names,
        overwrite_card=options.overwrite_card,
        say=print,
    )
    about = checkpoint.read_json(folder / checkpoint.RECORD).get("train_data", {})
    if terms := about.get("terms") or terms_of(about.get("name", "")):
        print(f"Terms of the data that it was learned from: {terms}")
    what = ", ".join(done.uploaded) or "nothing new: it has all of this already"
    print(
        f"Uploaded to {done.url}: {what} (commit {done.commit[:7]}{f', tag {options.tag}' * bool(options.tag)}).\n"
        f'Next: python -c "import zoo; zoo.from_pretrained({options.to!r})"'
    )
