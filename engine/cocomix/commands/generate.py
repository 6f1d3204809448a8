"""`cocomix generate`: text from a model, and what steering its concepts changes."""

from cocomix.commands.arguments import add_teacher_config, positive_int

SUMMARY = "continue a text, with concepts amplified, set or forced"


def add_arguments(parser):
    parser.description = "Continue a text, with concepts amplified, set or forced."
    parser.epilog = (
        "--steer, at every token and before the TopK: ID=F or ID=xF multiplies the logit of concept ID by F; "
        "ID=set:F sets it; ID=force keeps the concept among the k whatever its logit, ID=force:F with the logit "
        "F. For example --steer 4217=3.0 --steer 88=0 --steer 7=force. ID may be a name that `cocomix concepts "
        "--name` gave."
    )
    parser.add_argument("model", metavar="MODEL", help="a transformers folder, a checkpoint, or the folder of a run")
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="may be given several times, which makes a batch; empty: a new document",
    )
    parser.add_argument("--max-new-tokens", type=positive_int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from this share (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument(
        "--beams", type=positive_int, default=1, metavar="N", help="of a beam search (default: 1, none)"
    )
    parser.add_argument(
        "--steer",
        action="append",
        default=[],
        metavar="ID=F",
        help="change a concept, see below; may be given several times",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="unsteered and steered side by side, with the tokens that gain and lose probability",
    )
    parser.add_argument(
        "--teacher", action="store_true", help="with --compare: the same on the teacher, by steering its SAE"
    )
    add_teacher_config(parser)


def run(options):
    from cocomix.inference import generate

    sampling = generate.Sampling(
        options.max_new_tokens, options.temperature, options.top_p, options.seed, options.beams
    )
    generate.run(
        options.model, options.prompt, sampling, options.steer, options.compare, options.teacher, options.teacher_config
    )
