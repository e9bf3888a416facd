"""What happens to a step whose loss is not a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from nnunet_ssl.errors import UserError
from nnunet_ssl.runtime.distributed import from_all_ranks

# So many skipped steps in a row end a training.
LONGEST_RUN = 10


class StepGuard:
    """Counts the steps that are skipped because loss or gradient is not finite, and ends a hopeless training.

    Args:
        say: Writes a line to the training's log.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.skipped_in_epoch = 0
        self._in_a_row = 0

    def note(self, is_finite: bool, terms: Mapping[str, float], keys: Sequence[str]) -> None:
        """Take note of a step.

        Args:
            is_finite: Whether it can be taken; all ranks say the same.
            terms: Values of the loss terms, by name, on this rank.
            keys: The cases in its batches.

        Raises:
            UserError: After too many skipped steps in a row.
        """
        if is_finite:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self.skipped_in_epoch += 1
        here = [name for name, value in terms.items() if not math.isfinite(value)]
        everywhere = from_all_ranks((here, list(keys)))
        guilty = [told for told in everywhere if told[0]] or everywhere
        bad = dict.fromkeys(name for names, _ in guilty for name in names)
        what = f"the loss term {' and '.join(bad)} is not finite" if bad else "the gradient is not finite"
        cases = ", ".join(dict.fromkeys(case for _, cases in guilty for case in cases))
        self._say(f"WARNING: step skipped, {what}; cases in the batch: {cases}")
        if self._in_a_row >= LONGEST_RUN:
            raise UserError(
                f"{LONGEST_RUN} steps in a row were skipped because {what}; cases in the last batch: {cases}. Look for "
                f"broken images among them, or lower initial_lr. The last checkpoint holds the weights before these "
                f"steps; continue with --c."
            )

    def start_epoch(self) -> None:
        """Count from zero again."""
        self.skipped_in_epoch = 0
