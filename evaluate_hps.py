"""Score generated pictures with the Human Preference Score (HPS), and print the mean.

    python evaluate_hps.py --hpc hpc.pth --image_folder output --meta_file output/meta.json

Reads   HPC: the classifier (train_hpc.py, or the released one; HPS v2 with --model ViT-H-14 --resize pad)
        META_FILE: a JSON array or JSON Lines of file_name (or file_path) and caption (or prompt), as generate_images.py
        writes it; the files lie in IMAGE_FOLDER
Writes  --output, if given: a row per picture of file_name, caption and score (100 * cosine), with OUTPUT.run.json beside
        it; a rerun scores only what is not there yet
        with --skip_errors: OUTPUT.errors.jsonl (or META_FILE.errors.jsonl), a row per picture that cannot be decoded

Prints the mean of the raw cosine, as the original did and the paper's tables have it, then n and the standard error:

    HPS: 0.189812
    n: 2000, standard error: 0.000291
"""

import argparse
from pathlib import Path

from utils import ranks, scoring
from utils.errors import one_line_errors


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hpc", required=True, help="the classifier's checkpoint")
    parser.add_argument("--image_folder", required=True, help="folder of the pictures")
    parser.add_argument("--meta_file", required=True, help="JSON array or JSON Lines of file_name and caption")
    parser.add_argument("--output", help="write a row per picture here, and go on there after an interruption")
    parser.add_argument("--skip_errors", action="store_true", help="pass over pictures that cannot be decoded")
    parser.add_argument("--overwrite", action="store_true", help="replace an output made with other options")
    scoring.add_arguments(parser)
    return parser.parse_args(argv)


def main(args):
    scoring.check_arguments(args)

    # Read what to score; one picture may come with several captions.
    folder = Path(args.image_folder)
    pairs = scoring.read_pairs(args.meta_file, folder)

    from utils import hps  # takes seconds: --help and mistakes in the meta file do not wait for it

    # Load the classifier, and score what has no score yet; each distinct prompt is encoded once.
    scorer = hps.load(args.hpc, args.model, ranks.device(args.device), precision=args.precision, resize=args.resize)
    results, errors_path = scoring.score_folder(
        args, scorer, args.meta_file, folder, pairs, args.output, args.skip_errors
    )

    # Report the mean of the cosine over the rows of the meta file.
    print("HPS: {hps:.6f}\nn: {n}, standard error: {standard_error:.6f}".format(**results), end="")
    print(f", skipped: {results['skipped']}, see {errors_path}" if results["skipped"] else "")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
