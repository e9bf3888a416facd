"""What nnU-Net does besides, made light: none of it is what is tested."""

from __future__ import annotations

from multiprocessing.pool import ThreadPool
from typing import Any


def replacements() -> list[tuple[Any, str, Any]]:
    """Owner, name and value of what takes the place of something heavy."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.utilities import utils

    collect = DatasetFingerprintExtractor.collect_foreground_intensities
    # Its statistics of intensities draw 10^8 voxels, of images with thousands; its own default is ten thousand a case.
    few = staticmethod(lambda segmentation, images, num_samples: collect(segmentation, images))
    return [
        (DatasetFingerprintExtractor, "collect_foreground_intensities", few),
        # The files of a data set are listed in twelve processes.
        (utils, "Pool", lambda processes: ThreadPool(1)),
    ]
