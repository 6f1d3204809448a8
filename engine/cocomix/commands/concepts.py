"""`cocomix concepts`: which concepts a model predicts in a text, and what they do."""

from cocomix.commands.arguments import add_teacher_config, positive_int

SUMMARY = "which concepts a model predicts in a text and mixes in, and what they do"


def add_arguments(parser):
    parser.description = "Which concepts a model predicts in a text, and what they do: a table, and a page to look at."
    parser.add_argument("model", metavar="MODEL", help="a transformers folder, a checkpoint, or the folder of a run")
    parser.add_argument("text_file", nargs="?", metavar="TEXTFILE", help="a text to read concepts from")
    parser.add_argument("--text", help="the text itself, in place of a file")
    parser.add_argument(
        "--concept",
        action="append",
        default=[],
        metavar="ID",
        help="look at this concept (or name) too, whatever the text; may be given several times",
    )
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="ID=NAME",
        help="give a concept a name, kept in concept_names.json beside the model (ID=: forget it)",
    )
    parser.add_argument(
        "--corpus",
        metavar="PATH",
        help="where to look for contexts: token files, a text file, a folder, or whatever data.text "
        "takes (default: the validation part of the run's token files)",
    )
    parser.add_argument("--corpus-tokens", type=positive_int, default=100_000, metavar="N", help="default: 100,000")
    parser.add_argument(
        "--max-tokens",
        type=positive_int,
        default=1024,
        metavar="N",
        help="of the text that are read and shown (default: 1,024)",
    )
    parser.add_argument("--out", default="concepts.html", metavar="FILE", help="the page (default: concepts.html)")
    parser.add_argument("--per-token", action="store_true", help="print the concepts of each token too")
    add_teacher_config(parser)


def run(options):
    from cocomix.inference import concepts

    concepts.run(
        options.model,
        concepts.Request(
            text_file=options.text_file,
            text=options.text,
            concepts=tuple(options.concept),
            names=tuple(options.name),
            corpus=options.corpus,
            corpus_tokens=options.corpus_tokens,
            max_tokens=options.max_tokens,
            teacher_config=options.teacher_config,
            out=options.out,
            per_token=options.per_token,
        ),
    )
