"""`cocomix export`: a checkpoint becomes a transformers folder."""

SUMMARY = "turn a checkpoint into a transformers folder, for any use elsewhere"


def add_arguments(parser):
    parser.add_argument("checkpoint", help="a checkpoint, the folder of a run, or a transformers folder")
    parser.add_argument("out", metavar="OUT", help="the folder to write; it must not exist yet")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32", help="of the weights (default: fp32)")


def run(options):
    from cocomix.distributed.export import export

    print(f"the model is in {export(options.checkpoint, options.out, options.dtype)}")
