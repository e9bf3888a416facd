"""Append folds to splits_final.json in which only some training cases keep their labels.

Stock nnU-Net trains such a fold on its labeled cases alone, which makes it the fair baseline. Larger labeled sets
contain the smaller ones of the same base fold, the validation cases stay those of the base fold, and no fold that
exists is ever changed.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-d", dest="dataset", required=True, metavar="DATASET", help="data set, number or name")
    parser.add_argument("--labeled", type=int, nargs="+", required=True, metavar="N", help="cases that keep labels")
    parser.add_argument(
        "--folds", type=int, nargs="+", metavar="F", help="folds to draw from (default: nnU-Net's own, 0 to 4)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default 0)")


def run(arguments: argparse.Namespace) -> int:
    """Write the folds and print a table of them."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    from nnunet_ssl.data.raw_images import UNLABELED_FOLDER, raw_identifiers
    from nnunet_ssl.data.splits import INNER_FOLD_OF, NNUNET_NUM_FOLDS, hide_labels, load_or_make_splits, write_splits
    from nnunet_ssl.nnunet.folders import dataset_name, read_dataset_json, require_variables

    raw, preprocessed = require_variables("nnUNet_raw", "nnUNet_preprocessed")
    name = dataset_name(arguments.dataset)
    folder = preprocessed / name
    dataset_json = read_dataset_json(folder / "dataset.json")
    identifiers = list(get_filenames_of_train_images_and_targets(str(raw / name), dataset_json))
    splits_file = folder / "splits_final.json"
    splits = load_or_make_splits(str(splits_file), identifiers)
    ours = {"unlabeled", INNER_FOLD_OF}
    own = [number for number, fold in enumerate(splits[:NNUNET_NUM_FOLDS]) if not ours & set(fold)]
    folds = sorted(set(arguments.folds)) if arguments.folds is not None else own
    new = hide_labels(splits, folds, sorted(set(arguments.labeled)), arguments.seed)
    write_splits(str(splits_file), [*splits, *(fold.split for fold in new)])
    print(f"{'fold':>5} {'from fold':>10} {'labeled':>8} {'unlabeled':>10} {'validation':>11}")
    for fold in new:
        parts = fold.split
        print(
            f"{fold.number:>5} {fold.base_fold:>10} {len(parts['train']):>8} {len(parts['unlabeled']):>10} "
            f"{len(parts['val']):>11}"
        )
    print(f"Written to {splits_file}")
    both = sorted(set(raw_identifiers(str(raw / name), UNLABELED_FOLDER) or ()) & set(identifiers))
    if both:
        print(
            f"WARNING: {len(both)} images of imagesUn are labeled cases too, e.g. {both[0]}: some fold reports on "
            f"them. nnunet-ssl preprocess passes them over; remove or rename them."
        )
    return 0
